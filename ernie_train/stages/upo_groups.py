"""Where an RL stage's groups of completions come from: sampling, refills, curriculum, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.experience import reward_table
from ernie_train.losses import varied_groups
from ernie_train.rewards.composition import ComposedReward
from ernie_train.rollout import (
    Collector,
    Group,
    PromptOrder,
    SamplingSettings,
    read_rollout,
    write_rollout,
)
from ernie_train.stages.common import StageRun
from ernie_train.stages.upo_config import UpoConfig
from ernie_train.stages.upo_data import PreparedPrompts

ROLLOUTS = "rollouts"


class GroupSource:
    """Gives each iteration its groups; `position` and `level` are where it stands."""

    def __init__(
        self,
        config: UpoConfig,
        stage: StageRun,
        prepared: PreparedPrompts,
        reward: ComposedReward | None,
    ) -> None:
        """`reward` is None for a stage that samples nothing."""
        self.config, self.stage, self.prepared = config, stage, prepared
        self.level = config.curriculum.start if config.curriculum else None
        self.order = PromptOrder(prepared.sizes, prepared.weights, stage.data.seed)
        settings = SamplingSettings(
            config.group_size,
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            config.rollout_batch_size,
        )
        self.collector = Collector(
            stage.model,
            stage.data.tokenizer,
            prepared.problems,
            reward,
            settings,
            seed=stage.data.seed,
            stop_requested=lambda: stage.stop.requested,
        )

    def groups(self, number: int) -> list[Group]:
        """The groups of iteration `number`; empty where the stage needs no rollouts."""
        config = self.config
        if not config.needs_rollouts:
            return []
        if config.replay_rollouts is not None:
            directory = self.stage.data.base_dir / config.replay_rollouts
            groups = read_rollout(_file(directory, number))
        else:
            groups = self._sampled(number)
        if config.dump_rollouts:
            write_rollout(_file(self.stage.directory / ROLLOUTS, number), groups)
        self._settle(groups)
        return groups

    def _sampled(self, number: int) -> list[Group]:
        """Samples until enough groups differ in reward, at most `refill_rounds` rounds more."""
        groups: list[Group] = []
        missing = self.config.prompts_per_iteration or 0
        for refill in range(self.config.refill_rounds + 1):
            chosen = self.order.take(missing, self.allowed)
            found = self.collector.collect(chosen, number, refill)
            self._settle(found)
            groups += found
            missing -= len(self.informative(found))
            if missing == 0:
                break
        return groups

    def _settle(self, groups: list[Group]) -> None:
        """Decides from which completions the policy may learn, and punishes truncated ones."""
        config = self.config
        for sample in (s for group in groups for s in group):
            cut = not sample.finished and config.truncated == "mask"
            sample.trained = sample.score.trains and not cut
            penalty = 0.0 if sample.finished else config.truncation_penalty
            sample.reward = self._weighted(sample.parts) - penalty

    def _weighted(self, parts: dict[str, float]) -> float:
        reward = self.config.reward
        return sum(part.weight * parts[part.label] for part in reward.parts) if reward else 0.0

    def allowed(self, problem: int) -> bool:
        """Whether the curriculum has come to a problem."""
        return self.level is None or self.prepared.problems[problem].difficulty <= self.level

    def informative(self, groups: list[Group]) -> list[Group]:
        """The groups from which something can be learnt: those whose rewards differ."""
        if self.config.group_size == 1:
            return [group for group in groups if group[0].trained]
        if not groups:
            return []
        differs = varied_groups(*reward_table(groups, normalize=False))
        return [group for group, keep in zip(groups, differs, strict=True) if keep]

    def raise_level(self, groups: list[Group]) -> None:
        """Moves the curriculum on when the policy solves enough of its hardest prompts."""
        if self.level is None or self.config.curriculum is None:
            return
        problems = self.prepared.problems
        hardest = [
            s.score.status == "correct"
            for group in groups
            for s in group
            if s.score.trains and problems[s.problem].difficulty == self.level
        ]
        highest = max(problem.difficulty for problem in problems)
        if hardest and np.mean(hardest) >= self.config.curriculum.raise_at:
            self.level = min(self.level + 1, highest)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.state_dict(), "level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.level = state["level"]


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.jsonl"
