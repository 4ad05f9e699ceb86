"""Settings and data of pre-training and SFT: documents packed into rows, phase after phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console

from ernie_train.core.config import HARMLESS, PositiveInt
from ernie_train.core.errors import DataError
from ernie_train.data import (
    ChatTraining,
    ConsecutiveLoaders,
    DataReport,
    DataSource,
    Documents,
    PackedLoader,
    load_sources,
    preview,
    refit,
)
from ernie_train.train.rope_schedule import Phase, RopePhase, check_rising, resolve
from ernie_train.train.stage import StageConfig, StageData
from ernie_train.weights.checkpoint_config import CheckpointConfig

VALIDATION_LOSS = "validation_loss"  # the metric, in nats per trained token


class SupervisedConfig(StageConfig):
    """Settings that pre-training and SFT share.

    A step trains `grad_accum_steps` micro-batches, on all ranks together.

    Its rows have one length, `seq_len`, for `steps` or `epochs`; or `rope_schedule` gives the
    length, the duration and RoPE's base of each of its phases.
    """

    data: Annotated[list[DataSource], Field(min_length=1)]
    """Files to train on, mixed by weight."""
    validation: list[DataSource] = []
    """Files whose loss is measured during the stage."""
    grad_accum_steps: PositiveInt = 1
    """Micro-batches of a step, on all ranks together."""
    validate_every_steps: Annotated[PositiveInt | None, HARMLESS] = None
    """Steps between two measurements of `validation`; as often as checkpoints are written, unless
    given, and always at the end.
    """
    seq_len: PositiveInt | None = None
    """Tokens of a row, into which documents are packed."""
    epochs: PositiveInt | None = None
    """Duration in passes over the data; give this, `steps` or a `rope_schedule`."""
    steps: PositiveInt | None = None
    """Duration in optimizer steps."""
    rope_schedule: list[RopePhase] | None = None
    """Phases with their own RoPE base, length and duration, in place of `seq_len` and `steps`."""

    @model_validator(mode="after")
    def _consistent(self) -> SupervisedConfig:
        if self.rope_schedule is not None:
            self._check_schedule(self.rope_schedule)
        elif self.seq_len is None:
            raise ValueError("seq_len must be given, or a rope_schedule")
        elif (self.epochs is None) == (self.steps is None):
            remedy = "" if self.steps is None else "; epochs=null takes epochs away"
            raise ValueError(f"exactly one of epochs and steps must be given{remedy}")
        if self.validate_every_steps is not None and not self.validation:
            raise ValueError("validate_every_steps needs validation data")
        self._check_best_metric(self.checkpoint)
        return self

    def _check_best_metric(self, checkpoint: CheckpointConfig) -> None:
        if checkpoint.best_metric is None:
            return
        if checkpoint.best_metric != VALIDATION_LOSS:
            raise ValueError(
                f"checkpoint.best_metric={checkpoint.best_metric!r} is not measured in this stage, "
                f"only {VALIDATION_LOSS}"
            )
        if not self.validation:
            raise ValueError("checkpoint.best_metric needs validation data")
        checkpoint.require_scores("validate_every_steps", self.validation_interval)

    @property
    def validation_interval(self) -> int | None:
        """Return the steps between two validations; None without validation data."""
        if not self.validation:
            return None
        return self.validate_every_steps or self.checkpoint.every_steps

    def _check_schedule(self, schedule: list[RopePhase]) -> None:
        if not schedule:
            raise ValueError("rope_schedule needs at least one phase")
        for name in ("seq_len", "steps", "epochs"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect beside rope_schedule: its phases say it")
        check_rising(schedule)

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        sources = (*self.data, *self.validation)
        held_out = [source.without for source in sources if source.without is not None]
        return [source.path for source in sources] + held_out

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must support, by setting."""
        if self.rope_schedule is None:
            return {"seq_len": self.longest_seq_len}
        return {
            f"rope_schedule.{at}.seq_len": phase.seq_len
            for at, phase in enumerate(self.rope_schedule)
        }

    def phases(self) -> list[Phase]:
        """Return the phases of the stage; a stage without a schedule is one."""
        if self.rope_schedule is None:
            return [Phase(self.longest_seq_len, self.micro_batch_size)]
        rows, accumulated = self.micro_batch_size, self.grad_accum_steps
        return [resolve(phase, rows, accumulated) for phase in self.rope_schedule]

    @property
    def longest_seq_len(self) -> int:
        return self.rope_schedule[-1].seq_len if self.rope_schedule else int(self.seq_len or 0)


class PretrainConfig(SupervisedConfig):
    """Settings of a pre-training stage: loss on every token; its data rows are texts."""

    kind: Literal["pretrain"]
    """Next-token prediction on all tokens of documents."""


class SftConfig(SupervisedConfig):
    """Settings of an SFT stage: loss on the assistant's tokens; its data rows are conversations."""

    kind: Literal["sft"]
    """Supervised fine-tuning on the turns of the assistant in conversations."""
    normalization: Literal["tokens", "token_balanced"] = "tokens"
    """`tokens` weighs every trained token alike, `token_balanced` every sample."""
    train_turns: Literal["all", "last"] = "all"
    """Trains every turn of the assistant (`all`) or the `last` one alone."""
    train_reasoning: bool = True
    """`false` trains answers alone; their reasoning stays in the context."""

    @property
    def chat_training(self) -> ChatTraining:
        return ChatTraining(self.train_turns, self.train_reasoning)


