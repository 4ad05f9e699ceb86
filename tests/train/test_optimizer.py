"""Referees: the closed forms of the schedules, and AdamW in float64."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie_train.core.config import parse_config
from ernie_train.core.errors import CheckpointError, ConfigError
from ernie_train.parallel import gradients
from ernie_train.train.optimizer import (
    OptimConfig,
    Optimizer,
    learning_rate,
    restore_optimizer,
)


def config(**values):
    return parse_config(OptimConfig, {"lr": 1e-3, **values}, "test")


def test_warm_up_is_linear_and_reaches_the_rate():
    c = config(warmup_steps=10, schedule="constant")
    assert learning_rate(c, 1, 100) == pytest.approx(1e-4)
    assert learning_rate(c, 10, 100) == pytest.approx(1e-3)
    assert learning_rate(c, 100, 100) == pytest.approx(1e-3)


def test_cosine_and_linear_end_at_min_lr_after_the_last_step_and_pass_the_middle():
    for schedule in ("cosine", "linear"):
        c = config(warmup_steps=10, schedule=schedule, min_lr=1e-4)
        assert learning_rate(c, 11, 110) == pytest.approx(1e-3)
        assert learning_rate(c, 61, 110) == pytest.approx((1e-3 + 1e-4) / 2)
        assert learning_rate(c, 111, 110) == pytest.approx(1e-4)
    quarter = learning_rate(config(schedule="cosine"), 26, 100)
    assert quarter == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_holds_then_falls_by_the_square_root():
    c = config(schedule="wsd", decay_fraction=0.2, min_lr=1e-5)
    assert learning_rate(c, 80, 100) == learning_rate(c, 81, 100) == pytest.approx(1e-3)
    assert learning_rate(c, 86, 100) == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 - math.sqrt(0.25)))
    assert learning_rate(c, 101, 100) == pytest.approx(1e-5)
    late = config(schedule="wsd", decay_fraction=1.0, warmup_steps=50)  # no jump behind warm-up
    assert learning_rate(late, 50, 100) == learning_rate(late, 51, 100) == pytest.approx(1e-3)


SCHEDULES = [{"schedule": s} for s in ("cosine", "linear", "constant")]
SCHEDULES += [{"schedule": "wsd", "decay_fraction": fraction} for fraction in (0.01, 0.5, 1.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("total", [1, 2, 4, 10, 11])
def test_every_step_of_every_schedule_trains(schedule, warmup_steps, total):
    c = config(**schedule, warmup_steps=warmup_steps)
    rates = [learning_rate(c, step, total) for step in range(1, total + 1)]
    assert min(rates) >= c.lr / max(warmup_steps, total**2) - 1e-12
    assert max(rates) <= c.lr
    risen = rates[:warmup_steps]
    fallen = rates[warmup_steps:]
    assert risen == sorted(risen)
    assert fallen == sorted(fallen, reverse=True)
    assert not fallen or fallen[0] == pytest.approx(c.lr)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_lr": 2e-3}, "exceeds"),
        ({"decay_fraction": 0.5}, "no effect"),
        ({"schedule": "constant", "min_lr": 1e-5}, "no effect"),
        ({"schedule": "wsd"}, "needs decay_fraction"),
        ({"lr": 0.0}, "lr"),
        ({"beta2": 1.0}, "beta2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


class Two(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.linear = paddle.nn.Linear(3, 2)
        self.linear.weight.set_value(paddle.to_tensor(np.arange(6.0).reshape(3, 2), "float32"))


def backward(model, seed):
    x = paddle.to_tensor(np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32))
    model.linear(x).square().sum().backward()


def reference_adamw(model, seeds, c):
    """AdamW on the same gradients, in float64; returns the weight and the bias."""
    values = {n: p.numpy().astype(np.float64) for n, p in model.named_parameters()}
    m = {n: np.zeros_like(v) for n, v in values.items()}
    v = {n: np.zeros_like(x) for n, x in values.items()}
    for t, seed in enumerate(seeds, 1):
        x = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32).astype(np.float64)
        out = x @ values["linear.weight"] + values["linear.bias"]
        grads = {"linear.weight": 2 * x.T @ out, "linear.bias": 2 * out.sum(0)}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, c.clip_grad_norm / norm)
        for n in values:
            g = grads[n] * scale
            m[n] = c.beta1 * m[n] + (1 - c.beta1) * g
            v[n] = c.beta2 * v[n] + (1 - c.beta2) * g**2
            decay = c.weight_decay if n == "linear.weight" else 0.0
            step = (m[n] / (1 - c.beta1**t)) / (np.sqrt(v[n] / (1 - c.beta2**t)) + c.eps)
            values[n] -= c.lr * (step + decay * values[n])
    return values


def test_update_equals_adamw_with_clipping_and_decay_groups():
    c = config(lr=1e-2, clip_grad_norm=0.5, weight_decay=0.3)
    model, expected_of = Two(), Two()
    expected_of.set_state_dict(model.state_dict())
    expected = reference_adamw(expected_of, [1, 2, 3], c)
    optimizer = Optimizer(model, c)
    for seed in (1, 2, 3):
        backward(model, seed)
        optimizer.step(c.lr, optimizer.gradient_norm())
        optimizer.clear_gradients()
        assert all(parameter.grad is None for parameter in model.parameters())  # memory is free
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=2e-5)


def test_saved_state_continues_to_the_same_bits_and_a_gap_is_named():
    c = config(lr=1e-2)
    model, other = Two(), Two()
    optimizer = Optimizer(model, c)
    backward(model, 1)
    optimizer.step(c.lr, optimizer.gradient_norm())
    optimizer.clear_gradients()
    moments = {s: {n: t.numpy() for n, t in ts.items()} for s, ts in optimizer.moments().items()}
    other.set_state_dict(model.state_dict())
    resumed = Optimizer(other, c)
    resumed.load_state(moments, optimizer.beta_powers())
    for m, o in ((model, optimizer), (other, resumed)):
        backward(m, 2)
        o.step(c.lr, o.gradient_norm())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    # The next stage of a run updates the same parameters by another optimizer.
    second = Optimizer(other, c)
    backward(other, 3)
    second.step(c.lr, second.gradient_norm())
    assert {s: set(named) for s, named in second.moments().items()} == {
        s: set(named) for s, named in optimizer.moments().items()
    }
    assert set(second.beta_powers()) == set(optimizer.beta_powers()) != set()
    with pytest.raises(CheckpointError, match="step_3: no optimizer state although 3 steps"):
        restore_optimizer(second, {}, {}, dict, checkpoint=Path("step_3"), steps=3)
    del moments["moment2"]["linear.bias"]
    with pytest.raises(CheckpointError, match=r"moment2.*linear\.bias"):
        resumed.load_state(moments, optimizer.beta_powers())


class Mixed(Two):
    """As on a GPU: a weight in bfloat16, beside a bias in float32, as routers are."""

    def __init__(self):
        super().__init__()
        self.linear.weight = paddle.create_parameter(
            [3, 2], "bfloat16", default_initializer=paddle.nn.initializer.Constant(0.7)
        )

    def backward(self, gradient):
        """Add `gradient` to that of both parameters."""
        for parameter in self.parameters():
            factor = paddle.to_tensor(np.broadcast_to(gradient, parameter.shape), "float32")
            (parameter * factor.astype(parameter.dtype)).astype("float32").sum().backward()


@pytest.mark.parametrize(("dtype", "weight"), [("float32", 1.25), ("bfloat16", 1.0)])
def test_gradients_of_bfloat16_weights_are_summed_in_the_chosen_type(dtype, weight):
    """Each of these is less than half of the last bit of 1; a later stage chooses anew."""
    model = Mixed()
    for chosen in ("float32", "bfloat16", dtype):
        settings = config(lr=1e-2, clip_grad_norm=1.0, gradient_dtype=chosen)
        optimizer = Optimizer(model, settings)
    model.backward(1.0)
    for _ in range(256):
        model.backward(2.0**-10)
    norm = math.sqrt(6 * weight**2 + 2 * 1.25**2)
    assert optimizer.gradient_norm() == pytest.approx(norm, rel=1e-6)
    optimizer.step(1e-2, norm)
    moments = optimizer.moments()["moment1"]
    for name, total in (("weight", weight), ("bias", 1.25)):
        np.testing.assert_allclose(moments[f"linear.{name}"].numpy(), 0.1 * total / norm, rtol=5e-3)
    optimizer.clear_gradients()
    assert optimizer.gradient_norm() == 0.0


def test_a_gradient_whose_hook_failed_is_not_lost(monkeypatch):
    """Paddle drops what a hook raises in a backward pass, if another operation comes after it."""
    model = Mixed()
    optimizer = Optimizer(model, config())

    def full(*arguments):
        raise MemoryError("no memory")

    with monkeypatch.context() as short:
        short.setattr(gradients, "cast", full)
        with contextlib.suppress(SystemError):
            model.linear.weight.sum().backward()
    (model.linear.bias * 1.0).sum().backward()
    assert optimizer.gradient_norm() == pytest.approx(math.sqrt(8))


def test_steps_that_bfloat16_cannot_show_add_up():
    """Each is a sixteenth of the weight's last bit."""
    model = Mixed()
    optimizer = Optimizer(model, config(lr=2.0**-12, weight_decay=0.0, clip_grad_norm=None))
    before = model.linear.weight.astype("float32").numpy()
    moved = []
    for _ in range(32):
        model.backward(1.0)
        optimizer.step(2.0**-12, 1.0)
        optimizer.clear_gradients()
        moved.append((before - model.linear.weight.astype("float32").numpy()) * 2.0**8)
    for step, bits in ((4, 0), (16, 1), (32, 2)):
        np.testing.assert_array_equal(moved[step - 1], np.full((3, 2), bits))


