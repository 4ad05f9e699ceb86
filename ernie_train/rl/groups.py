"""Where an RL stage's groups of completions come from: sampling, refills, curriculum, replay."""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.losses import varied_groups
from ernie_train.rewards.scoring import ComposedReward
from ernie_train.rl.batch import reward_table
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.data import PreparedPrompts
from ernie_train.rl.rollout import (
    Collector,
    Group,
    PromptOrder,
    SamplingSettings,
    read_rollout,
    rollout_file,
    write_rollout,
)
from ernie_train.train.stage import StageRun

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
        groups: list[Group] = []
        if config.replay_rollouts is not None:
            directory = self.stage.data.base_dir / config.replay_rollouts
            with consensus.fail_together():
                groups = read_rollout(rollout_file(directory, number))
        else:
            groups = self._sampled(number)
        if config.dump_rollouts:
            with consensus.fail_together():
                if process_group.is_main():
                    write_rollout(rollout_file(self.stage.directory / ROLLOUTS, number), groups)
        self.settle(groups)
        return groups

    def _sampled(self, number: int) -> list[Group]:
        """Samples until enough groups differ in reward, at most `refill_rounds` rounds more."""
        groups: list[Group] = []
        missing = self.config.prompts_per_iteration or 0
        for refill in range(self.config.refill_rounds + 1):
            chosen = self.order.take(missing, self.allowed)
            found = self.collector.collect(chosen, number, refill)
            self.settle(found)
            groups += found
            missing -= len(self.informative(found))
            if missing == 0:
                break
        return groups

    def settle(self, groups: list[Group]) -> None:
        """Decides from which completions the policy may learn, and punishes truncated ones."""
        config = self.config
        for sample in (s for group in groups for s in group):
            cut = not sample.finished and config.truncated == "mask"
            sample.trained = sample.score.trains and not cut
            penalty = 0.0 if sample.finished else config.truncation_penalty
            sample.reward = sample.value - penalty

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
        if hardest and np.mean(hardest) >= self.config.curriculum.raise_at:
            harder = {p.difficulty for p in problems if p.difficulty > self.level}
            self.level = min(harder, default=self.level)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order.state_dict(), "level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.level = state["level"]
