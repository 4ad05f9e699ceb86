"""Settings of an RL stage as a whole, and the checks between its parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from ernie_train.core.config import HARMLESS, PositiveInt, is_recorded
from ernie_train.environments import EnvironmentConfig
from ernie_train.rewards.scoring import RewardConfig
from ernie_train.rl.config.idle import settings_without_effect
from ernie_train.rl.config.policy import CriticConfig, PolicyConfig
from ernie_train.rl.config.preference import OfflinePairs, PreferenceConfig, SharedReward
from ernie_train.rl.config.rollout import (
    Curriculum,
    PromptSource,
    RolloutConfig,
    StageEvaluation,
)
from ernie_train.train.stage import StageConfig


class UpoConfig(StageConfig):
    """Unified preference optimization: PPO joined with a loss of pairs of completions."""

    kind: Literal["upo"]
    """Reinforcement learning on verifiable rewards, joined with pairs of completions."""
    data: Annotated[list[PromptSource], Field(min_length=1)]
    """Files of prompts, mixed by weight."""
    reward: RewardConfig
    """What judges completions: a verifier's name, a part, a list of parts, or a section."""
    audit_reward: SharedReward | None = None
    """A more expensive reward in place of `reward` on a share of the prompts."""
    iterations: PositiveInt
    """Duration: rollouts, each with its updates."""
    micro_batch_tokens: PositiveInt | None = None
    """Bound on the tokens of a micro-batch beside `micro_batch_size`, for sequences of very
    different lengths: a few long ones fill it, or many short ones. No bound unless given.
    """
    rollout: RolloutConfig
    """Settings of the sampling of an iteration."""
    environment: EnvironmentConfig | None = None
    """Tools that the policy may call over several turns (docs/tools.md)."""
    policy: PolicyConfig = PolicyConfig()
    """The objective and its updates."""
    preference: PreferenceConfig | None = None
    """A term that learns from pairs of completions."""
    critic: CriticConfig | None = None
    """A critic, for generalized advantages (GAE) instead of group-relative ones."""
    curriculum: Curriculum | None = None
    """Draws prompts up to a difficulty that rises."""
    evaluation: StageEvaluation | None = None
    """Held-out problems that are solved during the stage."""
    share_prompts: bool = False
    """Computes a prompt once for all of its completions in a micro-batch
    (docs/upo.md#shared-prompts).
    """
    canaries: Annotated[int, Field(ge=0), HARMLESS] = 16
    """Rows on which the reward is tried before the first iteration."""
    samples_per_iteration: Annotated[int, Field(ge=0), HARMLESS] = 8
    """Completions that an iteration adds to `samples.jsonl`."""
    measured_completions: PositiveInt | None = None
    """Completions of an iteration over which `entropy`, `kl`, `experts_changed` and
    `logprob_mismatch` are means; others that neither train nor are compared then pass no model
    before the update, and without a KL term those that only train pass no reference. All unless
    given (docs/upo.md#one-iteration).
    """
    term_norms_every: Annotated[PositiveInt | None, HARMLESS] = None
    """Iterations between measurements of each term's gradient norm, besides the first; they cost a
    pass a term. 10 where a policy and a preference term are joined, else never, unless given.
    """

    @model_validator(mode="after")
    def _engine_fits(self) -> UpoConfig:
        rollout, preference = self.rollout, self.preference
        if rollout.engine.kind == "own":
            return self
        samples_pairs = preference is not None and preference.samples_completions
        if rollout.replay is not None and not samples_pairs:
            raise ValueError("rollout.engine has no effect with replay: nothing is sampled")
        return self

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> UpoConfig:
        problems = []
        group_size, preference = self.rollout.group_size, self.preference
        problems += self._best_metric_problems()
        if self.critic is not None and self.policy.coef == 0:
            problems.append("a critic has no effect with policy.coef=0")
        for key in ("group_scale", "baseline"):
            if self.critic is not None and getattr(self.policy, key) is not None:
                problems.append(f"policy.{key} has no effect beside a critic")
        problems += self._reward_problems()
        if self.critic is not None and self.critic.warmup_iterations >= self.iterations:
            problems.append(
                f"critic.warmup_iterations={self.critic.warmup_iterations} leaves none of "
                f"iterations={self.iterations} to the policy"
            )
        if self.critic is None and self.policy.coef and group_size < 2:
            problems.append("without a critic rollout.group_size must be at least 2")
        if self.policy.coef == 0 and preference is None:
            problems.append("policy.coef is 0 and there is no preference: nothing would be learnt")
        if self.samples_each_iteration and self.rollout.prompts_per_iteration is None:
            problems.append("rollout.prompts_per_iteration must be given")
        if preference is not None:
            problems += self._pair_problems(preference)
        problems += self._environment_problems()
        problems += self._micro_batch_problems()
        if not is_recorded(info):
            problems += [idle.message for idle in settings_without_effect(self)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _reward_problems(self) -> list[str]:
        problems = []
        scales_groups = self.critic is None and self.policy.advantage_scale == "std"
        if self.policy.normalize_rewards == "domain" and scales_groups:
            problems.append(
                "policy.normalize_rewards: domain has no effect under group_scale: std, which "
                "divides by the deviation of each group, of one domain: leave it out"
            )
        audit, scale = self.audit_reward, self.reward.verifier.weight
        if audit is not None and scales_groups and audit.verifier.weight != scale:
            problems.append(
                f"audit_reward: its {audit.verifier.label} has weight {audit.verifier.weight:g}, "
                f"that of reward has {scale:g}: groups would be scaled differently by who judges "
                "them: give both the same"
            )
        if self.reward.verifier.weight == 0:
            problems.append(
                f"reward: {self.reward.verifier.label} decides which completions are correct and "
                "which groups teach something, with weight 0: put the part that is learnt first"
            )
        return problems

    def _environment_problems(self) -> list[str]:
        tools, room = self.environment, self.rollout.max_new_tokens
        if tools is None:
            return []
        if self.preference is not None and self.preference.of_solutions:
            source = "gold" if "gold" in self.preference.pairs else "hint"
            return [
                f"preference.pairs: {source} needs a solution of one turn, and an environment asks "
                "for episodes of several: leave one of them out"
            ]
        if tools.max_tool_tokens < room:
            return []
        return [
            f"environment.max_tool_tokens={tools.max_tool_tokens} leaves no room in "
            f"rollout.max_new_tokens={room}, which holds an episode's turns and results of tools"
        ]

    def _micro_batch_problems(self) -> list[str]:
        most = self.micro_batch_tokens
        if most is None:
            return []
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens - 1
        together = 2 if self.preference is not None else 1
        if most < together * longest:
            what = "the two of a pair" if together == 2 else "a sequence"
            return [
                f"micro_batch_tokens={most} holds less than {what} of rollout.max_prompt_tokens + "
                f"max_new_tokens - 1: at least {together * longest}"
            ]
        if most >= self.micro_batch_size * longest:
            return [
                f"micro_batch_tokens={most} has no effect: {self.micro_batch_size} sequences, of "
                f"micro_batch_size, have {self.micro_batch_size * longest} at most; raise that, or "
                "leave micro_batch_tokens out"
            ]
        return []

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
        own = preference.of_rollouts or (preference.offline and preference.offline.prompts)
        compares = {"online", "shorter"} & {*preference.pairs} or preference.offline
        if own and compares and self.rollout.group_size < 2:
            problems.append("pairs of own completions need a rollout.group_size of at least 2")
        if self.micro_batch_size < 2:
            problems.append("pairs need a micro_batch_size of at least 2: both go through together")
        if not own and self.policy.coef == 0:
            problems.append("policy.coef is 0 and pairs come from a file: that is kind: dpo")
        return problems + self._margin_problems(preference)

    def _margin_problems(self, preference: PreferenceConfig) -> list[str]:
        pairs = {*preference.pairs}
        by_policy = preference.offline is not None and preference.offline.prompts is not None
        spans = []  # of the rewards that rank pairs
        if "online" in pairs and preference.pair_reward is not None:
            spans.append(preference.pair_reward.span)
        elif "online" in pairs:
            spans.append(self.reward.span + self.rollout.truncation_penalty)
        if {"gold", "hint"} & pairs or by_policy:
            spans.append(self.reward.span)
        if not spans and preference.margin != PreferenceConfig.model_fields["margin"].default:
            return ["preference.margin has no effect: no reward ranks the pairs"]
        if spans and preference.margin > min(spans):
            return [
                f"preference.margin={preference.margin:g} is never met: rewards differ by "
                f"{min(spans):g} at most"
            ]
        return []

    @property
    def samples_each_iteration(self) -> bool:
        """Return whether iterations need rollouts; on offline pairs alone they do not."""
        of_rollouts = self.preference is not None and self.preference.of_rollouts
        return self.policy.coef > 0 or of_rollouts

    @property
    def learns_from_every_group(self) -> bool:
        """Return whether groups of equal verdicts teach something too.

        Over a critic each completion is compared with what was expected, and a KL in the reward
        tells completions of one verdict apart.
        """
        kl = self.policy.kl
        return self.critic is not None or (kl is not None and kl.coef_in_reward > 0)

    @property
    def normalizes_by_domain(self) -> bool:
        """Return whether rewards are normalized within their domain, as they are by default.

        Advantages that are divided by their group's deviation are the same without.
        """
        if self.policy.normalize_rewards is not None:
            return self.policy.normalize_rewards == "domain"
        if self.policy.baseline == "leave_one_out":
            return False
        return self.critic is not None or self.policy.advantage_scale == "none"

    @property
    def offline(self) -> OfflinePairs | None:
        return self.preference.offline if self.preference is not None else None

    @property
    def measures_term_norms_every(self) -> int | None:
        """Return `term_norms_every` or its default: with a preference the terms are compared."""
        compared = self.preference is not None and self.policy.coef > 0
        return self.term_norms_every or (10 if compared else None)

    @property
    def needs_reference(self) -> bool:
        """Return whether the stage's starting policy is kept beside the policy."""
        kl = self.policy.kl
        of_pairs = self.preference is not None and self.preference.needs_start
        return of_pairs or (kl is not None and kl.coef > 0)

    def rewards(self) -> list[RewardConfig]:
        """Return the reward and those that judge a share of the prompts."""
        pair_reward = self.preference.pair_reward if self.preference is not None else None
        others = (self.audit_reward, pair_reward)
        return [self.reward, *(reward for reward in others if reward is not None)]

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must be able to hold, by setting."""
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        return {"rollout.max_prompt_tokens + rollout.max_new_tokens": longest}

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        found = [source.path for source in self.data]
        found += [source.without for source in self.data if source.without is not None]
        found += self.environment.files if self.environment else []
        parts = [part for reward in self.rewards() for part in reward.parts]
        for path in (
            self.offline.path if self.offline else None,
            self.evaluation.path if self.evaluation else None,
            self.critic.path if self.critic else None,
            self.rollout.replay,
            *(part.python and part.python.rpartition(":")[0] for part in parts),
            *(part.model.path for part in parts if part.model is not None),
        ):
            if path is not None:
                found.append(path)
        return found
