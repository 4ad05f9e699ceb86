"""The training loop, and pre-training and SFT on top of it.

`Trainer.fit` runs optimizer steps over any batches and any loss; a loss returns sums with their
counts, the trainer reduces them over micro-batches and ranks and divides once.
"""

from ernie_train.train.loss_terms import LossFn, LossOutput, LossTerm
from ernie_train.train.moe_balance import BalanceConfig, MoeBalance
from ernie_train.train.moe_health import MoeHealth, MoeHealthConfig
from ernie_train.train.optimizer import OptimConfig, Optimizer, learning_rate
from ernie_train.train.stage import Gate, StageConfig, StageData, StageRun
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import StepResult, Trainer

__all__ = [
    "BalanceConfig",
    "Gate",
    "LossFn",
    "LossOutput",
    "LossTerm",
    "MoeBalance",
    "MoeHealth",
    "MoeHealthConfig",
    "OptimConfig",
    "Optimizer",
    "PackedLoss",
    "StageConfig",
    "StageData",
    "StageRun",
    "StepResult",
    "Trainer",
    "learning_rate",
]
