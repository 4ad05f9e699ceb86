"""Sequences and preference pairs of an update, minibatches and micro-batches of them."""

from ernie_train.rl.batch.dealing import (
    Minibatch,
    fill_micro_batches,
    micro_batches,
    minibatches,
)
from ernie_train.rl.batch.sequences import (
    MicroBatch,
    PreferencePair,
    RolloutBatch,
    TokenizedCompletion,
    length_order,
)

__all__ = [
    "MicroBatch",
    "Minibatch",
    "PreferencePair",
    "RolloutBatch",
    "TokenizedCompletion",
    "fill_micro_batches",
    "length_order",
    "micro_batches",
    "minibatches",
]
