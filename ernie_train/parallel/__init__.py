"""Parallelism: experts, gradients and optimizer state over ranks; and recomputation."""

from ernie_train.parallel.build import clone_model, new_model, reference_model
from ernie_train.parallel.expert import (
    ExpertDispatcher,
    check_expert_degree,
    expert_placement,
    has_moe_layers,
)
from ernie_train.parallel.gradients import (
    GradientReducer,
    broadcast_updated,
    free_gradients,
    gradient,
    owned_names,
    parameter_owners,
    set_gradient_dtype,
    split_experts,
)
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
    "GradientReducer",
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
    "expert_placement",
    "free_gradients",
    "gradient",
    "has_moe_layers",
    "new_model",
    "owned_names",
    "parameter_owners",
    "recomputed_parts",
    "reference_model",
    "set_gradient_dtype",
    "split_experts",
]
