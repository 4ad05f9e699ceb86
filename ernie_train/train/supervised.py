"""Pre-training and SFT: the loss on packed batches, and the run of a stage around the trainer."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import paddle

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import ConfigError, Interrupted
from ernie_train.data import Batch, Documents, PackedLoader
from ernie_train.io.metrics_log import PendingLine, StageMetrics
from ernie_train.losses import linear_cross_entropy, token_balanced_weights
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Lockstep
from ernie_train.train.loss_terms import LossOutput, LossTerm, Mean
from ernie_train.train.moe_health import MoeHealth
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.rope_schedule import RopeSchedule
from ernie_train.train.stage import StageRun
from ernie_train.train.supervised_data import (
    VALIDATION_LOSS,
    PretrainConfig,
    SftConfig,
    SupervisedConfig,
    SupervisedData,
    batch_source,
    total_steps,
)
from ernie_train.train.trainer import StepResult, Throughput, Trainer
from ernie_train.weights.adapters import from_disk, to_disk
from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore


class PackedLoss:
    """Cross-entropy of the trained tokens of packed batches.

    `tokens`: every trained token of the step weighs the same. `token_balanced`: every sample
    does, its trained losses divided by all its positions. The metric `loss` is the mean over
    trained tokens in both; `objective` is what is minimized.
    """

    def __init__(self, normalization: Literal["tokens", "token_balanced"] = "tokens") -> None:
        self.normalization = normalization

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"objective": self._token_weights(batch)[1]}

    def _token_weights(self, batch: Batch) -> tuple[np.ndarray, float]:
        """Return the weight of each token [B,S], and the count that their sum is divided by."""
        if self.normalization == "tokens":
            return batch.loss_mask, float(batch.loss_mask.sum())
        weights, samples = token_balanced_weights(batch.loss_mask, batch.document_ids)
        return weights, float(samples)

    def __call__(self, model: Ernie4_5_MoeForCausalLM, batch: Batch) -> LossOutput:
        output = model.model(
            paddle.to_tensor(batch.input_ids),
            position_ids=paddle.to_tensor(batch.position_ids),
            document_ids=batch.document_ids,
        )
        weights, count = self._token_weights(batch)
        # Logits are only made of trained tokens: in SFT most are prompt or padding.
        trained = np.flatnonzero(batch.loss_mask)
        rows = trained
        if output.layout.token_index is not None:
            rows = np.searchsorted(output.layout.token_index, trained)
        total, token_losses = linear_cross_entropy(
            paddle.gather(output.hidden, paddle.to_tensor(rows)),
            *model.head(),
            paddle.to_tensor(batch.labels.reshape(-1)[trained]),
            paddle.to_tensor(weights.reshape(-1)[trained].astype(np.float32)),
        )
        return LossOutput(
            [LossTerm("objective", total, count)],
            metrics={"loss": Mean(float(token_losses.sum()), float(len(trained)))},
            router_stats=output.router_stats,
            grad_anchor=output.hidden,
        )


def run(
    config: PretrainConfig | SftConfig, stage: StageRun, prepared: SupervisedData
) -> dict[str, Any]:
    """Train `stage.model` to the end of the stage, from its latest checkpoint if it has one.

    Returns what `DONE` records. Raises `Interrupted` after saving.
    """
    return _SupervisedRun(config, stage, prepared).train()


class _SupervisedRun:
    """The run of one stage: a trainer, and its schedule, metrics, validation and checkpoints."""

    def __init__(
        self, config: PretrainConfig | SftConfig, stage: StageRun, prepared: SupervisedData
    ) -> None:
        self.config, self.stage, self.prepared = config, stage, prepared
        self.loss = PackedLoss(config.normalization if isinstance(config, SftConfig) else "tokens")
        self.batches = batch_source(config, prepared)
        self.steps = total_steps(config, prepared)
        self.store = CheckpointStore(stage.directory / "checkpoints", config.checkpoint)
        self.trainer: Trainer[Ernie4_5_MoeForCausalLM, Batch] = Trainer(
            stage.model,
            Optimizer(stage.model, config.optim),
            grad_accum_steps=config.grad_accum_steps,
            balance=config.balance,
        )
        start_theta = stage.model.model.rope_theta
        self.resumed = self.store.load_latest()
        if self.resumed is not None:
            with consensus.fail_together():
                self._restore(self.resumed)
            # Phases are relative to the base at the stage's start, not to that of the checkpoint.
            start_theta = self.resumed.state["rope_theta_at_start"]
        self.rope_schedule = RopeSchedule(config.phases(), start_theta)
        self.validation: dict[str, float] = {}
        self.validation_step = -1
        self.pending: PendingLine | None = None  # of the last step, until it is validated
        self.saved: tuple[int, bool] | None = None  # the last checkpoint: step, and if logged
        if self.resumed is not None:
            state = self.resumed.state.get("pending")
            self.pending = PendingLine.from_state(self.resumed.step, state)

    def _restore(self, checkpoint: Checkpoint) -> None:
        model = self.stage.model
        checkpoint.load_model(model)
        restore_optimizer(
            self.trainer.optimizer,
            checkpoint.optimizer,
            checkpoint.state["powers"],
            lambda named: from_disk(model, named),
            checkpoint=checkpoint.path,
            steps=checkpoint.step,
        )
        self.batches.load_state_dict(checkpoint.state["loader"])
        self.trainer.step = checkpoint.step

    def train(self) -> dict[str, Any]:
        config, stage, resumed = self.config, self.stage, self.resumed
        with StageMetrics(
            stage.directory,
            resume_step=resumed.step - (self.pending is not None) if resumed else None,
            terminal=stage.terminal,
            total_steps=self.steps,
            label=config.name,
        ) as self.metrics:
            self.health = MoeHealth(
                stage.model,
                config.moe_health,
                # Of a copy, because the first batch is trained on as well.
                first_batch=lambda: next(iter(copy.copy(self.prepared.loaders[0]))),
                state=resumed.state["moe_health"] if resumed else None,
                warn=self.metrics.note,
            )
            stage.model.train()
            self.throughput = Throughput()
            try:
                if self.pending is not None:
                    self._finish_step(self.pending)
                self.trainer.fit(
                    iter(self.batches),
                    self.loss,
                    self.steps,
                    before_step=self._apply_rope_schedule,
                    hooks=[(1, self._after_step)],
                    stop_requested=lambda: stage.stop.requested,
                )
            except Interrupted:
                self._save()
                raise
        chosen = self.store.finish(self.trainer.step, stage.model)
        return {"steps": self.trainer.step, "checkpoint": chosen.name}

    def _apply_rope_schedule(self, step: int) -> dict[str, float]:
        """Set the model's context for `step`, which comes next; return metrics to log with it."""
        if self.config.rope_schedule is None:
            return {}
        theta, seq_len = self.rope_schedule.at(step)
        model = self.stage.model
        longest = max(seq_len, model.config.max_position_embeddings)
        if (theta, longest) != (model.model.rope_theta, model.config.max_position_embeddings):
            model.set_context(theta, longest)
        return {"rope_theta": theta, "seq_len": seq_len}

    def _after_step(self, result: StepResult) -> None:
        metrics = result.metrics | self.health.observe(result.step, result.load)
        self.pending = PendingLine(result.step, metrics, self.throughput.timings(result))
        self._finish_step(self.pending)

    def _finish_step(self, line: PendingLine) -> None:
        """Validate, log and save as is due after a step; a stop leaves the line to a later run."""
        metrics = line.metrics
        if self._is_due(self.config.validation_interval, line.step):
            loss = validation_loss(self.config, self.stage, self.prepared.validation, self.loss)
            self.validation, self.validation_step = {VALIDATION_LOSS: loss}, line.step
            metrics = metrics | self.validation
        self.metrics.log(line.step, metrics, line.timings)
        self.pending = None
        if self._is_due(self.config.checkpoint.every_steps, line.step):
            self._save()

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.steps)

    def _save(self) -> None:
        step = self.trainer.step
        holds = (step, self.pending is None)
        if self.saved == holds:
            return  # interrupted after a step that has been saved
        # Metrics first: a run that resumes from a checkpoint must find the lines up to its step.
        self.metrics.sync()
        model, optimizer = self.stage.model, self.trainer.optimizer
        self.store.save(
            step,
            model=model,
            optimizer=optimizer_arrays(optimizer, lambda named: to_disk(model, named)),
            state={
                "powers": optimizer.beta_powers(),
                "loader": self.batches.state_dict(),
                "rope_theta_at_start": self.rope_schedule.start_theta,
                "moe_health": self.health.state_dict(),
                "pending": self.pending.to_state() if self.pending else None,
            },
            metrics=self.validation if self.validation_step == step else None,
        )
        self.saved = holds


