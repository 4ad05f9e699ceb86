"""Settings, data and run of stages on given pairs of completions: DPO and reward models."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from rich.console import Console

from ernie_train.core.config import HARMLESS, PathText, PositiveInt
from ernie_train.data import MappedRows
from ernie_train.data.reader import prompts_of
from ernie_train.rl.preference_data import PromptReport, TokenizedPair, read_fitting_pairs
from ernie_train.train.loss_terms import BatchT, LossFn, ModelT
from ernie_train.train.moe_health import PromptProbe
from ernie_train.train.stage import StageConfig, StageData, StageRun
from ernie_train.train.step_loop import StepLoop


class PairStageConfig(StageConfig, MappedRows):
    """Settings of a stage that trains on given pairs.

    measured: metrics of held-out pairs. reads_margins: rows may say how much better one is.
    """

    measured: ClassVar[tuple[str, ...]] = ()
    reads_margins: ClassVar[bool] = False

    data: Annotated[PathText, Field(min_length=1), HARMLESS]
    """A path of rows with a prompt, a chosen and a rejected completion; for a reward model maybe a
    `margin` too.
    """
    validation: Annotated[PathText | None, Field(min_length=1), HARMLESS] = None
    """A path of held-out rows with the same columns, on which `checkpoint.best_metric` is measured.
    """
    validate_every_steps: Annotated[PositiveInt | None, HARMLESS] = None
    """Steps between two measurements on them; as often as checkpoints are written, unless given,
    and always at the end.
    """
    without: Annotated[PathText | None, Field(min_length=1), HARMLESS] = None
    """A file of held-out rows of the same columns, maybe that of `validation`: rows of `data` with
    a prompt of that file are left out (docs/data.md#held-out-rows).
    """
    seq_len: PositiveInt
    """Longest prompt with its completion; longer pairs are left out, with a notice."""
    steps: PositiveInt
    """Duration in optimizer steps."""
    pairs_per_step: PositiveInt
    """Pairs of an optimizer step."""

    @model_validator(mode="after")
    def _holds_pairs(self) -> PairStageConfig:
        if self.micro_batch_size < 2:
            raise ValueError("micro_batch_size must be at least 2: a pair goes through together")
        if self.seq_len < 2:
            raise ValueError("seq_len must hold a prompt and a completion")
        if self.validate_every_steps is not None and self.validation is None:
            raise ValueError("validate_every_steps needs validation pairs")
        if (best := self.checkpoint.best_metric) is None:
            return self
        if self.validation is None:
            raise ValueError("checkpoint.best_metric needs validation pairs")
        if best not in self.measured:
            known = ", ".join(self.measured)
            raise ValueError(f"checkpoint.best_metric={best!r} is not measured, only {known}")
        self.checkpoint.require_scores("validate_every_steps", self.validation_interval)
        return self

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must be able to hold, by setting."""
        return {"seq_len": self.seq_len}

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        found = (self.data, self.validation, self.without)
        return [path for path in found if path is not None]

    @property
    def validation_interval(self) -> int | None:
        """Return the steps between two validations; None without held-out pairs."""
        if self.validation is None:
            return None
        return self.validate_every_steps or self.checkpoint.every_steps

    @property
    def pairs_at_once(self) -> int:
        """Return the pairs of a micro-batch, which are never split."""
        return self.micro_batch_size // 2

    @property
    def micro_batches_per_step(self) -> int:
        return -(-self.pairs_per_step // self.pairs_at_once)


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs that fit the stage's length, and the held-out ones."""

    pairs: list[TokenizedPair]
    report: PromptReport
    validation: list[TokenizedPair] = field(default_factory=list)


class PairRun(StepLoop[ModelT, BatchT]):
    """The run of a stage on given pairs: `loss` trains `model`, of which the stage's is a part."""

    config: PairStageConfig

    def __init__(
        self,
        config: PairStageConfig,
        stage: StageRun,
        prepared: PreparedPairs,
        model: ModelT,
        loss: LossFn[ModelT, BatchT],
    ) -> None:
        self.prepared = prepared
        super().__init__(
            config,
            stage,
            model,
            loss,
            grad_accum_steps=config.micro_batches_per_step,
            steps=config.steps,
            validate_every=config.validation_interval,
        )

    def probe(self) -> PromptProbe:
        prompts = [pair.chosen.prompt_ids for pair in self.prepared.pairs]
        return PromptProbe.of(prompts, self.config.moe_health.probe_tokens)


def prepare(config: PairStageConfig, data: StageData) -> PreparedPairs:
    """Read and encode the stage's pairs; `DataError` where none fits."""
    read = partial(
        read_fitting_pairs,
        data=data,
        max_prompt_tokens=config.seq_len - 1,
        max_new_tokens=config.seq_len - 1,
        max_tokens=config.seq_len,
        max_bad_fraction=config.max_bad_fraction,
        columns=config.columns,
        with_margin=config.reads_margins,
    )
    without = None
    if config.without is not None:
        held_out_path = data.base_dir / config.without
        without = str(held_out_path), prompts_of(held_out_path, "auto", config.columns)
    pairs, facts, warnings = read(config.data, without=without)
    held_out: list[TokenizedPair] = []
    if config.validation is not None:
        held_out, facts["validation"], more = read(config.validation)
        warnings += more
    return PreparedPairs(pairs, PromptReport([], facts, warnings), held_out)


def describe(
    config: PairStageConfig, data: StageData, prepared: PreparedPairs, console: Console
) -> None:
    """Print the size of a step."""
    held_out = f"; validation: {len(prepared.validation)} pairs" if prepared.validation else ""
    console.print(
        f"a step trains {config.pairs_per_step} of {len(prepared.pairs)} pairs; "
        f"steps: {config.steps}{held_out}",
        highlight=False,
    )
