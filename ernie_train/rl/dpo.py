"""Direct preference optimization on given pairs: UPO with nothing but its preference term."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from rich.console import Console

from ernie_train.core.config import PositiveInt
from ernie_train.rl import data as rl_data
from ernie_train.rl import loop
from ernie_train.rl.config import OfflinePairs, UpoConfig
from ernie_train.rl.data import PreparedPrompts
from ernie_train.train.stage import StageConfig, StageData, StageRun


class DpoConfig(StageConfig):
    """DPO (arXiv:2305.18290); the reference is the policy at the stage's start.

    data: a file, or a directory of them, of rows with a prompt, a chosen and a rejected completion.
    seq_len: longest prompt with its completion; pairs beyond it are left out.
    """

    kind: Literal["dpo"]
    data: Annotated[str, Field(min_length=1)]
    seq_len: PositiveInt
    steps: PositiveInt
    pairs_per_step: PositiveInt
    beta: Annotated[float, Field(gt=0)] = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> DpoConfig:
        if self.micro_batch_size < 2:
            raise ValueError("micro_batch_size must be at least 2: a pair goes through together")
        if self.checkpoint.best_metric is not None:
            raise ValueError("checkpoint.best_metric has no effect: a dpo stage measures none")
        if self.seq_len < 2:
            raise ValueError("seq_len must hold a prompt and a completion")
        return self

    def as_upo(self) -> UpoConfig:
        """The same stage as UPO settings."""
        shared = {name: getattr(self, name) for name in StageConfig.model_fields}
        return UpoConfig(
            **shared,
            kind="upo",
            iterations=self.steps,
            max_prompt_tokens=self.seq_len - 1,
            max_new_tokens=self.seq_len - 1,
            max_pair_tokens=self.seq_len,
            policy_coef=0.0,
            preference_coef=1.0,
            beta=self.beta,
            pairs="offline",
            offline=OfflinePairs(path=self.data, per_iteration=self.pairs_per_step),
        )

    def lengths(self) -> dict[str, int]:
        """The sequence lengths that the model must be able to hold, by setting."""
        return {"seq_len": self.seq_len}

    def paths(self) -> list[str]:
        """Every file or directory that the stage reads."""
        return [self.data]


def prepare(config: DpoConfig, data: StageData) -> PreparedPrompts:
    """Reads and encodes the stage's pairs."""
    return rl_data.prepare(config.as_upo(), data)


def describe(
    config: DpoConfig, data: StageData, prepared: PreparedPrompts, console: Console
) -> None:
    """Prints what a step is."""
    console.print(
        f"a step trains {config.pairs_per_step} of {len(prepared.offline)} pairs; "
        f"steps: {config.steps}",
        highlight=False,
    )


def run(config: DpoConfig, stage: StageRun, prepared: PreparedPrompts) -> dict[str, Any]:
    """Trains the stage from its latest checkpoint, or from the start."""
    return loop.run(config.as_upo(), stage, prepared)
