"""How a model is laid over ranks: experts, gradients, optimizer state; and recomputation."""

from ernie_train.parallel.build import clone_model, new_model
from ernie_train.parallel.expert import ExpertDispatcher, check_expert_degree, experts_placed
from ernie_train.parallel.gradient_reduction import GradientReduction
from ernie_train.parallel.gradients import broadcast_updated, owned, owners, split_by_place
from ernie_train.parallel.lockstep import HasDecoder, Lockstep, dummy_pass
from ernie_train.parallel.recompute import (
    Recompute,
    RecomputeConfig,
    chunk_tokens,
    enable_recompute,
    recomputed_parts,
)

__all__ = [
    "ExpertDispatcher",
    "GradientReduction",
    "HasDecoder",
    "Lockstep",
    "Recompute",
    "RecomputeConfig",
    "broadcast_updated",
    "check_expert_degree",
    "chunk_tokens",
    "clone_model",
    "dummy_pass",
    "enable_recompute",
    "experts_placed",
    "new_model",
    "owned",
    "owners",
    "recomputed_parts",
    "split_by_place",
]
