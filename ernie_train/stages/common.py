"""What every stage is given, and what its settings have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ernie_train.balance import BalanceConfig
from ernie_train.checkpoint import CheckpointConfig
from ernie_train.config import StrictConfig
from ernie_train.datasets import DataSource, Tokenizer
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.moe_health import MoeHealthConfig
from ernie_train.optim import OptimConfig
from ernie_train.runtime import StopFlag

PositiveInt = Annotated[int, Field(ge=1)]


class StageConfig(StrictConfig):
    """Settings that every kind of stage has."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    data: Annotated[list[DataSource], Field(min_length=1)]
    validation: list[DataSource] = []
    micro_batch_size: PositiveInt
    grad_accum_steps: PositiveInt = 1
    optim: OptimConfig
    balance: BalanceConfig = BalanceConfig()
    moe_health: MoeHealthConfig = MoeHealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validate_every_steps: PositiveInt | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01


@dataclass(frozen=True)
class StageData:
    """What a stage needs to read its data."""

    base_dir: Path  # relative paths of the recipe start here
    tokenizer: Tokenizer
    seed: int


@dataclass(frozen=True)
class StageRun:
    """What a stage is given: the model to train in place and where it may write."""

    data: StageData
    directory: Path
    model: Ernie4_5_MoeForCausalLM
    stop: StopFlag
    terminal: bool
