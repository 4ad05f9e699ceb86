"""Settings of the policy's objective and of the critic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import (
    HARMLESS,
    NonNegative,
    PathText,
    Positive,
    PositiveInt,
    Share,
    StrictConfig,
)
from ernie_train.losses import (
    KL_IN_LOSS_KINDS,
    AdvantageBaseline,
    KlInLossKind,
    KlKind,
    PolicyObjective,
)
from ernie_train.train.optimizer import OptimConfig

# What the terms of tokens are means over.
Aggregation = Literal["token", "sequence", "constant"]


class KlConfig(StrictConfig):
    """Distance to the stage's starting policy, per token, in the loss or in the reward."""

    coef: NonNegative
    """Coefficient of the estimated distance, per token."""
    kind: KlKind | None = None
    """`k1`, `k2` or `k3`: Schulman's estimators, d, d^2/2 and exp(-d) - 1 + d of the difference d
    of logprobs; unless given k3 in the loss and k1 in the reward.
    """
    place: Literal["loss", "reward"] = "loss"
    """In the `loss` (k2, k3), or in the `reward` of each token (k1)."""

    @model_validator(mode="after")
    def _useful(self) -> KlConfig:
        if self.place == "loss" and self.kind == "k1":
            raise ValueError(
                f"kind={self.kind!r} has no useful gradient in the loss: use "
                f"{' or '.join(KL_IN_LOSS_KINDS)}, or place: reward"
            )
        if self.coef == 0 and (self.kind is not None or self.place != "loss"):
            raise ValueError("kind and place: no effect with coef: 0; leave them out")
        # The policy gradient of a reward of -k1 is that of -KL(policy | reference); that of -k3 is
        # nearly orthogonal to it while the policy is near the reference (arXiv:2506.09477).
        if self.place == "reward" and self.kind not in (None, "k1"):
            raise ValueError(
                f"kind={self.kind!r} in the reward hardly pulls towards the reference: the policy "
                "gradient of k1 alone is that of KL(policy | reference). Use k1, or place: loss"
            )
        return self

    @property
    def kind_in_loss(self) -> KlInLossKind | None:
        """Return the estimator of the term of the loss; None where there is no such term."""
        if self.place == "reward" or self.coef == 0:
            return None
        return "k2" if self.kind == "k2" else "k3"

    @property
    def coef_in_reward(self) -> float:
        """Return what the k1 of each token is taken off its reward with; 0 in the loss."""
        return self.coef if self.place == "reward" else 0.0


