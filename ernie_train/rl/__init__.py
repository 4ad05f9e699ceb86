"""Reinforcement learning with UPO (PPO joined with preference learning), DPO, reward models.

An iteration samples groups of completions, scores them, turns rewards into advantages and pairs,
and updates the policy; docs/upo.md describes the algorithm and its settings.
"""

from ernie_train.rl.config import UpoConfig
from ernie_train.rl.dpo import DpoConfig
from ernie_train.rl.reward import RewardModelConfig

__all__ = [
    "DpoConfig",
    "RewardModelConfig",
    "UpoConfig",
]
