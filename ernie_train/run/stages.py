"""The table of stage kinds: for each kind its settings and the functions that run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field
from rich.console import Console, RenderableType

from ernie_train.rl import data as rl_data
from ernie_train.rl import dpo, loop, pair_stage, reward
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.dpo import DpoConfig
from ernie_train.rl.reward import RewardModelConfig
from ernie_train.train import supervised, supervised_data
from ernie_train.train.stage import StageData, StageRun
from ernie_train.train.supervised_data import PretrainConfig, SftConfig

AnyStageConfig = Annotated[
    PretrainConfig | SftConfig | DpoConfig | RewardModelConfig | UpoConfig,
    Field(discriminator="kind"),
]


class Report(Protocol):
    """Summary of a stage's data, for the terminal and for `data_report.json`."""

    def as_table(self) -> RenderableType: ...

    def to_dict(self) -> dict[str, Any]: ...


class Prepared(Protocol):
    """Result of `prepare`, for `describe` and `run`; the rest of it is private to the kind."""

    @property
    def report(self) -> Report: ...


class StageKind(NamedTuple):
    """Functions of a kind of stage, each given the stage's settings first.

    prepare: read the data.
    describe: print what a step trains on; for `check`.
    run: train the model in place; return the result: the last step and its checkpoint.
    """

    prepare: Callable[[Any, StageData], Prepared]
    describe: Callable[[Any, StageData, Any, Console], None]
    run: Callable[[Any, StageRun, Any], dict[str, Any]]


_SUPERVISED = StageKind(supervised_data.prepare, supervised_data.describe, supervised.run)
STAGES: dict[str, StageKind] = {
    "pretrain": _SUPERVISED,
    "sft": _SUPERVISED,
    "dpo": StageKind(pair_stage.prepare, pair_stage.describe, dpo.run),
    "reward": StageKind(pair_stage.prepare, pair_stage.describe, reward.run),
    "upo": StageKind(rl_data.prepare, rl_data.describe, loop.run),
}

__all__ = [
    "STAGES",
    "AnyStageConfig",
    "DpoConfig",
    "Prepared",
    "PretrainConfig",
    "RewardModelConfig",
    "SftConfig",
    "StageData",
    "StageKind",
    "StageRun",
    "UpoConfig",
]