class SamplerCorrectionConfig(StrictConfig):
    """Importance weights of sampled tokens: probability at the update over that of the sampler."""

    kind: Literal["truncated", "masked"]
    """Weights out of bounds are held at them (`truncated`), or are 0 (`masked`)."""
    level: Literal["token", "sequence"] = "token"
    """The weight of each `token`, or the product over its `sequence`."""
    bounds: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] | None = None
    """Lowest and highest weight; [0, 2] unless given, [0.5, 2] with `masked`."""

    @model_validator(mode="after")
    def _around_one(self) -> SamplerCorrectionConfig:
        low, high = self.range
        if not low <= 1 <= high:
            raise ValueError(
                f"bounds={[low, high]} must hold 1, the weight of what the policy itself sampled"
            )
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest weight."""
        low, high = self.bounds or (0.5 if self.kind == "masked" else 0.0, 2.0)
        return low, high


# (low, high) where a recipe gives none. A sequence's ratio is a mean over its tokens and moves far
# less (arXiv:2507.18071); CISPO only bounds large weights, at 5 (arXiv:2510.13786): a ratio is
# positive, so that a low of 1 bounds nothing.
_CLIP_RANGES = {
    ("ppo", "token"): (0.2, None),
    ("ppo", "sequence"): (3e-4, 4e-4),
    ("cispo", "token"): (1.0, 4.0),
    ("cispo", "sequence"): (1.0, 4.0),
}


class PolicyConfig(StrictConfig):
    """The policy's objective, coef * PPO + kl - entropy_coef * entropy, and its updates.

    An iteration updates the policy `update_epochs` times over its rollout, in `minibatches`
    optimizer steps each. A coefficient of 0 leaves its term out of the objective.
    """

    coef: NonNegative = 1.0
    """Coefficient of the policy term; with 0 pairs alone train."""
    objective: PolicyObjective = "ppo"
    """`ppo`: the clipped surrogate; `cispo`: logprobs, weighted by clipped ratios without gradient
    (docs/upo.md#objectives).
    """
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each `token`, or the geometric mean over its `sequence` (GSPO)."""
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How far a ratio may fall below 1, and rise above it; unless given 0.2, with `ratio: sequence`
    3e-4, with `cispo` no bound.
    """
    clip_ratio_high: Positive | None = None
    """How far it may rise, if not as far; unless given `clip_ratio`, with `ratio: sequence` 4e-4
    where `clip_ratio` is not given either, with `cispo` 4.
    """
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Ratio above which a token of a negative advantage has no gradient either, where `ppo` alone
    pushes the harder the more likely it became; `null`: none (docs/upo.md#objectives). Of
    `objective: ppo` with `ratio: token` alone.
    """
    aggregation: Aggregation = "token"
    """Terms of tokens are means over the step's tokens (`token`), means over its sequences of their
    means (`sequence`, GRPO), or sums divided by `max_new_tokens` x sequences (`constant`, Dr.
    GRPO).
    """
    entropy_coef: NonNegative = 0.0
    """Coefficient of the entropy, which is maximized."""
    kl: KlConfig | None = None
    """Penalty on the distance to the stage's starting policy."""
    update_epochs: PositiveInt = 1
    """Updates over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps of one pass over an iteration's groups; at most as many as groups."""
    sampler_correction: SamplerCorrectionConfig | None = None
    """Importance weights of tokens whose sampler computes other logprobs than the update."""
    router_replay: bool = False
    """Tokens take the experts that sampling chose for them, weighted by the current router
    (docs/upo.md#router-replay).
    """
    baseline: AdvantageBaseline | None = None
    """A completion is compared with the `mean` of its group or, `leave_one_out`, with that of the
    others; `mean` unless given.
    """
    group_scale: Literal["std", "none"] | None = None
    """`std` divides group-relative advantages of the verifier's marks by the group's deviation,
    `none` does not; `std` unless given, `none` with `leave_one_out`.
    """
    normalize_rewards: Literal["domain", "none"] | None = None
    """`domain` centres and scales the rewards of each domain in an iteration, `none` does not;
    `domain` unless given, but nothing under `std`, where it has no effect.
    """

    @model_validator(mode="after")
    def _consistent(self) -> PolicyConfig:
        if self.coef == 0 and (self.entropy_coef or (self.kl and self.kl.coef)):
            raise ValueError("entropy_coef and kl act on the policy term's tokens: coef is 0")
        acting = (
            "objective", "ratio", "clip_ratio", "clip_ratio_high", "dual_clip", "aggregation",
            "baseline", "group_scale", "normalize_rewards", "sampler_correction",
        )  # fmt: skip
        fields = type(self).model_fields
        idle = [key for key in acting if getattr(self, key) != fields[key].default]
        if self.coef == 0 and idle:
            raise ValueError(f"{', '.join(idle)}: no effect with coef: 0")
        if not self.has_dual_clip and self.dual_clip != fields["dual_clip"].default:
            raise ValueError(
                "dual_clip has no effect but with objective: ppo and ratio: token: leave it out"
            )
        return self

    @property
    def has_dual_clip(self) -> bool:
        """Return whether `dual_clip` bounds ratios; cispo does so itself, means hardly move."""
        return self.objective == "ppo" and self.ratio == "token"

    @property
    def clip_range(self) -> tuple[float, float]:
        """Return how far a ratio may fall below 1 and rise above it."""
        low, high = _CLIP_RANGES[self.objective, self.ratio]
        if self.clip_ratio is not None:
            low, high = self.clip_ratio, high if self.objective == "cispo" else None
        return low, self.clip_ratio_high or high or low

    @property
    def advantage_scale(self) -> Literal["std", "none"]:
        """Return what group-relative advantages are divided by; RLOO divides by nothing."""
        return self.group_scale or ("none" if self.baseline == "leave_one_out" else "std")


class CriticConfig(StrictConfig):
    """A critic, which makes advantages generalized (GAE) instead of group-relative.

    It is a model of its own that starts from the stage's policy.
    """

    optim: OptimConfig
    """The critic's own optimizer."""
    gamma: Share = 1.0
    """Discount of GAE (arXiv:1506.02438)."""
    lam: Share = 1.0
    """Trace decay of the returns that the critic learns. Below 1 a reward at the last token is lost
    on tokens far from it for as long as values are near 0.
    """
    policy_lam: Share | None = None
    """Trace decay of the policy's advantages (decoupled GAE, arXiv:2504.05118); that of `lam`
    unless given.
    """
    path: Annotated[PathText | None, HARMLESS] = None
    """Starts it from the `critic/` directory of a checkpoint instead of the policy."""
    clip_range: Positive | None = 0.2
    """How far a value may move from that of the rollout; `null`: anywhere."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 5
    """Iterations in which the critic learns alone; fewer than `iterations`."""
