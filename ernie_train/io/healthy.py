"""Healthy ranges of metrics, and the remedy where one is left.

The bounds are those at which runs are known to have gone astray, not laws. RL warns by them while
it runs; the report shows them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class HealthyRange(NamedTuple):
    """Hold the range of a metric, ends included.

    low, high: the ends; None where there is none.
    remedy: what is wrong outside of it and what helps; `{}` stands for the value.
    warns: True to warn of it in the terminal while RL runs.
    """

    metric: str
    low: float | None
    high: float | None
    remedy: str
    warns: bool = True

    def holds(self, value: float) -> bool:
        """Return True if a value lies in the range; NaN and infinities never do."""
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
        )

    @property
    def bounds(self) -> str:
        """Return the range as a person reads it, such as `0.01 to 3` or `up to 0.5`."""
        if self.low is None:
            return f"up to {self.high:g}"
        return f"from {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"


HEALTHY: tuple[HealthyRange, ...] = (
    HealthyRange(
        "entropy", 0.01, None,
        "entropy fell to {:.4f} nats: completions are nearly all alike; raise policy.entropy_coef, "
        "policy.clip_ratio_high or rollout.temperature, or lower optim.lr",
    ),
    HealthyRange(
        "entropy", None, 3.0,
        "entropy rose to {:.1f} nats: completions become noise; lower optim.lr or "
        "policy.entropy_coef",
    ),
    HealthyRange(
        "kl", None, 0.5,
        "the policy is {:.2f} nats a token away from its start: raise policy.kl.coef or lower "
        "optim.lr",
    ),
    HealthyRange(
        "clip_ratio", None, 0.3,
        "the ratios of {:.0%} of the tokens are clipped, which then teach nothing: lower optim.lr, "
        "policy.minibatches or policy.update_epochs",
        warns=False,
    ),
    HealthyRange(
        "grad_norm", None, 100.0,
        "the gradient's norm is {:.3g}: lower optim.lr, add optim.warmup_steps, and look for "
        "damaged rows",
        warns=False,
    ),
    HealthyRange(
        "logprob_mismatch", None, 0.05,
        "the sampler's log-probabilities differ by {:.1%} from those of the update: sample with "
        "the same dtype and weights, or set policy.sampler_correction",
        warns=False,
    ),
    HealthyRange(
        "completions/truncated", None, 0.2,
        "{:.0%} of the completions are cut off: raise rollout.max_new_tokens",
    ),
    HealthyRange(
        "frac_reward_zero_std", None, 0.8,
        "{:.0%} of the groups have one verdict for all completions, which teaches nothing: take "
        "prompts of middling difficulty, a larger rollout.group_size, or rollout.refill_rounds",
    ),
    HealthyRange(
        "reward_std", 0.01, None,
        "rewards of a group differ by {:.4f} (standard deviation): nothing can be compared; take "
        "prompts of middling difficulty, a larger rollout.group_size or a higher "
        "rollout.temperature",
        warns=False,
    ),
    HealthyRange(
        "accuracy", 0.02, 0.98,
        "{:.0%} of the completions are right: prompts that all fail or all succeed teach nothing; "
        "take easier or harder ones, a curriculum, or rollout.skip_solved",
        warns=False,
    ),
    HealthyRange(
        "preference/norm_ratio", None, 1.0,
        "the gradient of the pairs is {:.1f} times that of the policy term, which hardly counts "
        "then: lower preference.coef or preference.rpo_alpha, or leave preference.length_normalize "
        "true",
    ),
    HealthyRange(
        "reward_model/saturated", None, 0.5,
        "{:.0%} of the reward model's scores lie at their bounds, where completions without an "
        "answer are too: raise reward.model.clip if they have answers",
    ),
    HealthyRange(
        "reward_model/length_correlation", -0.8, 0.8,
        "the reward model's scores go with length (correlation {:.2f}): train it on pairs whose "
        "chosen completion is not always the longer or the shorter one, or lower its weight",
    ),
    HealthyRange(
        "sampler_weight/clipped", None, 0.1,
        "the sampler is far from the policy that learns: the weights of {:.0%} of the tokens are "
        "out of the bounds of policy.sampler_correction; sample with the same dtype and weights, "
        "or replay rollouts of a policy that is nearer",
    ),
    HealthyRange(
        "moe/dead_experts", None, 0.0,
        "{:.0f} experts get no tokens: raise balance.load_balance_coef or "
        "balance.bias_update_rate",
        warns=False,
    ),
    HealthyRange(
        "moe/load_max", None, 4.0,
        "the busiest expert has {:.1f} times its share: raise balance.load_balance_coef or "
        "balance.bias_update_rate",
        warns=False,
    ),
)  # fmt: skip


def ranges_of(metrics: Mapping[str, object]) -> Iterator[HealthyRange]:
    """Yield the ranges of the metrics that are there."""
    return (healthy for healthy in HEALTHY if healthy.metric in metrics)
