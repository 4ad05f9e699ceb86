"""Preference optimization on given pairs: DPO (arXiv:2305.18290), IPO or SimPO.

A stage of its own: no sampling, no rewards, the trainer's loop over micro-batches of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import paddle
from pydantic import Field, model_validator
from rich.console import Console

from ernie_train import parallel
from ernie_train.core.config import HARMLESS, PathText, PositiveInt
from ernie_train.core.errors import CheckpointError
from ernie_train.data import MappedRows
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.partial import adapter_off
from ernie_train.rl.batch import (
    MicroBatch,
    RolloutBatch,
    TokenizedCompletion,
    micro_batches,
)
from ernie_train.rl.config import PairLoss
from ernie_train.rl.estimators import sequence_logprobs
from ernie_train.rl.loss import DpoLoss, PairTerm
from ernie_train.rl.preference_data import (
    OfflinePairSource,
    PromptReport,
    TokenizedPair,
    add_pairs,
    read_fitting_pairs,
)
from ernie_train.train.moe_health import PromptProbe
from ernie_train.train.optimizer import Optimizer
from ernie_train.train.stage import StageConfig, StageData, StageRun
from ernie_train.train.step_loop import StepLoop
from ernie_train.train.supervised_data import VALIDATION_LOSS
from ernie_train.train.trainer import Trainer
from ernie_train.weights.checkpoint import Checkpoint

VALIDATION_METRICS = (VALIDATION_LOSS, "validation/accuracies", "validation/margins")


class DpoConfig(StageConfig, MappedRows, PairLoss):
    """DPO and its kin; the reference is the policy at the stage's start."""

    sums_by_default: ClassVar[bool] = True

    kind: Literal["dpo"]
    """Preference optimization on pairs of completions (DPO and its kin)."""
    data: Annotated[PathText, Field(min_length=1), HARMLESS]
    """A path of rows with a prompt, a chosen and a rejected completion."""
    validation: Annotated[PathText, Field(min_length=1), HARMLESS] | None = None
    """A path of held-out rows with the same columns: `validation_loss`, `validation/accuracies` and
    `validation/margins`.
    """
    validate_every_steps: Annotated[PositiveInt | None, HARMLESS] = None
    """Steps between two measurements of them; as often as checkpoints are written, unless given,
    and always at the end.
    """
    seq_len: PositiveInt
    """Longest prompt with its completion; pairs beyond it are left out, and told."""
    steps: PositiveInt
    """Duration in optimizer steps."""
    pairs_per_step: PositiveInt
    """Pairs of an optimizer step."""

    @model_validator(mode="after")
    def _consistent(self) -> DpoConfig:
        if self.micro_batch_size < 2:
            raise ValueError("micro_batch_size must be at least 2: a pair goes through together")
        if self.validate_every_steps is not None and self.validation is None:
            raise ValueError("validate_every_steps needs validation: held-out pairs")
        if (best := self.checkpoint.best_metric) is not None:
            if self.validation is None:
                raise ValueError("checkpoint.best_metric needs validation: held-out pairs")
            if best not in VALIDATION_METRICS:
                known = ", ".join(VALIDATION_METRICS)
                raise ValueError(f"checkpoint.best_metric={best!r} is not measured, only {known}")
            self.checkpoint.require_scores("validate_every_steps", self.validation_interval)
        if self.seq_len < 2:
            raise ValueError("seq_len must hold a prompt and a completion")
        return self

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must be able to hold, by setting."""
        return {"seq_len": self.seq_len}

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        return [path for path in (self.data, self.validation) if path is not None]

    @property
    def validation_interval(self) -> int | None:
        """Return the steps between two validations; None without held-out pairs."""
        if self.validation is None:
            return None
        return self.validate_every_steps or self.checkpoint.every_steps

    @property
    def needs_reference(self) -> bool:
        """Return whether the stage's starting policy is kept beside the policy."""
        return self.loss != "simpo"

    @property
    def micro_batches_per_step(self) -> int:
        """Return how many; pairs are never split, so an odd micro_batch_size holds one less."""
        return -(-self.pairs_per_step // (self.micro_batch_size // 2))


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs that fit the stage's length, and the held-out ones."""

    pairs: list[TokenizedPair]
    report: PromptReport
    validation: list[TokenizedPair] = field(default_factory=list)


def prepare(config: DpoConfig, data: StageData) -> PreparedPairs:
    """Read and encode the stage's pairs; `DataError` where none fits."""
    read = partial(
        read_fitting_pairs,
        data=data,
        max_prompt_tokens=config.seq_len - 1,
        max_new_tokens=config.seq_len - 1,
        max_tokens=config.seq_len,
        max_bad_fraction=config.max_bad_fraction,
        columns=config.columns,
    )
    pairs, facts, warnings = read(config.data)
    held_out: list[TokenizedPair] = []
    if config.validation is not None:
        held_out, facts["validation"], more = read(config.validation)
        warnings += more
    return PreparedPairs(pairs, PromptReport([], facts, warnings), held_out)


def describe(config: DpoConfig, data: StageData, prepared: PreparedPairs, console: Console) -> None:
    """Print the size of a step."""
    console.print(
        f"a step trains {config.pairs_per_step} of {len(prepared.pairs)} pairs; "
        f"steps: {config.steps}",
        highlight=False,
    )


def pair_batches(
    config: DpoConfig,
    pairs: list[TokenizedPair],
    reference: Ernie4_5_MoeForCausalLM | None,
    *,
    seed: int,
    done: int,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of all steps after `done`, with the reference's logprobs.

    Every rank must draw them all: the reference's forward passes are shared out.
    """
    source = OfflinePairSource(pairs, config.pairs_per_step, seed)
    for step in range(done + 1, config.steps + 1):
        sequences: list[TokenizedCompletion] = []
        step_pairs = add_pairs(sequences, source.take(step))
        logprobs = _reference_logprobs(config, reference, sequences)
        batch = replace(RolloutBatch(sequences), ref_logprobs=logprobs)
        yield from micro_batches(batch, [], step_pairs, config.micro_batch_size)


def _reference_logprobs(
    config: DpoConfig,
    reference: Ernie4_5_MoeForCausalLM | None,
    sequences: list[TokenizedCompletion],
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[np.ndarray]:
    """Return the reference's logprobs of completions; empty where the loss needs none."""
    if reference is None:
        return []
    with adapter_off(reference):
        return sequence_logprobs(
            reference,
            sequences,
            temperature=1.0,
            batch_size=config.micro_batch_size,
            stop_requested=stop_requested,
        ).logprobs


def run(config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Returns what `DONE` records. Raises `Interrupted` after saving.
    """
    return _DpoRun(config, stage, prepared).train()


class _DpoRun(StepLoop[Ernie4_5_MoeForCausalLM, MicroBatch]):
    """The run of a stage on pairs, with its reference."""

    config: DpoConfig

    def __init__(self, config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> None:
        self.prepared = prepared
        self.term = PairTerm.of(config, 1.0)
        # A resumed run is given the starting policy too, before its own checkpoint.
        self.reference = parallel.reference_model(stage.model) if config.needs_reference else None
        trainer: Trainer[Ernie4_5_MoeForCausalLM, MicroBatch] = Trainer(
            stage.model,
            Optimizer(stage.model, config.optim),
            grad_accum_steps=config.micro_batches_per_step,
            balance=config.balance,
        )
        super().__init__(
            config,
            stage,
            trainer,
            DpoLoss(self.term),
            steps=config.steps,
            validate_every=config.validation_interval,
        )

    @cached_property
    def held_out(self) -> MicroBatch:
        """Return all held-out pairs with the reference's logprobs, as one batch."""
        sequences: list[TokenizedCompletion] = []
        pairs = add_pairs(sequences, self.prepared.validation)
        logprobs = _reference_logprobs(self.config, self.reference, sequences, self._stop_requested)
        return MicroBatch(
            tuple(sequences),
            (False,) * len(sequences),
            tuple(pairs),
            ref_logprobs=np.concatenate(logprobs) if logprobs else None,
        )

    def batches(self) -> Iterator[MicroBatch]:
        pairs, seed = self.prepared.pairs, self.stage.data.seed
        return pair_batches(self.config, pairs, self.reference, seed=seed, done=self.trainer.step)

    def probe(self) -> PromptProbe:
        prompts = [pair.chosen.prompt_ids for pair in self.prepared.pairs]
        return PromptProbe.of(prompts, self.config.moe_health.probe_tokens)

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        alpha = self.config.rpo_alpha  # by the name that the objective has in every stage
        loss = metrics["preference"] + alpha * metrics.get("nll_loss", 0.0)
        return metrics | {"loss": loss}

    def validate(self) -> dict[str, float]:
        size, stop_requested = self.config.micro_batch_size, self._stop_requested
        return validation_metrics(
            self.stage.model, self.held_out, self.term, size, stop_requested=stop_requested
        )

    def _stop_requested(self) -> bool:
        return self.stage.stop.requested

    def restore(self, saved: Checkpoint) -> None:
        if "powers" not in saved.state:
            raise CheckpointError(
                f"{saved.path}: a checkpoint of a dpo stage of version 0.1.0, which this version "
                "does not continue: begin the stage again with --from"
            )
        super().restore(saved)


def validation_metrics(
    model: Ernie4_5_MoeForCausalLM,
    held_out: MicroBatch,
    term: PairTerm,
    batch_size: int,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return the loss of held-out pairs, the share that is ranked right, and the mean margin.

    Every rank must call it; each computes the logprobs of a share of the pairs' completions. Raises
    `Interrupted` on all ranks when a stop is requested on one.
    """
    logprobs = sequence_logprobs(
        model,
        held_out.sequences,
        temperature=1.0,
        batch_size=batch_size,
        stop_requested=stop_requested,
    ).logprobs
    terms, seen = term(paddle.to_tensor(np.concatenate(logprobs)), held_out)
    return {
        VALIDATION_LOSS: sum(part.coef * float(part.sum) / part.count for part in terms),
        "validation/accuracies": seen["rewards/accuracies"].value,
        "validation/margins": seen["rewards/margins"].value,
    }