def test_state_of_bfloat16_parameters_continues_to_the_same_bits():
    def new_pair():
        model = Mixed()
        return model, Optimizer(model, config(lr=1e-4, clip_grad_norm=None))

    def step(model, optimizer, seed):
        model.backward(np.random.default_rng(seed).normal(size=2))
        optimizer.step(1e-4, 1.0)
        optimizer.clear_gradients()

    (model, optimizer), (other, resumed) = new_pair(), new_pair()
    for seed in (1, 2):
        step(model, optimizer, seed)
    saved = {s: {n: t.numpy() for n, t in ts.items()} for s, ts in optimizer.moments().items()}
    both = {"linear.weight", "linear.bias"}
    assert {s: set(named) for s, named in saved.items()} == {
        "moment1": both, "moment2": both, "master": {"linear.weight"}
    }  # fmt: skip
    assert optimizer.beta_powers()["beta1_pow_acc"] == pytest.approx(0.9**3)
    other.set_state_dict(model.state_dict())
    with pytest.raises(CheckpointError, match="lacks moment1 and moment2"):
        resumed.load_state({"master": saved["master"]}, {})
    in_float32 = Optimizer(Two(), config())
    with pytest.raises(CheckpointError, match=r"begun in bfloat16.*go on in float32.*weight"):
        in_float32.load_state(saved, {})
    with pytest.raises(CheckpointError, match=r"begun in float32.*go on in bfloat16.*weight"):
        resumed.load_state({slot: saved[slot] for slot in ("moment1", "moment2")}, {})
    resumed.load_state(saved, optimizer.beta_powers())
    for pair in ((model, optimizer), (other, resumed)):
        step(*pair, 3)
    ours, theirs = optimizer.moments(), resumed.moments()
    assert {s: set(named) for s, named in theirs.items()} == {s: set(n) for s, n in saved.items()}
    for slot, named in ours.items():
        for name, tensor in named.items():
            assert tensor.numpy().tobytes() == theirs[slot][name].numpy().tobytes(), (slot, name)
