"""The kinds of stage: for each its settings, how it reads its data and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field
from rich.console import Console, RenderableType

from ernie_train.rl import data as rl_data
from ernie_train.rl import dpo, loop
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.dpo import DpoConfig
from ernie_train.train import pretrain, sft, supervised_data
from ernie_train.train.pretrain import PretrainConfig
from ernie_train.train.sft import SftConfig
from ernie_train.train.stage import StageData, StageRun

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
    "pretrain": StageKind(pretrain.prepare, supervised_data.describe, pretrain.run),
    "sft": StageKind(sft.prepare, supervised_data.describe, sft.run),
    "dpo": StageKind(dpo.prepare, dpo.describe, dpo.run),
    "upo": StageKind(rl_data.prepare, rl_data.describe, loop.run),
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
