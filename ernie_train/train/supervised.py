"""How pre-training and SFT train: the loss on packed batches, checkpoints and metrics."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import paddle

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import ConfigError, Interrupted
from ernie_train.data import Batch, ConsecutiveLoaders, Documents, PackedLoader
from ernie_train.io.metrics_log import StageMetrics
from ernie_train.losses import linear_cross_entropy, token_balanced_weights
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Lockstep
from ernie_train.train.loss_terms import LossOutput, LossTerm
from ernie_train.train.moe_health import MoeHealth
from ernie_train.train.optimizer import Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.train.rope_schedule import RopeSchedule
from ernie_train.train.stage import StageRun
from ernie_train.train.supervised_data import Prepared, SupervisedConfig, batch_source, total_steps
from ernie_train.train.trainer import StepResult, Trainer
from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore, from_disk, to_disk


class PackedLoss:
    """Cross-entropy of the trained tokens of packed batches.

    `tokens`: every trained token of the step weighs the same. `token_balanced`: every sample
    does, its trained losses divided by all its positions. What is shown as `loss` is the mean over
    trained tokens in both; `objective` is what is minimized.
    """

    def __init__(self, normalization: Literal["tokens", "token_balanced"]) -> None:
        self.normalization = normalization

    def counts(self, batch: Batch) -> dict[str, float]:
        if self.normalization == "tokens":
            return {"objective": float(batch.loss_mask.sum())}
        _, samples = token_balanced_weights(batch.loss_mask, batch.document_ids)
        return {"objective": float(samples)}

    def __call__(self, model: Ernie4_5_MoeForCausalLM, batch: Batch) -> LossOutput:
        output = model.model(
            paddle.to_tensor(batch.input_ids),
            position_ids=paddle.to_tensor(batch.position_ids),
            document_ids=batch.document_ids,
        )
        weights = batch.loss_mask
        if self.normalization == "token_balanced":
            weights, _ = token_balanced_weights(batch.loss_mask, batch.document_ids)
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
        count = self.counts(batch)["objective"]
        return LossOutput(
            [LossTerm("objective", total, count)],
            {"loss": (float(token_losses.sum()), float(len(trained)))},
            output.router_stats,
            output.hidden,
        )


def train(
    config: SupervisedConfig, run: StageRun, prepared: Prepared, loss: PackedLoss
) -> dict[str, Any]:
    """Trains `run.model` to the end of the stage, from its latest checkpoint if it has one.

    Returns what `DONE` records. Raises `Interrupted` after saving.
    """
    batches = batch_source(config, prepared)
    steps = total_steps(config, prepared)
    store = CheckpointStore(run.directory / "checkpoints", config.checkpoint)
    trainer: Trainer[Ernie4_5_MoeForCausalLM, Batch] = Trainer(
        run.model,
        Optimizer(run.model, config.optim),
        grad_accum_steps=config.grad_accum_steps,
        balance=config.balance,
    )
    start_theta = run.model.model.rope_theta
    saved = store.load_latest()
    if saved is not None:
        with consensus.fail_together():
            _restore(saved, trainer, batches)
        start_theta = saved.state["rope_theta_at_start"]
    with StageMetrics(
        run.directory,
        resume_step=saved.step if saved else None,
        terminal=run.terminal,
        total_steps=steps,
        label=config.name,
    ) as writer:
        keeper = _Keeper(
            config=config,
            run=run,
            trainer=trainer,
            batches=batches,
            store=store,
            prepared=prepared,
            loss=loss,
            writer=writer,
            health=_moe_health(config, run, prepared, saved, writer),
            schedule=RopeSchedule(config.phases(), start_theta),
        )
        run.model.train()
        try:
            trainer.fit(
                iter(batches),
                loss,
                steps,
                before_step=keeper.set_base,
                hooks=keeper.hooks(),
                stop_requested=lambda: run.stop.requested,
            )
        except Interrupted:
            keeper.save()
            raise
    return {"steps": trainer.step, "checkpoint": store.path_of(trainer.step).name}


def _moe_health(
    config: SupervisedConfig,
    run: StageRun,
    prepared: Prepared,
    saved: Checkpoint | None,
    writer: StageMetrics,
) -> MoeHealth:
    return MoeHealth(
        run.model,
        config.moe_health,
        # A copy, so that the batch is trained on all the same.
        first_batch=lambda: next(iter(copy.copy(prepared.loaders[0]))),
        state=saved.state["moe_health"] if saved else None,
        warn=writer.note,
    )


def _restore(
    saved: Checkpoint,
    trainer: Trainer[Ernie4_5_MoeForCausalLM, Batch],
    batches: ConsecutiveLoaders,
) -> None:
    saved.load_model(trainer.model)
    restore_optimizer(
        trainer.optimizer,
        saved.optimizer,
        saved.state["powers"],
        lambda named: from_disk(trainer.model, named),
        checkpoint=saved.path,
        steps=saved.step,
    )
    batches.load_state_dict(saved.state["loader"])
    trainer.step = saved.step


@dataclass
class _Keeper:
    """What happens around the steps of a stage: RoPE's base, metrics, validation, checkpoints."""

    config: SupervisedConfig
    run: StageRun
    trainer: Trainer[Ernie4_5_MoeForCausalLM, Batch]
    batches: ConsecutiveLoaders
    store: CheckpointStore
    prepared: Prepared
    loss: PackedLoss
    writer: StageMetrics
    health: MoeHealth
    schedule: RopeSchedule
    measured: dict[str, float] = field(default_factory=dict)
    measured_step: int = -1
    saved_step: int = -1

    def set_base(self, step: int) -> dict[str, float]:
        """Gives the model the base of the step that comes; what of it is logged."""
        if self.config.rope_schedule is None:
            return {}
        theta, seq_len = self.schedule.at(step)
        if theta != self.run.model.model.rope_theta:
            self.run.model.set_rope_theta(theta)
        return {"rope_theta": theta, "seq_len": seq_len}

    def hooks(self) -> list[tuple[int, Any]]:
        every = self.config.validate_every_steps
        return [
            *([(every, self._validate)] if every is not None else []),
            (1, self._log),
            (self.config.checkpoint.every_steps, lambda result: self.save()),
        ]

    def save(self) -> None:
        if self.saved_step == self.trainer.step:
            return  # a hook of this very step has written it
        self.writer.sync()
        optimizer = self.trainer.optimizer
        arrays = optimizer_arrays(optimizer, lambda named: to_disk(self.run.model, named))
        state = {
            "powers": optimizer.powers(),
            "loader": self.batches.state_dict(),
            "rope_theta_at_start": self.schedule.start_theta,
            "moe_health": self.health.state_dict(),
        }
        self.store.save(
            self.trainer.step,
            model=self.run.model,
            optimizer=arrays,
            state=state,
            metrics=self.measured if self.measured_step == self.trainer.step else None,
        )
        self.saved_step = self.trainer.step

    def _validate(self, result: StepResult) -> None:
        loss = validation_loss(self.config, self.run, self.prepared.validation, self.loss)
        self.measured = {"validation_loss": loss}
        self.measured_step = result.step
        result.metrics.update(self.measured)

    def _log(self, result: StepResult) -> None:
        result.metrics.update(self.health.observe(result.step, result.load))
        rate = result.tokens / result.seconds
        timings = {"seconds": result.seconds, "tokens_per_second": rate}
        self.writer.log(result.step, result.metrics, timings)


def validation_loss(
    config: SupervisedConfig,
    run: StageRun,
    documents: list[Documents],
    loss: PackedLoss,
) -> float:
    """Mean loss in nats over the trained tokens of the validation documents.

    Rows have the length of the stage's last phase throughout, so that values can be compared. Every
    rank must call it; each runs a share of the batches.
    """
    once = PackedLoader(
        documents,
        [1.0] * len(documents),
        seq_len=config.longest_seq_len,
        micro_batch_size=config.phases()[-1].micro_batch_size,
        seed=run.data.seed,
        epochs=1,
        pad_id=run.data.tokenizer.pad_token_id,
    )
    total = count = 0.0
    run.model.eval()
    with Lockstep(run.model) as lockstep, paddle.no_grad():
        for batch in process_group.shard(list(once)):
            lockstep.next_pass()
            value, tokens = loss(run.model, batch).shown["loss"]
            total, count = total + value, count + tokens
    total, count = process_group.all_reduce_sum([total, count])
    run.model.train()
    if count == 0:
        raise ConfigError("the validation data has no trained token", source=config.name)
    return total / count
