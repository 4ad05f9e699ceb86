"""A costlier reward beside a stage's own: it judges a share of the prompts of each iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

from ernie_train.rewards.scoring import ComposedReward, ComposedScore, build_reward
from ernie_train.rl.config import SharedReward, UpoConfig
from ernie_train.rl.data import Prompt
from ernie_train.rl.reward import RewardModelScorer, load_scorers
from ernie_train.rl.rollout.grading import Answer, grade
from ernie_train.rl.rollout.records import PromptGroup
from ernie_train.train.stage import StageRun


@dataclass(frozen=True)
class SecondReward:
    """Grades the completions of a share of the prompts of each iteration."""

    share: float
    reward: ComposedReward
    scorers: Mapping[str, RewardModelScorer]
    prompts: Sequence[Prompt]
    stage: StageRun

    def places(self, first: int, count: int) -> list[int]:
        """Return which of `count` groups are judged; `first` groups have been dealt with before.

        They are evenly spread, so that a share of an eighth is one group of eight.
        """
        numbers = range(first, first + count)
        return [n - first for n in numbers if floor((n + 1) * self.share) > floor(n * self.share)]

    def scores(self, groups: Sequence[PromptGroup]) -> list[list[ComposedScore]]:
        """Return the scores of all completions of groups."""
        answers = [Answer(c.prompt, c.text, c.num_sampled) for group in groups for c in group]
        found = iter(grade(self.reward, self.scorers, answers, self.prompts, self.stage))
        return [[next(found) for _ in group] for group in groups]

    def audited(self, groups: Sequence[PromptGroup], first: int) -> list[PromptGroup]:
        """Return groups with this reward in place of the stage's own where it is their turn."""
        places = self.places(first, len(groups))
        graded = list(groups)
        for at, scores in zip(places, self.scores([groups[at] for at in places]), strict=True):
            graded[at] = [
                replace(
                    completion,
                    score=composed.score,
                    raw_reward=composed.value,
                    reward_parts={f"audit/{name}": v for name, v in composed.parts.items()},
                )
                for completion, composed in zip(groups[at], scores, strict=True)
            ]
        return graded


def second_rewards(
    config: UpoConfig, prompts: Sequence[Prompt], stage: StageRun, dtype: str
) -> tuple[SecondReward | None, SecondReward | None]:
    """Return the rewards of a recipe that audit prompts and that rank pairs, if it has them."""
    pair_reward = config.preference.pair_reward if config.preference is not None else None

    def built(settings: SharedReward | None) -> SecondReward | None:
        if settings is None:
            return None
        reward = build_reward(settings, stage.data.base_dir)
        scorers = load_scorers(settings.parts, stage.data.base_dir, dtype)
        return SecondReward(settings.share, reward, scorers, prompts, stage)

    return built(config.audit_reward), built(pair_reward)
