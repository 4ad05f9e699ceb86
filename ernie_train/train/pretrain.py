"""Pre-training and context extension on plain text: loss on every token of packed documents."""

from __future__ import annotations

from typing import Any, Literal

from ernie_train.train import supervised_data
from ernie_train.train.stage import StageData, StageRun
from ernie_train.train.supervised import PackedLoss, train
from ernie_train.train.supervised_data import Prepared, SupervisedConfig


class PretrainConfig(SupervisedConfig):
    """Settings of a pre-training stage; its data rows are texts."""

    kind: Literal["pretrain"]


def prepare(config: PretrainConfig, data: StageData) -> Prepared:
    """Reads and encodes the stage's texts."""
    return supervised_data.prepare(config, data, kind="pretrain", thinking=False)


def run(config: PretrainConfig, stage: StageRun, prepared: Prepared) -> dict[str, Any]:
    """Trains the stage from its latest checkpoint, or from the start."""
    return train(config, stage, prepared, PackedLoss("tokens"))
