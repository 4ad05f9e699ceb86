"""The kinds of stage: for each its settings, how it reads its data and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field
from rich.console import Console, RenderableType

from ernie_train.stages import dpo, packed, pretrain, sft, upo, upo_data
from ernie_train.stages.common import StageData, StageRun
from ernie_train.stages.dpo import DpoConfig
from ernie_train.stages.pretrain import PretrainConfig
from ernie_train.stages.sft import SftConfig
from ernie_train.stages.upo_config import UpoConfig

AnyStageConfig = Annotated[
    PretrainConfig | SftConfig | DpoConfig | UpoConfig, Field(discriminator="kind")
]


class Report(Protocol):
    """What is told of a stage's data."""

    def as_table(self) -> RenderableType: ...

    def to_dict(self) -> dict[str, Any]: ...


class Prepared(Protocol):
    """What `prepare` hands to `run`, which alone knows the rest of it."""

    @property
    def report(self) -> Report: ...


class StageKind(NamedTuple):
    """prepare reads the data; describe tells what will be trained; run trains."""

    prepare: Callable[[Any, StageData], Prepared]
    describe: Callable[[Any, StageData, Any, Console], None]
    run: Callable[[Any, StageRun, Any], dict[str, Any]]


STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(pretrain.prepare, packed.describe, pretrain.run),
    "sft": StageKind(sft.prepare, packed.describe, sft.run),
    "dpo": StageKind(dpo.prepare, dpo.describe, dpo.run),
    "upo": StageKind(upo_data.prepare, upo_data.describe, upo.run),
}

__all__ = [
    "STAGES",
    "AnyStageConfig",
    "DpoConfig",
    "Prepared",
    "PretrainConfig",
    "SftConfig",
    "StageData",
    "StageKind",
    "StageRun",
    "UpoConfig",
]
