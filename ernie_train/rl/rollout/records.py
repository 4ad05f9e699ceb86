"""Scored completions of an iteration's prompts, and what they are worth for an update.

Shapes: P prompts, G completions of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_train.losses import varied_groups
from ernie_train.rewards.score import Score
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.config import RolloutConfig


@dataclass(frozen=True, eq=False)
class ScoredCompletion(TokenizedCompletion):
    """A completion of a prompt of the stage, with its verdict and what sampling knew of it.

    `raw_reward` is the sum of the reward's parts, without what the stage subtracts.
    """

    prompt: int  # index among the stage's prompts
    domain: str
    task: str
    text: str
    finished: bool
    score: Score
    raw_reward: float
    reward_parts: dict[str, float]
    turns: list[dict[str, Any]] | None = None  # and the results of tools; None without any
    sampled_logprobs: np.ndarray | None = None  # float32 [sampled tokens]


PromptGroup = Sequence[ScoredCompletion]


@dataclass(frozen=True)
class Rollout:
    """An iteration's groups with their rewards, and which of them the policy may learn from.

    rewards [P,G] is the raw reward less the penalty for length; marks [P,G] what the verifier alone
    gave; valid [P,G] says which completions have a verdict and are not masked; informative [P]
    which groups differ in the verifier's mark: a part that stands beside it, such as format, makes
    no group informative.
    """

    groups: list[PromptGroup]
    rewards: np.ndarray
    marks: np.ndarray
    valid: np.ndarray
    informative: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[PromptGroup], config: RolloutConfig) -> Rollout:
        """Judge groups once: penalties, masks, and which groups are worth an update."""
        shape = (len(groups), len(groups[0]) if groups else config.group_size)
        masks = config.truncated == "mask"
        flat = [c for group in groups for c in group]
        rewards = [
            c.raw_reward - config.length_penalty(len(c.completion_ids), finished=c.finished)
            for c in flat
        ]
        valid = [c.score.trains and not (masks and not c.finished) for c in flat]
        reward_table = np.array(rewards, np.float64).reshape(shape)
        marks = np.array([c.score.value for c in flat], np.float64).reshape(shape)
        valid_table = np.array(valid, bool).reshape(shape)
        if not groups:
            informative = np.zeros(0, bool)
        elif shape[1] == 1:
            informative = valid_table[:, 0]
        else:
            informative = varied_groups(marks, valid_table)
        return cls(list(groups), reward_table, marks, valid_table, informative)

    def completions(self) -> list[ScoredCompletion]:
        """Return all completions, group after group."""
        return [completion for group in self.groups for completion in group]

    def trained(self, *, every_group: bool) -> np.ndarray:
        """Return which completions the policy learns from, bool [P,G].

        They are the valid ones of informative groups, or of `every_group`.
        """
        return self.valid & (self.informative[:, None] | every_group)
