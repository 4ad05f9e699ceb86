"""Pre-training and SFT: the loss on packed batches, and the run of a stage around the trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import paddle

from ernie_train.core import process_group
from ernie_train.core.errors import ConfigError
from ernie_train.data import Batch, Documents, PackedLoader
from ernie_train.losses import linear_cross_entropy, token_balanced_weights
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Lockstep
from ernie_train.train.loss_terms import LossFn, LossOutput, LossTerm, Mean
from ernie_train.train.rope_schedule import RopeSchedule
from ernie_train.train.stage import StageRun
from ernie_train.train.step_loop import StepLoop
from ernie_train.train.supervised_data import (
    VALIDATION_LOSS,
    PretrainConfig,
    SftConfig,
    SupervisedConfig,
    SupervisedData,
    batch_source,
    total_steps,
)
from ernie_train.weights.checkpoint import Checkpoint


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


class _SupervisedRun(StepLoop[Ernie4_5_MoeForCausalLM, Batch]):
    """The run of a stage on packed batches, with a schedule of context lengths."""

    config: PretrainConfig | SftConfig

    def __init__(
        self, config: PretrainConfig | SftConfig, stage: StageRun, prepared: SupervisedData
    ) -> None:
        self.prepared = prepared
        loss = PackedLoss(config.normalization if isinstance(config, SftConfig) else "tokens")
        self.source = batch_source(config, prepared)
        # Phases are relative to the base at the stage's start, not to that of a checkpoint.
        start_theta = stage.model.model.rope_theta
        super().__init__(
            config,
            stage,
            stage.model,
            loss,
            grad_accum_steps=config.grad_accum_steps,
            steps=total_steps(config, prepared),
            validate_every=config.validation_interval,
        )
        self.rope_schedule = RopeSchedule(config.phases(), start_theta)

    def batches(self) -> Iterator[Batch]:
        return iter(self.source)

    def probe(self) -> Batch:
        # Of a copy, because the first batch is trained on as well.
        return next(iter(copy.copy(self.prepared.loaders[0])))

    def before_step(self, step: int) -> dict[str, float]:
        """Set the model's context for `step`; return metrics to log with it."""
        if self.config.rope_schedule is None:
            return {}
        theta, seq_len = self.rope_schedule.at(step)
        model = self.stage.model
        longest = max(seq_len, model.config.max_position_embeddings)
        if (theta, longest) != (model.model.rope_theta, model.config.max_position_embeddings):
            model.set_context(theta, longest)
        return {"rope_theta": theta, "seq_len": seq_len}

    def validate(self) -> dict[str, float]:
        documents = self.prepared.validation
        return {VALIDATION_LOSS: validation_loss(self.config, self.stage, documents, self.loss)}

    def restore(self, saved: Checkpoint) -> None:
        super().restore(saved)
        self.source.load_state_dict(saved.state["loader"])

    def state(self) -> dict[str, Any]:
        return {"loader": self.source.state_dict()}


def validation_loss(
    config: SupervisedConfig,
    stage: StageRun,
    documents: list[Documents],
    loss: LossFn[Ernie4_5_MoeForCausalLM, Batch],
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
    with Lockstep(stage.model, stage.stop_requested) as lockstep, paddle.no_grad():
        for batch in lockstep.shard(list(once)):
            mean = loss(stage.model, batch).metrics["loss"]
            total, count = total + mean.sum, count + mean.count
    total, count = process_group.all_reduce_sum([total, count])
    stage.model.train()
    if count == 0:
        raise ConfigError("the validation data has no trained token", source=config.name)
    return total / count
