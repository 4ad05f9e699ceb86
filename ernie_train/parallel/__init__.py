"""How a model is laid over ranks: experts, gradients, optimizer state; and recomputation."""

from ernie_train.parallel.expert import ExpertDispatcher, check_expert_degree, experts_placed
from ernie_train.parallel.gradients import (
    broadcast_updated,
    owned,
    owners,
    split_by_place,
)
from ernie_train.parallel.pace import HasDecoder, Pace, idle_pass
from ernie_train.parallel.recompute import (
    Recompute,
    RecomputeConfig,
    chunk_tokens,
    enable_recompute,
    recomputed_parts,
)
from ernie_train.parallel.reduction import GradientReduction
from ernie_train.parallel.wrap import clone_model, new_model

__all__ = [
    "ExpertDispatcher",
    "GradientReduction",
    "HasDecoder",
    "Pace",
    "Recompute",
    "RecomputeConfig",
    "broadcast_updated",
    "check_expert_degree",
    "chunk_tokens",
    "clone_model",
    "enable_recompute",
    "experts_placed",
    "idle_pass",
    "new_model",
    "owned",
    "owners",
    "recomputed_parts",
    "split_by_place",
]
