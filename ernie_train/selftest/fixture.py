"""The small model and the batches that the checks train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle

from ernie_train import parallel
from ernie_train.core import devices
from ernie_train.data import Batch
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.train.moe_balance import BalanceConfig
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer

STEPS = 4
# Head size 64: FlashMask takes it.
SMALL: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "moe_num_experts": 8,
}  # fmt: skip


def small_config(**changes: Any) -> Ernie4_5_MoeConfig:
    """Return the configuration of a model of a dense and two MoE layers, with these changes."""
    return Ernie4_5_MoeConfig.preset("tiny", **SMALL | changes)


def new_trainer(
    config: Ernie4_5_MoeConfig, dtype: str, recompute: parallel.Recompute = False
) -> Trainer[Any, Batch]:
    """Return a trainer of a model with the same weights at every call, up to `dtype`.

    They are drawn on the CPU: a GPU's generator draws others, and both are compared.
    """
    with devices.on_cpu():
        paddle.seed(0)
        drawn = parallel.new_model(config, "float32").state_dict()
        weights = {name: tensor.numpy() for name, tensor in drawn.items()}
    model = parallel.new_model(config, dtype, initialize=False)
    for name, tensor in model.state_dict().items():
        tensor.set_value(paddle.to_tensor(weights[name]).astype(tensor.dtype))
    parallel.enable_recompute(model, recompute)
    model.train()
    optimizer = Optimizer(model, OptimConfig(lr=1e-3, schedule="constant"))
    balance = BalanceConfig(orthogonal_coef=1e-3, z_loss_coef=1e-3, bias_update_rate=1e-3)
    return Trainer(model, optimizer, balance=balance)


def packed_batch(vocab_size: int, rows: int, length: int, document: int, seed: int = 0) -> Batch:
    """Return rows of random tokens, packed from documents of `document` tokens."""
    ids = np.random.default_rng(seed).integers(1, vocab_size, (rows, length + 1))
    places = np.tile(np.arange(length), (rows, 1))
    mask = np.ones((rows, length), np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], places % document, places // document + 1, mask)


def train_small(
    dtype: str, *, recompute: parallel.Recompute = False, steps: int = STEPS
) -> dict[str, float]:
    """Return loss and gradient norm of the first step, and the loss of the last one.

    All steps train the same two micro-batches, on all ranks together.
    """
    config = small_config()
    trainer = new_trainer(config, dtype, recompute)
    batches = [packed_batch(config.vocab_size, 2, 96, 40, seed) for seed in (0, 1)]
    seen = [trainer.train_step(batches, PackedLoss(), steps).metrics for _ in range(steps)]
    found = {"loss": seen[0]["loss"], "grad_norm": seen[0]["grad_norm"]}
    return found | {"last_loss": seen[-1]["loss"]}


def gradients(
    dtype: str, recompute: parallel.Recompute = False
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss of a batch and the gradient of every parameter, in float32."""
    config = small_config()
    trainer = new_trainer(config, dtype, recompute)
    output = PackedLoss()(trainer.model, packed_batch(config.vocab_size, 2, 96, 40))
    (term,) = output.terms
    (term.sum * (1.0 / term.count)).backward()
    named = {
        name: parameter.grad.astype("float32").numpy()
        for name, parameter in trainer.optimizer.parameters.items()
        if parameter.grad is not None
    }
    return float(term.sum) / term.count, named


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest value expected."""
    ours, theirs = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-30))


def largest_error(found: Iterable[Any], expected: Iterable[Any]) -> float:
    """Return the largest `relative_error` of arrays and those expected; NaN if any is."""
    pairs = zip(found, expected, strict=True)
    return float(np.max([relative_error(*pair) for pair in pairs]))  # `max` passes over a NaN
