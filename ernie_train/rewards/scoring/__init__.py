"""Compose a recipe's reward of parts, and grade completions in parallel processes."""

from ernie_train.rewards.scoring.composition import (
    ComposedReward,
    ComposedScore,
    RewardConfig,
    RewardModelPart,
    RewardPart,
    ScoredBatch,
    build_reward,
)
from ernie_train.rewards.scoring.reference_completion import build_reference_completion
from ernie_train.rewards.scoring.selfcheck import check_reward_on_reference_answers
from ernie_train.rewards.scoring.service import ScoringReport, ScoringService, score_batch
from ernie_train.rewards.scoring.worker_process import WorkerLost, WorkerProcess

__all__ = [
    "ComposedReward",
    "ComposedScore",
    "RewardConfig",
    "RewardModelPart",
    "RewardPart",
    "ScoredBatch",
    "ScoringReport",
    "ScoringService",
    "WorkerLost",
    "WorkerProcess",
    "build_reference_completion",
    "build_reward",
    "check_reward_on_reference_answers",
    "score_batch",
]