@dataclass(frozen=True)
class SupervisedData:
    """A stage's data: one `Documents` per source, their report, and the validation documents.

    `loaders` hold the documents of each phase, packed for its sequence length.
    """

    documents: list[Documents]
    report: DataReport
    validation: list[Documents]
    loaders: list[PackedLoader]


def prepare(config: PretrainConfig | SftConfig, data: StageData) -> SupervisedData:
    """Read, encode and pack the stage's data. `DataError` names the rows that are wrong."""

    def read(sources: list[DataSource]) -> tuple[list[Documents], DataReport]:
        return load_sources(
            sources,
            data.tokenizer,
            kind=config.kind,
            seq_len=config.longest_seq_len,
            base_dir=data.base_dir,
            training=config.chat_training if isinstance(config, SftConfig) else None,
            max_bad_fraction=config.max_bad_fraction,
            seed=data.seed,
        )

    documents, report = read(config.data)
    validation = read(config.validation)[0] if config.validation else []
    prepared = SupervisedData(documents, report, validation, _loaders(config, data, documents))
    steps, warmup = total_steps(config, prepared), config.optim.warmup_steps
    if config.epochs is not None and warmup >= steps:  # recipe_warnings knows steps that are given
        report.warnings.append(
            f"stages.{config.name}.optim.warmup_steps={warmup} does not end within the {steps} "
            f"steps of {config.epochs} epochs: the rate never reaches lr"
        )
    return prepared


def _loaders(
    config: PretrainConfig | SftConfig, data: StageData, documents: list[Documents]
) -> list[PackedLoader]:
    loaders, before = [], None
    for index, phase in enumerate(config.phases()):
        fitted = [
            refit(part, source, config.kind, phase.seq_len)
            for part, source in zip(documents, config.data, strict=True)
        ]
        if before is not None and phase.seq_len > before:
            _require_longer(fitted, before, f"{index}.seq_len={phase.seq_len}")
        if phase.upsample is not None:
            bound = phase.upsample.longer_than
            _require_longer(fitted, bound, f"{index}.upsample.longer_than={bound}")
        weights = [source.weight for source in config.data]
        before = phase.seq_len
        loaders.append(
            PackedLoader(
                *_upsampled(fitted, weights, phase),
                seq_len=phase.seq_len,
                micro_batch_size=phase.micro_batch_size,
                seed=data.seed + 101 * index,  # each phase shuffles differently
                epochs=None,
                pad_id=data.tokenizer.pad_token_id,
            )
        )
    return loaders


def _require_longer(documents: Sequence[Documents], bound: int, setting: str) -> None:
    longest = max((int(part.lengths.max()) for part in documents if len(part)), default=0)
    if longest <= bound:
        raise DataError(
            f"rope_schedule.{setting}: no document is longer than {bound} tokens (the longest has "
            f"{longest}), so there is nothing to learn at that length; add longer documents"
        )


def _upsampled(
    documents: list[Documents], weights: list[float], phase: Phase
) -> tuple[list[Documents], list[float]]:
    """Split the long documents of each source off, as a source with a higher weight."""
    if phase.upsample is None:
        return documents, weights
    parts, shares = [], []
    for part, weight in zip(documents, weights, strict=True):
        long = part.lengths > phase.upsample.longer_than
        for chosen, factor in ((~long, 1.0), (long, phase.upsample.factor)):
            if np.any(chosen):
                parts.append(part.select(chosen))
                shares.append(weight * factor)
    return parts, shares


def total_steps(config: SupervisedConfig, prepared: SupervisedData) -> int:
    """Return the optimizer steps of the stage.

    A last partial step is filled up with batches of the epoch after the last.
    """
    if config.rope_schedule is not None:
        return sum(phase.steps or 0 for phase in config.phases())
    if config.epochs is None:
        return int(config.steps or 0)
    batches = sum(prepared.loaders[0].batches_per_epoch(epoch) for epoch in range(config.epochs))
    return -(-batches // config.grad_accum_steps)


def describe(
    config: SupervisedConfig, data: StageData, prepared: SupervisedData, console: Console
) -> None:
    """Print the size of a step of each phase, and a row as it will be trained."""
    for phase in config.phases():
        rows = phase.micro_batch_size * config.grad_accum_steps
        base = "" if phase.rope_theta is None else f", RoPE base {phase.rope_theta:g}"
        base += " at its end" if phase.smooth else ""
        console.print(
            f"a step trains {rows} rows of {phase.seq_len} tokens ({rows * phase.seq_len} at most) "
            f"in {config.grad_accum_steps} micro-batches; steps: "
            f"{phase.steps or total_steps(config, prepared)}{base}",
            highlight=False,
        )
    if prepared.validation:
        console.print(
            f"validation: {sum(map(len, prepared.validation))} documents, every "
            f"{config.validation_interval} steps and at the end",
            highlight=False,
        )
    first = next(documents[0] for documents in prepared.documents if len(documents))
    console.print(
        "the first row, trained tokens in green or between ⟦ and ⟧ (ernie-train preview shows any):"
    )
    console.print(preview(data.tokenizer, first, console=console))


def batch_source(config: SupervisedConfig, prepared: SupervisedData) -> ConsecutiveLoaders:
    """Return the batches of all phases; those of the last one never end."""
    batches = [
        None if phase.steps is None else phase.steps * config.grad_accum_steps
        for phase in config.phases()
    ]
    return ConsecutiveLoaders(prepared.loaders, batches)
