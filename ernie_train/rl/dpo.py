"""Preference optimization on given pairs: DPO (arXiv:2305.18290), IPO or SimPO.

A stage of its own: no sampling, no rewards, the trainer's loop over micro-batches of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console

from ernie_train import parallel
from ernie_train.core import consensus
from ernie_train.core.config import HARMLESS, PositiveInt
from ernie_train.core.errors import CheckpointError, Interrupted
from ernie_train.data import MappedRows
from ernie_train.io.metrics_log import StageMetrics
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.partial import adapter_off
from ernie_train.rl.batch import (
    MicroBatch,
    PreferencePair,
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
    read_fitting_pairs,
)
from ernie_train.train.moe_health import MoeHealth, PromptProbe
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.stage import StageConfig, StageData, StageRun
from ernie_train.train.trainer import StepResult, Throughput, Trainer
from ernie_train.weights.adapters import from_disk, to_disk
from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore


class DpoConfig(StageConfig, MappedRows, PairLoss):
    """DPO and its kin; the reference is the policy at the stage's start.

    data: a path of rows with a prompt, a chosen and a rejected completion, and their columns.
    seq_len: longest prompt with its completion; pairs beyond it are left out.
    """

    sums_by_default: ClassVar[bool] = True

    kind: Literal["dpo"]
    data: Annotated[str, Field(min_length=1), HARMLESS]
    seq_len: PositiveInt
    steps: PositiveInt
    pairs_per_step: PositiveInt

    @model_validator(mode="after")
    def _consistent(self) -> DpoConfig:
        if self.micro_batch_size < 2:
            raise ValueError("micro_batch_size must be at least 2: a pair goes through together")
        if self.checkpoint.best_metric is not None:
            raise ValueError("checkpoint.best_metric has no effect: a dpo stage measures none")
        if self.seq_len < 2:
            raise ValueError("seq_len must hold a prompt and a completion")
        return self

    def lengths(self) -> dict[str, int]:
        """Return the sequence lengths that the model must be able to hold, by setting."""
        return {"seq_len": self.seq_len}

    def paths(self) -> list[str]:
        """Return every file or directory that the stage reads."""
        return [self.data]

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
    """The pairs that fit the stage's length."""

    pairs: list[TokenizedPair]
    report: PromptReport


def prepare(config: DpoConfig, data: StageData) -> PreparedPairs:
    """Read and encode the stage's pairs; `DataError` where none fits."""
    pairs, facts, warnings = read_fitting_pairs(
        config.data,
        data,
        max_prompt_tokens=config.seq_len - 1,
        max_new_tokens=config.seq_len - 1,
        max_tokens=config.seq_len,
        max_bad_fraction=config.max_bad_fraction,
        columns=config.columns,
    )
    return PreparedPairs(pairs, PromptReport([], facts, warnings))


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
        taken = source.take(step)
        numbers = list(dict.fromkeys(number for number, _ in taken))
        sequences = [completion for number in numbers for completion in pairs[number].completions]
        logprobs = _reference_logprobs(config, reference, sequences)
        place = {number: PreferencePair(2 * at, 2 * at + 1) for at, number in enumerate(numbers)}
        batch = replace(RolloutBatch(sequences), ref_logprobs=logprobs)
        step_pairs = [place[number] for number, _ in taken]
        yield from micro_batches(batch, [], step_pairs, config.micro_batch_size)


def _reference_logprobs(
    config: DpoConfig,
    reference: Ernie4_5_MoeForCausalLM | None,
    sequences: list[TokenizedCompletion],
) -> list[np.ndarray]:
    """Return the reference's logprobs of completions; empty where the loss needs none."""
    if reference is None:
        return []
    with adapter_off(reference):
        return sequence_logprobs(
            reference, sequences, temperature=1.0, batch_size=config.micro_batch_size
        ).logprobs


def run(config: DpoConfig, stage: StageRun, prepared: PreparedPairs) -> dict[str, Any]:
    """Train the stage from its latest checkpoint, or from the start.

    Returns what `DONE` records. Raises `Interrupted` after saving.
    """
    # A resumed run is given the starting policy too, before its own checkpoint.
    reference = parallel.reference_model(stage.model) if config.needs_reference else None
    trainer: Trainer[Ernie4_5_MoeForCausalLM, MicroBatch] = Trainer(
        stage.model,
        Optimizer(stage.model, config.optim),
        grad_accum_steps=config.micro_batches_per_step,
        balance=config.balance,
    )
    store = CheckpointStore(stage.directory / "checkpoints", config.checkpoint)
    saved = store.load_latest()
    if saved is not None:
        with consensus.fail_together():
            _restore(saved, trainer)
    with StageMetrics(
        stage.directory,
        resume_step=saved.step if saved else None,
        terminal=stage.terminal,
        total_steps=config.steps,
        label=config.name,
    ) as writer:
        health = _moe_health(config, stage, prepared, saved, writer)

        def log(result: StepResult) -> None:
            metrics = result.metrics | health.observe(result.step, result.load)
            alpha = config.rpo_alpha  # by the name that the objective has in every stage
            metrics["loss"] = metrics["preference"] + alpha * metrics.get("nll_loss", 0.0)
            writer.log(result.step, metrics, throughput.timings(result))

        saved_step = trainer.step

        def save() -> None:
            nonlocal saved_step
            if saved_step != trainer.step:  # a hook of this very step may have written it
                writer.sync()
                _save(store, trainer, health)
                saved_step = trainer.step

        stage.model.train()
        throughput = Throughput()
        batches = pair_batches(
            config, prepared.pairs, reference, seed=stage.data.seed, done=trainer.step
        )
        hooks = [(1, log), (config.checkpoint.every_steps, lambda result: save())]
        try:
            loss, stop = DpoLoss(PairTerm.of(config, 1.0)), stage.stop
            trainer.fit(
                batches, loss, config.steps, hooks=hooks, stop_requested=lambda: stop.requested
            )
        except Interrupted:
            save()
            raise
    return {"steps": trainer.step, "checkpoint": store.path_of(trainer.step).name}


def _moe_health(
    config: DpoConfig,
    stage: StageRun,
    prepared: PreparedPairs,
    saved: Checkpoint | None,
    writer: StageMetrics,
) -> MoeHealth:
    prompts = [pair.chosen.prompt_ids for pair in prepared.pairs]
    return MoeHealth(
        stage.model,
        config.moe_health,
        first_batch=lambda: PromptProbe.of(prompts, config.moe_health.probe_tokens),
        state=saved.state["moe_health"] if saved else None,
        warn=writer.note,
    )


def _save(
    store: CheckpointStore,
    trainer: Trainer[Ernie4_5_MoeForCausalLM, MicroBatch],
    health: MoeHealth,
) -> None:
    store.save(
        trainer.step,
        model=trainer.model,
        optimizer=optimizer_arrays(trainer.optimizer, lambda named: to_disk(trainer.model, named)),
        state={"powers": trainer.optimizer.beta_powers(), "moe_health": health.state_dict()},
    )


def _restore(saved: Checkpoint, trainer: Trainer[Ernie4_5_MoeForCausalLM, MicroBatch]) -> None:
    if "powers" not in saved.state:
        raise CheckpointError(
            f"{saved.path}: a checkpoint of a dpo stage of version 0.1.0, which this version does "
            "not continue: begin the stage again with --from"
        )
    saved.load_model(trainer.model)
    restore_optimizer(
        trainer.optimizer,
        saved.optimizer,
        saved.state["powers"],
        lambda named: from_disk(trainer.model, named),
        checkpoint=saved.path,
        steps=saved.step,
    )
    trainer.step = saved.step
