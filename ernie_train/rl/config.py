"""Settings of progressive RL: rollouts, PPO, pairs, curriculum."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import NonNegative, Positive, PositiveInt, Share, StrictConfig
from ernie_train.losses import KL_IN_LOSS_KINDS
from ernie_train.rewards.scoring import RewardConfig, RewardPart
from ernie_train.train.optimizer import OptimConfig
from ernie_train.train.stage import StageConfig


class PromptSource(StrictConfig):
    """Problems with a verifier: a JSONL file or a directory of them.

    weight: an epoch holds round(weight * problems) of them.
    tasks: keeps those of the named tasks or domains; empty keeps all.
    max_examples: uses the first of each task only.
    """

    path: Annotated[str, Field(min_length=1)]
    weight: Positive = 1.0
    tasks: list[str] = []
    max_examples: PositiveInt | None = None


class CriticConfig(StrictConfig):
    """The critic of `advantage: gae`, a model of its own that starts from the stage's policy.

    path: starts it from the `critic/` directory of a checkpoint instead.
    warmup_iterations: iterations in which the critic learns alone.
    """

    optim: OptimConfig
    path: str | None = None
    clip_range: Positive | None = 0.2
    warmup_iterations: Annotated[int, Field(ge=0)] = 0


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


class OfflinePairs(StrictConfig):
    """Where offline pairs come from: a file of preferences, or the stage's starting policy.

    path: rows with a prompt, a chosen and a rejected completion.
    prompts: how many problems the starting policy completes, `group_size` times each, before the
        stage begins; its best and worst completion of each make the pairs, kept in the stage's
        directory.
    per_iteration: pairs in each iteration's updates.
    """

    path: str | None = None
    prompts: PositiveInt | None = None
    per_iteration: PositiveInt

    @model_validator(mode="after")
    def _one_source(self) -> OfflinePairs:
        if (self.path is None) == (self.prompts is None):
            raise ValueError("exactly one of path and prompts must be given")
        return self


class Curriculum(StrictConfig):
    """Prompts up to a difficulty, which rises when the policy solves enough of an iteration's.

    Rows have an integer field `difficulty` (1 where it is missing).
    """

    start: PositiveInt = 1
    raise_at: Annotated[float, Field(gt=0, le=1)] = 0.8


class StageEvaluation(StrictConfig):
    """Held-out problems solved during training; greedy, unless `samples` asks for pass@k."""

    path: str
    every_iterations: PositiveInt
    max_examples: PositiveInt | None = None
    tasks: list[str] = []
    samples: PositiveInt = 1
    temperature: NonNegative = 0.0

    @model_validator(mode="after")
    def _sampled(self) -> StageEvaluation:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature: greedy completions are all equal")
        return self


# What only completions sampled in the stage make use of.
_SAMPLING = (
    "temperature", "top_p", "top_k", "rollout_batch_size", "refill_rounds", "truncated",
    "truncation_penalty", "normalize_rewards", "advantage", "group_scale", "group_size",
    "clip_ratio", "clip_ratio_high", "curriculum", "canaries", "dump_rollouts", "replay_rollouts",
    "samples_per_iteration", "max_logprob_mismatch",
)  # fmt: skip


class UpoConfig(StageConfig):
    """Unified preference optimization: PPO joined with DPO on pairs of completions.

    One iteration samples `prompts_per_iteration` groups of `group_size` completions, scores them,
    and updates the policy `update_epochs` times over them in `minibatches` optimizer steps each.
    The objective is policy_coef * PPO + kl - entropy_coef * entropy + preference_coef * DPO(beta)
    on pairs. What a coefficient of 0 switches off costs nothing.

    pairs: "online" pairs the best with the worst completion of each of the iteration's prompts,
        where their rewards differ by `pair_margin`; "offline" takes those of `offline`.
    refill_rounds: further rounds of prompts that replace groups without a difference in reward.
    truncated: completions cut at max_new_tokens are left out ("mask") or kept, their reward less
        `truncation_penalty` ("punish").
    max_logprob_mismatch: bound of mean exp|recomputed - sampled logprob| - 1; above it the stage
        stops.
    """

    kind: Literal["upo"]
    data: list[PromptSource] = []
    reward: RewardConfig | None = None
    iterations: PositiveInt

    prompts_per_iteration: PositiveInt | None = None
    group_size: PositiveInt = 8
    max_prompt_tokens: PositiveInt = 512  # longer prompts are left out
    max_new_tokens: PositiveInt
    max_pair_tokens: PositiveInt | None = None  # of an offline pair's prompt with a completion
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    rollout_batch_size: PositiveInt = 256
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    truncated: Literal["mask", "punish"] = "punish"
    truncation_penalty: NonNegative = 0.0
    normalize_rewards: Literal["domain", "none"] = "domain"

    advantage: Literal["gae", "group"] = "group"
    group_scale: Literal["std", "none"] = "std"
    gamma: Share = 1.0
    lam: Share = 0.95
    critic: CriticConfig | None = None

    update_epochs: PositiveInt = 1
    minibatches: PositiveInt = 1
    policy_coef: NonNegative = 1.0
    clip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_ratio_high: Positive | None = None
    entropy_coef: NonNegative = 0.0
    kl: KlConfig | None = None

    preference_coef: NonNegative = 0.0
    pairs: Literal["online", "offline", "both"] | None = None
    pair_margin: Positive = 0.5
    beta: Positive = 0.1
    offline: OfflinePairs | None = None

    curriculum: Curriculum | None = None
    evaluation: StageEvaluation | None = None
    max_logprob_mismatch: Positive = 0.05
    canaries: Annotated[int, Field(ge=0)] = 16  # rows on which the reward is tried at the start
    samples_per_iteration: Annotated[int, Field(ge=0)] = 8  # rows of samples.jsonl
    term_norms_every: PositiveInt | None = None  # iterations between each term's gradient norm
    dump_rollouts: bool = False
    replay_rollouts: str | None = None  # a directory of rollouts that are used instead of sampling

    @model_validator(mode="after")
    def _consistent(self) -> UpoConfig:
        problems = [
            *self._rollout_problems(),
            *self._estimator_problems(),
            *self._pair_problems(),
        ]
        if self.truncated == "mask" and self.truncation_penalty:
            problems.append("truncation_penalty has no effect with truncated='mask'")
        if self.checkpoint.best_metric is not None and self.evaluation is None:
            problems.append("checkpoint.best_metric needs an evaluation")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _changes(self, name: str) -> bool:
        """Whether a setting is not at its default; what a run records has all defaults written."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _rollout_problems(self) -> list[str]:
        made = self.offline is not None and self.offline.prompts is not None
        needs = ["data", "reward"] if self.needs_rollouts or made else []
        needs += ["prompts_per_iteration"] if self.needs_rollouts else []
        problems = [
            f"{name} must be given: completions are sampled"
            for name in needs
            if not getattr(self, name)
        ]
        if self.max_pair_tokens is not None and self.needs_rollouts:
            problems.append("max_pair_tokens has no effect beside rollouts: they have their bounds")
        unused = [
            name
            for name in ("data", "reward", "prompts_per_iteration")
            if name not in needs and getattr(self, name)
        ]
        problems += [f"{name} has no effect: nothing is sampled" for name in unused]
        if not needs:
            problems += [
                f"{name} has no effect: nothing is sampled"
                for name in _SAMPLING
                if self._changes(name)
            ]
        return problems

    def _estimator_problems(self) -> list[str]:
        problems = []
        if self.advantage == "gae" and self.critic is None:
            problems.append("advantage='gae' needs a critic")
        if self.critic is not None and self.policy_coef == 0:
            problems.append("a critic has no effect with policy_coef=0")
        if self.advantage == "group":
            if self.critic is not None:
                problems.append("a critic has no effect with advantage='group'")
            if self.group_size < 2 and self.needs_rollouts:
                problems.append("advantage='group' needs a group_size of at least 2")
        unused = ("gamma", "lam") if self.advantage == "group" else ("group_scale",)
        problems += [
            f"{name} has no effect with advantage={self.advantage!r}"
            for name in unused
            if self._changes(name)
        ]
        if self.policy_coef == 0 and (self.entropy_coef or (self.kl and self.kl.coef)):
            problems.append("entropy_coef and kl act on the policy term's tokens: policy_coef=0")
        if self.policy_coef == 0 and self.preference_coef == 0:
            problems.append("policy_coef and preference_coef are both 0: nothing would be learnt")
        return problems

    def _pair_problems(self) -> list[str]:
        problems = []
        if self.preference_coef > 0 and self.pairs is None:
            problems.append("preference_coef needs pairs: online, offline or both")
        if self.pairs in ("offline", "both") and self.offline is None:
            problems.append(f"pairs='{self.pairs}' needs offline: where they come from")
        if self.offline is not None and self.pairs not in ("offline", "both"):
            problems.append("offline has no effect without pairs: offline, or both")
        if self.pairs in ("online", "both") and self.group_size < 2:
            problems.append(f"pairs='{self.pairs}' needs a group_size of at least 2")
        if self.pairs is not None and self.micro_batch_size < 2:
            problems.append("pairs need a micro_batch_size of at least 2: both go through together")
        if self.pairs is not None and self.reward is not None:
            highest = sum(abs(part.weight) for part in self._reward_parts) + self.truncation_penalty
            if self.pair_margin > highest:
                problems.append(
                    f"pair_margin={self.pair_margin:g} is never met: rewards differ by "
                    f"{highest:g} at most"
                )
        return problems

    @property
    def needs_rollouts(self) -> bool:
        """Whether the policy is sampled from; plain DPO on offline pairs does not."""
        return self.policy_coef > 0 or self.uses_online_pairs

    @property
    def uses_online_pairs(self) -> bool:
        return self.preference_coef > 0 and self.pairs in ("online", "both")

    @property
    def uses_offline_pairs(self) -> bool:
        return self.preference_coef > 0 and self.pairs in ("offline", "both")

    @property
    def needs_reference(self) -> bool:
        """Whether the stage's starting policy is kept beside the policy."""
        return self.preference_coef > 0 or (self.kl is not None and self.kl.coef > 0)

    def lengths(self) -> dict[str, int]:
        """The sequence lengths that the model must be able to hold, by setting."""
        both = self.max_prompt_tokens + self.max_new_tokens
        if self.needs_rollouts:
            return {"max_prompt_tokens + max_new_tokens": both}
        return {"max_pair_tokens": self.max_pair_tokens or both}

    @property
    def _reward_parts(self) -> list[RewardPart]:
        return self.reward.parts if self.reward is not None else []

    def paths(self) -> list[str]:
        """Every file or directory that the stage reads."""
        found = [source.path for source in self.data]
        for path in (
            self.offline.path if self.offline else None,
            self.evaluation.path if self.evaluation else None,
            self.critic.path if self.critic else None,
            self.replay_rollouts,
            *(part.python and part.python.rpartition(":")[0] for part in self._reward_parts),
        ):
            if path is not None:
                found.append(path)
        return found
