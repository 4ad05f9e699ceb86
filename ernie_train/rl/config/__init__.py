"""Settings of an RL stage: rollouts, policy, critic, preference pairs.

Each module holds the settings of one part; `upo` joins them and checks them against each other.
"""

from ernie_train.rl.config.idle import settings_without_effect
from ernie_train.rl.config.policy import (
    Aggregation,
    CriticConfig,
    KlConfig,
    PolicyConfig,
    SamplerCorrectionConfig,
)
from ernie_train.rl.config.preference import (
    HintConfig,
    OfflinePairs,
    PairLoss,
    PairSource,
    PreferenceConfig,
    SharedReward,
)
from ernie_train.rl.config.rollout import (
    Curriculum,
    PromptSource,
    RolloutConfig,
    SkipSolved,
    StageEvaluation,
)
from ernie_train.rl.config.upo import UpoConfig

__all__ = [
    "Aggregation",
    "CriticConfig",
    "Curriculum",
    "HintConfig",
    "KlConfig",
    "OfflinePairs",
    "PairLoss",
    "PairSource",
    "PolicyConfig",
    "PreferenceConfig",
    "PromptSource",
    "RolloutConfig",
    "SamplerCorrectionConfig",
    "SharedReward",
    "SkipSolved",
    "StageEvaluation",
    "UpoConfig",
    "settings_without_effect",
]
