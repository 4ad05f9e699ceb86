"""Grading at scale: a recipe's reward composed of parts, and workers that grade in parallel."""

from ernie_train.rewards.scoring.composition import (
    ComposedReward,
    ComposedScore,
    RewardConfig,
    RewardPart,
    ScoredBatch,
    build_reward,
)
from ernie_train.rewards.scoring.reference_completion import gold_completion
from ernie_train.rewards.scoring.selfcheck import check_canaries
from ernie_train.rewards.scoring.service import ScoringReport, ScoringService, score_batch

__all__ = [
    "ComposedReward",
    "ComposedScore",
    "RewardConfig",
    "RewardPart",
    "ScoredBatch",
    "ScoringReport",
    "ScoringService",
    "build_reward",
    "check_canaries",
    "gold_completion",
    "score_batch",
]
