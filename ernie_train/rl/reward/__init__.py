"""Reward models: a scalar head on a decoder, trained on pairs, and used as a part of a reward."""

from ernie_train.rl.reward.model import SCORE
from ernie_train.rl.reward.scoring import (
    RewardModelScorer,
    find_reward_model,
    find_score,
    load_scorers,
)
from ernie_train.rl.reward.stage import RewardModelConfig, run

__all__ = [
    "SCORE",
    "RewardModelConfig",
    "RewardModelScorer",
    "find_reward_model",
    "find_score",
    "load_scorers",
    "run",
]
