"""Inputs of every stage, and the settings that all kinds of stage share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from ernie_train.core.config import HARMLESS, PositiveInt, StrictConfig
from ernie_train.core.signals import StopFlag
from ernie_train.data import Tokenizer
from ernie_train.io.loggers import LoggerSettings
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.lora import LoraConfig
from ernie_train.model.partial import Selection, select
from ernie_train.train.moe_balance import BalanceConfig
from ernie_train.train.moe_health import MoeHealthConfig
from ernie_train.train.optimizer import OptimConfig
from ernie_train.weights.checkpoint import CheckpointConfig


class Gate(StrictConfig):
    """Bar on the recipe's held-out problems that the model must pass before the next stage.

    metric: eval/<task>, eval/<domain> or eval/mean, the share of problems solved.
    max_regression: how far any domain may fall below its value before the stage.
    """

    metric: Annotated[str, Field(pattern=r"^eval/.+$")]
    at_least: Annotated[float, Field(ge=0, le=1)]
    max_regression: Annotated[float, Field(ge=0, le=1)] | None = None


class StageConfig(StrictConfig):
    """Settings that every kind of stage has.

    lora: pairs of matrices train beside a frozen model; they are merged when the stage ends.
    train: names of parameters, or parts of names, that train; all by default, none beside `lora`.
    freeze: those that do not.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]
    micro_batch_size: PositiveInt
    optim: OptimConfig
    lora: LoraConfig | None = None
    train: list[str] = []
    freeze: list[str] = []
    balance: BalanceConfig = BalanceConfig()
    moe_health: Annotated[MoeHealthConfig, HARMLESS] = MoeHealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), HARMLESS] = 0.01
    gate: Annotated[Gate | None, HARMLESS] = None

    @field_validator("train", "freeze", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def selection(self, shapes: Mapping[str, tuple[int, ...]]) -> Selection | None:
        """Return what trains of a model with parameters of these shapes; None: all of it.

        Raises `ConfigError` as `select` does.
        """
        if self.lora is None and not self.train and not self.freeze:
            return None
        return select(shapes, self.lora, self.train, self.freeze)


@dataclass(frozen=True)
class StageData:
    """Inputs for reading a stage's data."""

    base_dir: Path  # relative paths of the recipe start here
    tokenizer: Tokenizer
    seed: int


@dataclass(frozen=True)
class StageRun:
    """Inputs for running a stage: the model to train in place and the directory to write to."""

    data: StageData
    directory: Path
    model: Ernie4_5_MoeForCausalLM
    stop: StopFlag
    terminal: bool
    loggers: LoggerSettings | None = None  # VisualDL alone
