"""Pre-training and context extension on plain text: loss on every token of packed documents."""

from __future__ import annotations

from typing import Any, Literal

from ernie_train.stages import packed
from ernie_train.stages.common import StageData, StageRun
from ernie_train.stages.packed import Prepared, SupervisedConfig
from ernie_train.stages.supervised import PackedLoss, train


class PretrainConfig(SupervisedConfig):
    """Settings of a pre-training stage; its data rows are texts."""

    kind: Literal["pretrain"]


def prepare(config: PretrainConfig, data: StageData) -> Prepared:
    """Reads and encodes the stage's texts."""
    return packed.prepare(config, data, kind="pretrain", thinking=False)


def run(config: PretrainConfig, stage: StageRun, prepared: Prepared) -> dict[str, Any]:
    """Trains the stage from its latest checkpoint, or from the start."""
    return train(config, stage, prepared, PackedLoss("tokens"))
