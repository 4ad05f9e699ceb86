"""Settings of an RL stage: rollouts, policy, preference pairs, critic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import (
    HARMLESS,
    NonNegative,
    Positive,
    PositiveInt,
    SampleWeight,
    Share,
    StrictConfig,
)
from ernie_train.data import MappedRows
from ernie_train.losses import KL_IN_LOSS_KINDS
from ernie_train.rewards.scoring import RewardConfig
from ernie_train.train.optimizer import OptimConfig
from ernie_train.train.stage import StageConfig


class PromptSource(MappedRows):
    """Problems with a verifier: a file of rows, a directory or a pattern of them.

    weight: an epoch holds round(weight * problems) of them.
    tasks: keeps those of the named tasks or domains; empty keeps all.
    max_examples: uses the first of each task only.
    """

    path: Annotated[str, Field(min_length=1), HARMLESS]
    weight: SampleWeight = 1.0
    tasks: list[str] = []
    max_examples: PositiveInt | None = None


class RolloutConfig(StrictConfig):
    """Sampling of an iteration: `prompts_per_iteration` groups of `group_size` completions.

    max_prompt_tokens: longer prompts are left out.
    batch_size: sequences that are sampled at once.
    refill_rounds: further rounds of prompts that replace groups without a difference in reward.
    truncated: completions cut at max_new_tokens are kept with what they earned ("keep"), left out
        ("mask"), or kept with their reward less `truncation_penalty` ("punish").
    max_logprob_mismatch: bound of mean exp|recomputed - sampled logprob| - 1; above it the stage
        stops.
    dump: writes each iteration's rollout to `rollouts/` in the stage's directory.
    replay: a directory of such rollouts, which are used instead of sampling.
    """

    prompts_per_iteration: PositiveInt | None = None
    group_size: PositiveInt = 8
    max_prompt_tokens: PositiveInt = 512
    max_new_tokens: PositiveInt
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 256
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    truncated: Literal["keep", "mask", "punish"] = "keep"
    truncation_penalty: NonNegative = 0.0
    max_logprob_mismatch: Annotated[Positive, HARMLESS] = 0.05
    dump: Annotated[bool, HARMLESS] = False
    replay: Annotated[str | None, HARMLESS] = None

    @model_validator(mode="after")
    def _consistent(self) -> RolloutConfig:
        if self.truncated != "punish" and self.truncation_penalty:
            raise ValueError(f"truncation_penalty has no effect with truncated: {self.truncated}")
        if self.truncated == "punish" and not self.truncation_penalty:
            raise ValueError(
                "truncated: punish takes truncation_penalty off the reward, which is 0: give a "
                "penalty, such as 0.5, or say truncated: keep"
            )
        return self


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


class OfflinePairs(MappedRows):
    """Source of offline pairs: a file of preferences, or the stage's starting policy.

    path: rows with a prompt, a chosen and a rejected completion.
    prompts: how many problems the starting policy completes, `group_size` times each, before the
        stage begins; its best and worst completion of each make the pairs, kept in the stage's
        directory.
    per_iteration: pairs in each iteration's updates.
    """

    path: Annotated[str | None, HARMLESS] = None
    prompts: PositiveInt | None = None
    per_iteration: PositiveInt

    @model_validator(mode="after")
    def _one_source(self) -> OfflinePairs:
        if (self.path is None) == (self.prompts is None):
            raise ValueError("exactly one of path and prompts must be given")
        if self.columns is not None and self.path is None:
            raise ValueError("columns need a path: they are those of its rows")
        return self


class PreferenceConfig(StrictConfig):
    """The preference term, coef * DPO(beta) on pairs of completions (arXiv:2305.18290).

    pairs: "online" pairs the best with the worst completion of each of the iteration's prompts,
        where their rewards differ by `margin`; "offline" takes those of `offline`.
    """

    coef: Positive
    pairs: Literal["online", "offline", "both"]
    margin: Positive = 0.5
    beta: Positive = 0.1
    offline: OfflinePairs | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PreferenceConfig:
        if self.uses_offline and self.offline is None:
            raise ValueError(f"pairs: {self.pairs} needs offline: where they come from")
        if self.offline is not None and not self.uses_offline:
            raise ValueError("offline has no effect without pairs: offline, or both")
        return self

    @property
    def uses_online(self) -> bool:
        return self.pairs in ("online", "both")

    @property
    def uses_offline(self) -> bool:
        return self.pairs in ("offline", "both")


class Curriculum(StrictConfig):
    """Prompts up to a difficulty, which rises when the policy solves enough of an iteration's.

    Rows have an integer field `difficulty` (1 where it is missing).
    """

    start: PositiveInt = 1
    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8


class StageEvaluation(MappedRows):
    """Held-out problems solved during training; greedy, unless `samples` asks for pass@k."""

    path: Annotated[str, HARMLESS]
    every_iterations: Annotated[PositiveInt, HARMLESS]
    max_examples: PositiveInt | None = None
    tasks: list[str] = []
    samples: PositiveInt = 1
    temperature: NonNegative = 0.0

    @model_validator(mode="after")
    def _sampled(self) -> StageEvaluation:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature: greedy completions are all equal")
        return self


# Keys of version 0.1.0, which had all settings at the top level of the stage.
MOVED_KEYS = {
    "prompts_per_iteration": "rollout.prompts_per_iteration",
    "group_size": "rollout.group_size",
    "max_prompt_tokens": "rollout.max_prompt_tokens",
    "max_new_tokens": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "rollout_batch_size": "rollout.batch_size",
    "refill_rounds": "rollout.refill_rounds",
    "truncated": "rollout.truncated",
    "truncation_penalty": "rollout.truncation_penalty",
    "max_logprob_mismatch": "rollout.max_logprob_mismatch",
    "dump_rollouts": "rollout.dump",
    "replay_rollouts": "rollout.replay",
    "policy_coef": "policy.coef",
    "clip_ratio": "policy.clip_ratio",
    "clip_ratio_high": "policy.clip_ratio_high",
    "entropy_coef": "policy.entropy_coef",
    "kl": "policy.kl",
    "update_epochs": "policy.update_epochs",
    "minibatches": "policy.minibatches",
    "group_scale": "policy.group_scale",
    "normalize_rewards": "policy.normalize_rewards",
    "gamma": "critic.gamma",
    "lam": "critic.lam",
    "preference_coef": "preference.coef",
    "pairs": "preference.pairs",
    "pair_margin": "preference.margin",
    "beta": "preference.beta",
    "offline": "preference.offline",
}
_REMOVED_KEYS = {
    "advantage": "left out: a `critic` makes advantages generalized, without one they are "
    "group-relative",
    "max_pair_tokens": "left out: pairs are bound by rollout.max_prompt_tokens and max_new_tokens",
}


class UpoConfig(StageConfig):
    """Unified preference optimization: PPO joined with DPO on pairs of completions.

    canaries: rows on which the reward is tried before the first iteration.
    samples_per_iteration: rows that an iteration adds to samples.jsonl.
    term_norms_every: iterations between measurements of each term's gradient norm.
    """

    kind: Literal["upo"]
    data: Annotated[list[PromptSource], Field(min_length=1)]
    reward: RewardConfig
    iterations: PositiveInt
    rollout: RolloutConfig
    policy: PolicyConfig = PolicyConfig()
    preference: PreferenceConfig | None = None
    critic: CriticConfig | None = None
    curriculum: Curriculum | None = None
    evaluation: StageEvaluation | None = None
    canaries: Annotated[int, Field(ge=0), HARMLESS] = 16
    samples_per_iteration: Annotated[int, Field(ge=0), HARMLESS] = 8
    term_norms_every: Annotated[PositiveInt | None, HARMLESS] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        old = [f"{key} is now {MOVED_KEYS[key]}" for key in values if key in MOVED_KEYS]
        old += [f"{key} is {_REMOVED_KEYS[key]}" for key in values if key in _REMOVED_KEYS]
        if old:
            raise ValueError("; ".join(old))
        return values

    @model_validator(mode="after")
    def _consistent(self) -> UpoConfig:
        problems = []
        group_size, preference = self.rollout.group_size, self.preference
        problems += self._best_metric_problems()
        if self.critic is not None and self.policy.coef == 0:
            problems.append("a critic has no effect with policy.coef=0")
        if self.critic is not None and self.policy.group_scale is not None:
            problems.append("policy.group_scale has no effect beside a critic")
        if self.critic is None and self.policy.coef and group_size < 2:
            problems.append("without a critic rollout.group_size must be at least 2")
        if self.policy.coef == 0 and preference is None:
            problems.append("policy.coef is 0 and there is no preference: nothing would be learnt")
        if self.samples_each_iteration != (self.rollout.prompts_per_iteration is not None):
            problems.append(
                "rollout.prompts_per_iteration must be given"
                if self.samples_each_iteration
                else "rollout.prompts_per_iteration has no effect: iterations sample nothing"
            )
        if preference is not None:
            problems += self._pair_problems(preference)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _best_metric_problems(self) -> list[str]:
        if self.checkpoint.best_metric is None:
            return []
        if self.evaluation is None:
            return ["checkpoint.best_metric needs an evaluation"]
        try:
            every = self.evaluation.every_iterations
            self.checkpoint.require_scores("evaluation.every_iterations", every)
        except ValueError as error:
            return [str(error)]
        return []

    def _pair_problems(self, preference: PreferenceConfig) -> list[str]:
        problems = []
        makes_pairs = preference.uses_online or (preference.offline and preference.offline.prompts)
        if makes_pairs and self.rollout.group_size < 2:
            problems.append("pairs of own completions need a rollout.group_size of at least 2")
        if self.micro_batch_size < 2:
            problems.append("pairs need a micro_batch_size of at least 2: both go through together")
        if not makes_pairs and self.policy.coef == 0:
            problems.append("policy.coef is 0 and pairs come from a file: that is kind: dpo")
        highest = sum(abs(part.weight) for part in self.reward.parts)
        highest += self.rollout.truncation_penalty
        if preference.margin > highest:
            problems.append(
                f"preference.margin={preference.margin:g} is never met: rewards differ by "
                f"{highest:g} at most"
            )
        return problems

    @property
    def samples_each_iteration(self) -> bool:
        """Return whether iterations need rollouts; on offline pairs alone they do not."""
        online = self.preference is not None and self.preference.uses_online
        return self.policy.coef > 0 or online

    @property
    def offline(self) -> OfflinePairs | None:
        return self.preference.offline if self.preference is not None else None

    @property
    def needs_reference(self) -> bool:
        """Return whether the stage's starting policy is kept beside the policy."""
        kl = self.policy.kl
        return self.preference is not None or (kl is not None and kl.coef > 0)

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must be able to hold, by setting."""
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        return {"rollout.max_prompt_tokens + rollout.max_new_tokens": longest}

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        found = [source.path for source in self.data]
        for path in (
            self.offline.path if self.offline else None,
            self.evaluation.path if self.evaluation else None,
            self.critic.path if self.critic else None,
            self.rollout.replay,
            *(part.python and part.python.rpartition(":")[0] for part in self.reward.parts),
        ):
            if path is not None:
                found.append(path)
        return found
