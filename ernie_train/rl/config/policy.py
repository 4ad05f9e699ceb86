"""Settings of the policy's objective and of the critic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import (
    HARMLESS,
    NonNegative,
    Positive,
    PositiveInt,
    Share,
    StrictConfig,
)
from ernie_train.losses import KL_IN_LOSS_KINDS
from ernie_train.train.optimizer import OptimConfig


class KlConfig(StrictConfig):
    """Distance to the stage's starting policy, per token, in the loss or in the reward."""

    coef: NonNegative
    kind: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"

    @model_validator(mode="after")
    def _useful(self) -> KlConfig:
        if self.place == "loss" and self.kind not in KL_IN_LOSS_KINDS:
            raise ValueError(
                f"kind={self.kind!r} has no useful gradient in the loss: use "
                f"{' or '.join(KL_IN_LOSS_KINDS)}, or place: reward"
            )
        return self


class PolicyConfig(StrictConfig):
    """The policy's objective, coef * PPO + kl - entropy_coef * entropy, and its updates.

    An iteration updates the policy `update_epochs` times over its rollout, in `minibatches`
    optimizer steps each. A coefficient of 0 leaves its term out of the objective.

    group_scale: group-relative advantages are divided by the group's standard deviation, or not.
    normalize_rewards: "domain" centres and scales the rewards of each domain in an iteration.
    """

    coef: NonNegative = 1.0
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_ratio_high: Positive | None = None
    entropy_coef: NonNegative = 0.0
    kl: KlConfig | None = None
    update_epochs: PositiveInt = 1
    minibatches: PositiveInt = 1
    group_scale: Literal["std", "none"] | None = None  # None: std
    normalize_rewards: Literal["domain", "none"] = "domain"

    @model_validator(mode="after")
    def _consistent(self) -> PolicyConfig:
        if self.coef == 0 and (self.entropy_coef or (self.kl and self.kl.coef)):
            raise ValueError("entropy_coef and kl act on the policy term's tokens: coef is 0")
        return self


class CriticConfig(StrictConfig):
    """A critic, which makes advantages generalized (GAE) instead of group-relative.

    It is a model of its own that starts from the stage's policy.

    gamma, lam: discount and trace decay of GAE (arXiv:1506.02438).
    path: starts it from the `critic/` directory of a checkpoint instead.
    warmup_iterations: iterations in which the critic learns alone.
    """

    optim: OptimConfig
    gamma: Share = 1.0
    lam: Share = 0.95
    path: Annotated[str | None, HARMLESS] = None
    clip_range: Positive | None = 0.2
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
