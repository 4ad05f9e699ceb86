"""Sampling: a batched engine with a key/value cache, and its work shared out over ranks.

Every sequence has random numbers of its own, derived from (seed, index), so that results depend
neither on the batch nor on the number of processes or ranks.
"""

from ernie_train.generate.engine import Completion, generate
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.generate.sharded import generate_sharded, score_sharded

__all__ = [
    "Completion",
    "SamplingConfig",
    "generate",
    "generate_sharded",
    "score_sharded",
]
