"""The kinds of stage: for each its settings, how it reads its data and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ernie_train.stages import pretrain, sft
from ernie_train.stages.common import StageData, StageRun
from ernie_train.stages.packed import Prepared, total_steps
from ernie_train.stages.pretrain import PretrainConfig
from ernie_train.stages.sft import SftConfig

AnyStageConfig = Annotated[PretrainConfig | SftConfig, Field(discriminator="kind")]


class StageKind(NamedTuple):
    prepare: Callable[[Any, StageData], Prepared]
    run: Callable[[Any, StageRun, Prepared], dict[str, Any]]


STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(pretrain.prepare, pretrain.run),
    "sft": StageKind(sft.prepare, sft.run),
}

__all__ = [
    "STAGES",
    "AnyStageConfig",
    "Prepared",
    "PretrainConfig",
    "SftConfig",
    "StageData",
    "StageKind",
    "StageRun",
    "total_steps",
]
