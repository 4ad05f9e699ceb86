"""Overlap of shared experts with the all-to-all, over simulated collectives in one process.

They deliver when they are waited for, and not before: until then the buffer holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.autograd import PyLayer

from ernie_train.model.moe import MoE
from ernie_train.model.token_dispatcher import Placement
from ernie_train.parallel import ExpertDispatcher, enable_recompute, expert
from ernie_train.parallel.collectives import Work
from tests.small_models import fill, make_config, make_model


class Late:
    """A task that does its work when it is waited for."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def wait(self) -> None:
        self.work()


class LateCollectives:
    """Collectives of one rank whose rows arrive on `wait`; `events` records both."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sent_bytes = 0
        self.group = [0]

    def gather(self, values: paddle.Tensor) -> np.ndarray:
        return values.numpy()[None]

    def all_to_all(self, rows: paddle.Tensor, counts: np.ndarray) -> Work:
        assert counts.tolist() == [[rows.shape[0]]]
        came = paddle.full(rows.shape, float("nan"), rows.dtype)
        self.events.append("send")

        def deliver() -> None:
            self.events.append("wait")
            paddle.assign(rows, output=came)

        return Work(came, Late(deliver), rows)


class Watched(PyLayer):
    """The identity, telling when gradients pass."""

    @staticmethod
    def forward(ctx, x, events, name):
        ctx.events, ctx.name = events, name
        return x * 1.0

    @staticmethod
    def backward(ctx, *grads):
        ctx.events.append(ctx.name)
        return grads[0] * 1.0


class Told(nn.Layer):
    """A layer that tells when it is entered and left, forward and backward."""

    def __init__(self, inner: nn.Layer, events: list[str], name: str) -> None:
        super().__init__()
        self.inner, self.events, self.name = inner, events, name

    def forward(self, x, *more):
        self.events.append(self.name)
        x = Watched.apply(x, self.events, f"{self.name} backward ends")
        return Watched.apply(self.inner(x, *more), self.events, f"{self.name} backward begins")


FROZEN = [(), ("shared_experts",), ("experts.",), ("gate.",), ("model.",)]
FORWARD = ["send", "shared", "wait", "experts", "send", "wait"]
BACKWARD = [
    "send", "wait", "experts backward begins", "experts backward ends",
    "send", "shared backward begins", "shared backward ends", "wait",
]  # fmt: skip


@pytest.fixture
def late(monkeypatch) -> LateCollectives:
    made = LateCollectives()
    monkeypatch.setattr(expert, "get_collectives", lambda: made)
    return made


def results(layer, x, weight):
    leaf = paddle.to_tensor(x, stop_gradient=False)
    out, logits, *_ = layer(leaf)
    ((out * weight).sum() + (logits * logits).sum()).backward()
    grads = {n.replace("inner.", ""): p.grad.numpy() for n, p in layer.named_parameters()}
    return {"out": out.numpy(), "x": leaf.grad.numpy(), **grads}


@pytest.mark.parametrize("shared", [0, 1])
def test_shared_experts_run_while_rows_travel_in_both_directions(late, shared):
    config = make_config(moe_num_shared_experts=shared, initializer_range=0.3)
    paddle.seed(1)
    local, spread = MoE(config), MoE(config, Placement(None, ExpertDispatcher()))
    for layer in (local, spread):
        fill(layer, 5)
    x, weight = np.random.default_rng(0).normal(size=(2, 13, 32)).astype(np.float32)
    weight = paddle.to_tensor(weight)
    expected = results(local, x, weight)
    spread.experts = Told(spread.experts, late.events, "experts")
    if shared:
        spread.shared_experts = Told(spread.shared_experts, late.events, "shared")
    found = results(spread, x, weight)
    wanted = [e for e in [*FORWARD, *BACKWARD] if shared or not e.startswith("shared")]
    assert late.events == wanted
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_trains_the_same_over_late_collectives(late, recompute, frozen):
    """`frozen`: parameters without a gradient; `model.`: all but the last layer and the head."""
    models = [make_model(tie_word_embeddings=False) for _ in range(2)]
    for model in models:
        model.train()
        for name, parameter in model.named_parameters():
            last = name.startswith(("model.layers.2", "model.norm"))
            if any(f in name for f in frozen) and not (frozen == ("model.",) and last):
                parameter.stop_gradient = True
    for layer in models[1].model.layers:
        if layer.is_moe:
            layer.mlp.dispatcher = ExpertDispatcher()
    if recompute:
        for model in models:
            enable_recompute(model)
    ids = paddle.to_tensor(np.random.default_rng(2).integers(1, 90, (2, 11)))
    for model in models:
        (model(ids).logits ** 2).mean().backward()
    assert late.events.count("send") == late.events.count("wait") > 0
    for (name, one), (_, other) in zip(
        models[0].named_parameters(), models[1].named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            np.testing.assert_allclose(
                other.grad.numpy(), one.grad.numpy(), rtol=1e-4, atol=1e-6, err_msg=name
            )


def test_rows_that_were_not_sent_are_not_awaited():
    order = paddle.arange(2)
    plan = expert.AllToAllPlan(LateCollectives(), np.array([[2]]), [2], order, order)
    with pytest.raises(RuntimeError, match="not started"):
        expert._Transfer(plan).take()
