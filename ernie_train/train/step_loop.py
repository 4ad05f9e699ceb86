"""The run of a stage that trains step by step: metrics, validation, checkpoints and resuming."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic

import numpy as np

from ernie_train.core import consensus
from ernie_train.core.errors import Interrupted, NonFiniteError
from ernie_train.io.metrics_log import PendingLine, StageMetrics
from ernie_train.train.loss_terms import BatchT, LossFn, ModelT
from ernie_train.train.moe_health import MoeHealth
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.stage import StageConfig, StageRun
from ernie_train.train.trainer import StepResult, Throughput, Trainer
from ernie_train.weights.adapters import from_disk, to_disk
from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore


class StepLoop(ABC, Generic[ModelT, BatchT]):
    """Runs a stage of optimizer steps from its latest checkpoint to its end.

    A kind of stage derives from it, gives it a loss, and says what is its own: batches, validation,
    and further state. A stop loses no step: the line of a step that was not validated yet stands in
    the checkpoint.

    model: what the loss takes, the stage's model or one around it.
    grad_accum_steps: micro-batches of a step.
    steps: of the whole stage.
    validate_every: steps between two validations; None for a stage without any.
    """

    def __init__(
        self,
        config: StageConfig,
        stage: StageRun,
        model: ModelT,
        loss: LossFn[ModelT, BatchT],
        *,
        grad_accum_steps: int,
        steps: int,
        validate_every: int | None,
    ) -> None:
        self.config, self.stage, self.model, self.loss = config, stage, model, loss
        self.trainer: Trainer[ModelT, BatchT] = Trainer(
            model,
            Optimizer(model, config.optim),
            grad_accum_steps=grad_accum_steps,
            balance=config.balance,
        )
        self.steps, self.validate_every = steps, validate_every
        self.store = CheckpointStore(stage.directory / "checkpoints", config.checkpoint)
        self.validation: dict[str, float] = {}
        self.validation_step = -1
        self.pending: PendingLine | None = None  # of the last step, until it is validated
        self.saved = (0, True)  # the last checkpoint: step, and if logged
        self.is_over = False  # before its last step
        self.own_state: dict[str, Any] = {}  # `state` when the batches of the last step were taken
        self.resumed = self.store.load_latest()
        if self.resumed is not None:
            with consensus.fail_together():
                self.restore(self.resumed)
            state = self.resumed.state.get("pending")
            self.pending = PendingLine.from_state(self.resumed.step, state)
            self.saved = (self.resumed.step, self.pending is None)

    # ---- what a kind of stage says ---------------------------------------------------------------

    @abstractmethod
    def batches(self) -> Iterator[BatchT]:
        """Return the micro-batches of all steps that are left, the same on every rank."""

    @abstractmethod
    def probe(self) -> Any:
        """Return the batch on which changed routing is measured (`MoeHealth`)."""

    def before_step(self, step: int) -> Mapping[str, float]:
        """Prepare for `step`, which comes next; return metrics to log with it."""
        return {}

    def step_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return what is logged of a step, given what trainer and health measured."""
        return metrics

    def validate(self) -> dict[str, float]:
        """Return the metrics of held-out data; `Interrupted` when a stop is asked for."""
        return {}

    def restore(self, saved: Checkpoint) -> None:
        """Load model, optimizer and step of a checkpoint, and what `state` put into it."""
        saved.load_model(self.stage.model)
        restore_optimizer(
            self.trainer.optimizer,
            saved.optimizer,
            saved.state["powers"],
            self.from_disk,
            checkpoint=saved.path,
            steps=saved.step,
        )
        self.trainer.step = saved.step

    def state(self) -> dict[str, Any]:
        """Return the stage's own part of a checkpoint's state."""
        return {}

    def parts(self) -> dict[str, Mapping[str, np.ndarray]]:
        """Return further arrays of a checkpoint, as `CheckpointStore.save` takes them."""
        return {}

    def to_disk(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return arrays of the trained parameters under the names that checkpoints have."""
        return to_disk(self.stage.model, named)

    def from_disk(self, stored: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Return arrays of a checkpoint under the names of the trained parameters."""
        return from_disk(self.stage.model, stored)

    # ---- the run ---------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run all steps that are left; return what `DONE` records.

        Raises `Interrupted` after saving, and `NonFiniteError`.
        """
        stage, resumed = self.stage, self.resumed
        with StageMetrics(
            stage.directory,
            resume_step=resumed.step - (self.pending is not None) if resumed else None,
            terminal=stage.terminal,
            total_steps=self.steps,
            label=self.config.name,
            loggers=stage.loggers,
        ) as self.metrics:
            self.health = MoeHealth(
                stage.model,
                self.config.moe_health,
                first_batch=self.probe,
                state=resumed.state["moe_health"] if resumed else None,
                warn=self.metrics.note,
            )
            stage.model.train()
            self.throughput = Throughput()
            try:
                if self.pending is not None:
                    self._finish_step(self.pending)
                elif resumed is not None:
                    self._end_if_out_of_patience()
                self.trainer.fit(
                    self.batches(),
                    self.loss,
                    self.steps,
                    before_step=self._begin_step,
                    hooks=[(1, self._after_step)],
                    is_over=lambda: self.is_over,
                    stop_requested=lambda: stage.stop.requested,
                )
            except Interrupted:
                self._save(self.state())
                raise
            except NonFiniteError:  # of the next step: weights and moments are still of this one
                self.before_step(self.trainer.step)
                if self.trainer.has_finite_weights():
                    self._save(self.own_state)
                raise
        chosen = self.store.finish(self.trainer.step, stage.model)
        return {"steps": self.trainer.step, "checkpoint": chosen.name}

    def _begin_step(self, step: int) -> Mapping[str, float]:
        self.own_state = self.state()
        return self.before_step(step)

    def _after_step(self, result: StepResult) -> None:
        measured = result.metrics | self.health.observe(result.step, result.load)
        metrics = self.step_metrics(measured)
        self.pending = PendingLine(result.step, metrics, self.throughput.timings(result))
        self._finish_step(self.pending)

    def _finish_step(self, line: PendingLine) -> None:
        """Validate, log and save as is due after a step; a stop leaves the line to a later run."""
        metrics = line.metrics
        if self._is_due(self.validate_every, line.step):
            self.validation, self.validation_step = self.validate(), line.step
            metrics = metrics | self.validation
        self.metrics.log(line.step, metrics, line.timings)
        self.pending = None
        if self._is_due(self.config.checkpoint.every_steps, line.step):
            self._save(self.state())
            self._end_if_out_of_patience()

    def _end_if_out_of_patience(self) -> None:
        self.is_over = self.store.ends_with(self.trainer.step)
        if self.is_over and self.trainer.step < self.steps:
            self.metrics.note(self.store.says_out_of_patience(self.trainer.step, self.steps))

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.steps)

    def _save(self, own_state: Mapping[str, Any]) -> None:
        step, optimizer = self.trainer.step, self.trainer.optimizer
        holds = (step, self.pending is None)
        if self.saved == holds:
            return  # ended after a step that has been saved, or before the first
        # Metrics first: a run that resumes from a checkpoint must find the lines up to its step.
        self.metrics.sync()
        self.store.save(
            step,
            model=self.stage.model,
            optimizer=optimizer_arrays(optimizer, self.to_disk),
            state={
                "powers": optimizer.beta_powers(),
                "moe_health": self.health.state_dict(),
                "pending": self.pending.to_state() if self.pending else None,
                **own_state,
            },
            metrics=self.validation if self.validation_step == step else None,
            parts=self.parts(),
        )
        self.saved = holds
