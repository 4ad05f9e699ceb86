"""When a stage writes checkpoints, which it keeps and hands on, and when it ends early."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ernie_train.core.config import HARMLESS, PositiveInt, StrictConfig
from ernie_train.core.errors import ConfigError
from ernie_train.io.safetensors import parse_size


class CheckpointConfig(StrictConfig):
    """Set when checkpoints are written, which of them are kept and which one ends the stage."""

    every_steps: Annotated[int, HARMLESS] = Field(200, ge=1)
    """Optimizer steps, or iterations in RL, between checkpoints; there is one at the end too."""
    keep_last: Annotated[int, HARMLESS] = Field(2, ge=1)
    """Number of newest checkpoints that are kept."""
    best_metric: str | None = None
    """Keeps the checkpoint with the best value of it as well: `validation_loss` of `pretrain`,
    `sft` and `dpo`; `validation/accuracies` or `validation/margins` of `dpo`; `eval/accuracy`,
    `eval/margin` or `eval/loss` of `reward`; `eval/...` of a `upo` stage's `evaluation`.
    `every_steps` must be a multiple of the interval in which it is measured.
    """
    best_is: Literal["higher", "lower"] | None = None
    """`higher` or `lower`; `lower` for a loss and `higher` for anything else, unless given."""
    early_stopping_patience: PositiveInt | None = None
    """Ends the stage at the first checkpoint before which as many in a row, itself counted, had no
    better `best_metric` than one before them. The learning rate falls as if all steps were to come.
    """
    load_best_at_end: bool = False
    """The stage hands the best checkpoint on, to the next stage, to evaluation and export, instead
    of its last one. The intervals of checkpoints and validation, which say what is scored, then
    stay as a begun stage has them.
    """
    keep_optimizer: Annotated[bool, HARMLESS] = False
    """Keeps the optimizer state of the stage's checkpoints when the next stage begins; else it is
    removed, since nothing reads it then, and the stage cannot be trained on any more.
    """
    max_shard_size: Annotated[int | str, HARMLESS] = "5GB"
    """Largest weights file: a number of bytes, or `5GB`."""

    @model_validator(mode="after")
    def _best_of_something(self) -> CheckpointConfig:
        for key in ("load_best_at_end", "early_stopping_patience"):
            if getattr(self, key) and self.best_metric is None:
                raise ValueError(f"{key} needs best_metric: which one is the best")
        return self

    @property
    def depends_on_scores(self) -> bool:
        """Return whether the stage's result depends on which checkpoints have a score."""
        return self.load_best_at_end or self.early_stopping_patience is not None

    @property
    def higher_is_better(self) -> bool:
        metric = self.best_metric or ""
        return self.best_is == "higher" if self.best_is else not metric.endswith("loss")

    def require_scores(self, setting: str, interval: int | None) -> None:
        """Raise `ValueError` if `best_metric`, measured each `interval` steps, misses checkpoints.

        `setting` names the interval. The end of a stage has both a checkpoint and a measurement.
        """
        if interval is not None and self.every_steps % interval:
            raise ValueError(
                f"checkpoint.every_steps={self.every_steps} must be a multiple of {setting}="
                f"{interval}: checkpoints between have no value of best_metric={self.best_metric}"
            )

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: int | str) -> int | str:
        try:
            parse_size(value)
        except ConfigError as error:
            raise ValueError(error.problems[0]) from None
        return value
