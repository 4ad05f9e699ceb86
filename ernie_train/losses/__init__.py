"""Losses as pure functions of tensors; the trainer divides by counts."""

from ernie_train.losses.balance import (
    load_balance_loss,
    mean_absolute_cosine,
    router_orthogonal_gradient,
    router_orthogonal_loss,
    router_z_loss,
    selection_bias_step,
    unbiased_expert_ids,
)
from ernie_train.losses.cross_entropy import (
    cross_entropy_rows,
    linear_cross_entropy,
    token_balanced_loss,
    token_balanced_weights,
)

__all__ = [
    "cross_entropy_rows",
    "linear_cross_entropy",
    "load_balance_loss",
    "mean_absolute_cosine",
    "router_orthogonal_gradient",
    "router_orthogonal_loss",
    "router_z_loss",
    "selection_bias_step",
    "token_balanced_loss",
    "token_balanced_weights",
    "unbiased_expert_ids",
]
