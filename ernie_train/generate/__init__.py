"""Sampling: a batched engine with a key/value cache, run on one rank or sharded over all.

Every sequence has its own random numbers, derived from (seed, sequence id), so that results depend
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
