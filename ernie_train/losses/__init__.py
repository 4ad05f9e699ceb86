"""Compute losses by pure functions of tensors; the trainer divides by counts."""

from ernie_train.losses.advantages import (
    AdvantageScale,
    explained_variance,
    gae,
    group_advantages,
    varied_groups,
    whiten,
)
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
from ernie_train.losses.logprobs import token_logprobs
from ernie_train.losses.policy import (
    KL_IN_LOSS_KINDS,
    KlInLossKind,
    KlKind,
    kl_estimate,
    kl_loss,
    policy_loss,
    value_loss,
)
from ernie_train.losses.preference import (
    ImplicitRewards,
    Pair,
    PairCounts,
    choose_pairs,
    completion_logratios,
    dpo_loss,
    implicit_rewards,
)

__all__ = [
    "KL_IN_LOSS_KINDS",
    "AdvantageScale",
    "ImplicitRewards",
    "KlInLossKind",
    "KlKind",
    "Pair",
    "PairCounts",
    "choose_pairs",
    "completion_logratios",
    "cross_entropy_rows",
    "dpo_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "implicit_rewards",
    "kl_estimate",
    "kl_loss",
    "linear_cross_entropy",
    "load_balance_loss",
    "mean_absolute_cosine",
    "policy_loss",
    "router_orthogonal_gradient",
    "router_orthogonal_loss",
    "router_z_loss",
    "selection_bias_step",
    "token_balanced_loss",
    "token_balanced_weights",
    "token_logprobs",
    "unbiased_expert_ids",
    "value_loss",
    "varied_groups",
    "whiten",
]
