"""Supervised fine-tuning: loss on the assistant's tokens of packed conversations."""

from __future__ import annotations

from typing import Any, Literal

from ernie_train.train import supervised_data
from ernie_train.train.stage import StageData, StageRun
from ernie_train.train.supervised import PackedLoss, train
from ernie_train.train.supervised_data import Prepared, SupervisedConfig


class SftConfig(SupervisedConfig):
    """Settings of an SFT stage; its data rows are conversations."""

    kind: Literal["sft"]
    # tokens: every trained token weighs the same; token_balanced: every sample does.
    normalization: Literal["tokens", "token_balanced"] = "tokens"
    thinking: bool = True  # the Thinking chat format, or the plain one


def prepare(config: SftConfig, data: StageData) -> Prepared:
    """Reads and encodes the stage's conversations."""
    return supervised_data.prepare(config, data, kind="sft", thinking=config.thinking)


def run(config: SftConfig, stage: StageRun, prepared: Prepared) -> dict[str, Any]:
    """Trains the stage from its latest checkpoint, or from the start."""
    return train(config, stage, prepared, PackedLoss(config.normalization))
