"""Inputs of every stage, and the settings that all kinds of stage share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from ernie_train.weights.checkpoint_config import CheckpointConfig


class Gate(StrictConfig):
    """Bar on the recipe's held-out problems that the model must pass before the next stage."""

    metric: Annotated[str, Field(pattern=r"^eval/.+$")]
    """`eval/<task>`, `eval/<domain>` or `eval/mean` of the recipe's `evaluation`; in a stage of
    kind `reward` its own `eval/accuracy`.
    """
    at_least: Annotated[float, Field(ge=0, le=1)]
    """Share of problems that must be solved, or of held-out pairs that must be ranked rightly."""
    max_regression: Annotated[float, Field(ge=0, le=1)] | None = None
    """How far any domain may fall below its value before the stage."""


class StageConfig(StrictConfig):
    """Settings that every kind of stage has."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100)]
    """Name of the stage, and of its directory `NN-NAME`."""
    micro_batch_size: PositiveInt
    """Rows (sequences in RL) of one forward and backward pass."""
    optim: OptimConfig
    """Optimizer and learning rate."""
    lora: LoraConfig | None = None
    """Pairs of matrices of low rank train beside a frozen model, and are merged when the stage ends
    (docs/lora.md).
    """
    train: list[str] = []
    """Names of parameters, or parts of names, that train: all, unless given; beside `lora` none,
    unless given.
    """
    freeze: list[str] = []
    """Names of parameters that do not train, and take no LoRA pair."""
    balance: BalanceConfig = BalanceConfig()
    """Terms and updates that keep the experts in use."""
    moe_health: Annotated[MoeHealthConfig, HARMLESS] = MoeHealthConfig()
    """The experts' metrics and warnings."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, which are kept, which one the stage hands on."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), HARMLESS] = 0.01
    """Share of unreadable rows of a source above which it is refused."""
    gate: Annotated[Gate | None, HARMLESS] = None
    """What the model must solve before the next stage."""

    @field_validator("train", "freeze", mode="before", json_schema_input_type=str | list[str])
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
    # Hashes of the weights that the model has, of what they were made from, and of the data.
    inputs: Mapping[str, str] = field(default_factory=dict)

    def stop_requested(self) -> bool:
        """Return whether a signal asks the run to stop, as loops and samplers poll it."""
        return self.stop.requested
