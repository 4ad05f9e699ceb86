"""Referee: the same rows in another arrangement must train the same model."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.core.errors import Interrupted, NonFiniteError
from ernie_train.data import Batch
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.train.loss_terms import LossOutput, LossTerm
from ernie_train.train.moe_balance import RouterStatsAccumulator
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import StepResult, Throughput, Trainer

CONFIG = Ernie4_5_MoeConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
    moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, max_position_embeddings=128,
    initializer_range=0.2,
)  # fmt: skip


def new_trainer(accumulate=1, **optim):
    paddle.seed(9)
    model = Ernie4_5_MoeForCausalLM(CONFIG)
    optimizer = Optimizer(model, OptimConfig(lr=1e-3, **optim))
    return Trainer(model, optimizer, grad_accum_steps=accumulate)


def rows(count=8, length=24, seed=0):
    """Rows of two documents with very different numbers of trained tokens, and padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 61, (count, length))
    documents = np.zeros((count, length), np.int64)
    mask = np.zeros((count, length), np.float32)
    for row in range(count):
        cut, end = rng.integers(4, 12), rng.integers(14, length + 1)
        documents[row, :cut], documents[row, cut:end] = 1, 2
        mask[row, : cut - 1] = rng.random(cut - 1) < 0.9
        mask[row, cut : end - 1] = rng.random(end - 1 - cut) < 0.2
        mask[row, 0] = 1
    labels = np.roll(ids, -1, axis=1)
    positions = np.where(documents > 0, np.arange(length), 0)
    return Batch(ids, labels, positions, documents, mask)


def part(batch, rows):
    names = ("input_ids", "labels", "position_ids", "document_ids", "loss_mask")
    return Batch(*(getattr(batch, name)[rows] for name in names))


@pytest.mark.parametrize("normalization", ["tokens", "token_balanced"])
def test_one_batch_equals_its_micro_batches(normalization):
    batch, loss = rows(), PackedLoss(normalization)
    results = []
    for split in ([slice(0, 8)], [slice(i, i + 1) for i in range(8)], [slice(0, 3), slice(3, 8)]):
        trainer = new_trainer()
        result = trainer.train_step([part(batch, s) for s in split], loss, 10)
        weights = {n: p.numpy() for n, p in trainer.model.named_parameters()}
        results.append((result.metrics, weights))
    for metrics, weights in results[1:]:
        for name, value in results[0][0].items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), name
        for name, value in results[0][1].items():
            np.testing.assert_allclose(weights[name], value, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("normalization", ["tokens", "token_balanced"])
def test_objective_by_definition(normalization):
    batch = rows()
    trainer = new_trainer()
    with paddle.no_grad():
        output = trainer.model(
            paddle.to_tensor(batch.input_ids),
            position_ids=paddle.to_tensor(batch.position_ids),
            document_ids=batch.document_ids,
        )
    logits = output.logits.numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, batch.labels[..., None], -1)[..., 0] * batch.loss_mask
    mean = losses.sum() / batch.loss_mask.sum()
    samples = [(r, d) for r in range(8) for d in (1, 2)]
    balanced = np.mean(
        [losses[r][batch.document_ids[r] == d].sum() / (batch.document_ids[r] == d).sum()
         for r, d in samples]
    )  # fmt: skip
    metrics = trainer.train_step([batch], PackedLoss(normalization), 10).metrics
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
    expected = mean if normalization == "tokens" else balanced
    assert metrics["objective"] == pytest.approx(expected, rel=1e-5)
    assert abs(mean - balanced) > 1e-3, "the two must differ for this test to mean anything"


def test_a_non_finite_step_changes_nothing():
    class Broken:
        def counts(self, batch):
            return {"objective": 1.0}

        def __call__(self, model, batch):
            weight, _ = model.head()
            return LossOutput([LossTerm("objective", (weight * float("inf")).sum(), 1.0)])

    trainer = new_trainer()
    before = {n: p.numpy().copy() for n, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 1 would not be finite"):
        trainer.train_step([rows()], Broken(), 10)
    for name, parameter in trainer.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), before[name])
        assert parameter.grad is None or not np.abs(parameter.grad.numpy()).any()


def test_fit_stops_after_the_step_of_the_signal_and_runs_hooks_on_time():
    trainer, seen = new_trainer(accumulate=2), []
    batches = iter(rows(2, seed=i) for i in range(100))
    with pytest.raises(Interrupted, match="after step 3"):
        trainer.fit(
            batches, PackedLoss("tokens"), 10, hooks=[(2, lambda r: seen.append(r.step))],
            stop_requested=lambda: trainer.step == 3,
        )  # fmt: skip
    assert seen == [2]
    trainer.fit(batches, PackedLoss("tokens"), 5, hooks=[(2, lambda r: seen.append(r.step))])
    assert seen == [2, 4, 5], "the last step runs every hook"


def test_throughput_tells_the_step_from_all_that_a_user_waits_for():
    now = [100.0]
    throughput = Throughput(clock=lambda: now[0])
    load = RouterStatsAccumulator([], 0)
    now[0] += 4.0  # 1 s of reading, 2 s of the step, 1 s of validation
    first = throughput.timings(StepResult(1, {}, 2.0, 800, load))
    assert first == {
        "seconds": 2.0, "tokens_per_second": 400.0, "tokens_per_second_overall": 200.0
    }  # fmt: skip
    now[0] += 6.0  # 4 s of writing a checkpoint
    second = throughput.timings(StepResult(2, {}, 2.0, 1000, load))
    assert second["tokens_per_second"] == 500.0
    assert second["tokens_per_second_overall"] == 180.0