def validation_loss(
    config: SupervisedConfig,
    stage: StageRun,
    documents: list[Documents],
    loss: PackedLoss,
) -> float:
    """Return the mean loss in nats over the trained tokens of the validation documents.

    Rows have the length of the stage's last phase from the start, so that values of all phases can
    be compared. Every rank must call it; each runs a share of the batches. Raises `Interrupted`
    when a stop is asked for.
    """
    once = PackedLoader(
        documents,
        [1.0] * len(documents),
        seq_len=config.longest_seq_len,
        micro_batch_size=config.phases()[-1].micro_batch_size,
        seed=stage.data.seed,
        epochs=1,
        pad_id=stage.data.tokenizer.pad_token_id,
    )
    total = count = 0.0
    stage.model.eval()
    stop = stage.stop
    with Lockstep(stage.model, lambda: stop.requested) as lockstep, paddle.no_grad():
        for batch in process_group.shard(list(once)):
            if lockstep.next_pass():
                raise Interrupted("stopped on a signal while validating")
            mean = loss(stage.model, batch).metrics["loss"]
            total, count = total + mean.sum, count + mean.count
    total, count = process_group.all_reduce_sum([total, count])
    stage.model.train()
    if count == 0:
        raise ConfigError("the validation data has no trained token", source=config.name)
    return total / count
