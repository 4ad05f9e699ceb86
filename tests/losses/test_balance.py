"""Referee: numpy in float64 written from the formulas, finite differences, and wrong versions."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.losses import (
    count_tokens_per_expert,
    load_balance_loss,
    mean_absolute_cosine,
    router_orthogonal_gradient,
    router_orthogonal_loss,
    router_z_loss,
    selection_bias_step,
    unbiased_expert_ids,
)


def orthogonal(weight, *, normalise=True):
    norms = np.maximum(np.sqrt((weight**2).sum(0)), 1e-12) if normalise else 1.0
    columns = weight / norms
    return ((columns.T @ columns - np.eye(weight.shape[1])) ** 2).mean()


def z(logits):
    top = logits.max(-1)
    return ((top + np.log(np.exp(logits - top[:, None]).sum(-1))) ** 2).mean()


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def load_balance(probs, ids):
    tokens, experts = probs.shape
    total = 0.0
    for e in range(experts):
        total += probs[:, e].mean() * sum(e in row for row in ids) / tokens
    return experts * total


def numeric_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[at] += step
        down[at] -= step
        gradient[at] = (function(up) - function(down)) / (2 * step)
    return gradient


def leaf(x):
    return paddle.to_tensor(x, dtype=str(x.dtype), stop_gradient=False)


def counted(ids, experts):
    return count_tokens_per_expert([paddle.to_tensor(ids)], experts)[0]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("shape", [(12, 5), (4, 9), (3, 1)])
def test_orthogonal_equals_float64_and_its_gradient(rng, shape):
    weight = rng.normal(size=shape) * rng.uniform(0.1, 5.0, shape[1])
    single = router_orthogonal_loss(paddle.to_tensor(weight.astype(np.float32)))
    assert float(single) == pytest.approx(orthogonal(weight), rel=1e-6, abs=1e-12)
    tensor = leaf(weight)
    router_orthogonal_loss(tensor).backward()
    expected = numeric_gradient(orthogonal, weight)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-8)
    value, alone = router_orthogonal_gradient(tensor.detach())
    np.testing.assert_array_equal(alone.numpy(), tensor.grad.numpy())
    assert value == pytest.approx(orthogonal(weight), rel=1e-9)


def test_orthogonal_of_orthogonal_columns_is_zero_at_any_length(rng):
    basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    weight = basis[:, :5] * np.array([0.01, 1.0, 3.0, 50.0, 0.5])
    assert float(router_orthogonal_loss(paddle.to_tensor(weight))) < 1e-12
    assert orthogonal(weight, normalise=False) > 1.0, "without normalised columns it is not"
    assert mean_absolute_cosine(paddle.to_tensor(weight)) < 1e-6


def test_orthogonal_of_equal_columns_by_hand():
    weight = paddle.to_tensor(np.tile([[3.0], [4.0]], 4).astype(np.float32))
    assert float(router_orthogonal_loss(weight)) == pytest.approx(12 / 16, rel=1e-6)
    assert mean_absolute_cosine(weight) == pytest.approx(1.0, rel=1e-6)
    assert mean_absolute_cosine(paddle.to_tensor([[1.0, -1.0]])) == pytest.approx(1.0)


def test_orthogonal_of_a_zero_column_is_finite(rng):
    weight = rng.normal(size=(6, 3)).astype(np.float32)
    weight[:, 1] = 0
    tensor = leaf(weight)
    loss = router_orthogonal_loss(tensor)
    loss.backward()
    assert float(loss) == pytest.approx(orthogonal(weight.astype(np.float64)), rel=1e-6)
    assert np.isfinite(tensor.grad.numpy()).all()


def test_z_loss_equals_float64_and_its_gradient(rng):
    logits = rng.normal(size=(7, 5)) * 4
    assert float(router_z_loss(paddle.to_tensor(logits.astype(np.float32)))) == pytest.approx(
        z(logits), rel=1e-6
    )
    tensor = leaf(logits)
    router_z_loss(tensor).backward()
    np.testing.assert_allclose(tensor.grad.numpy(), numeric_gradient(z, logits), atol=1e-7)


def test_z_loss_of_large_logits_does_not_overflow():
    assert float(router_z_loss(paddle.full([2, 3], 200.0))) == pytest.approx(
        (200 + np.log(3)) ** 2, rel=1e-6
    )


def test_load_balance_equals_float64_and_its_gradient(rng):
    logits = rng.normal(size=(11, 6))
    probs = softmax(logits)
    ids = np.argsort(-probs, axis=-1)[:, :2]
    tensor = leaf(probs)
    loss = load_balance_loss(tensor, counted(ids, 6), 2)
    loss.backward()
    assert float(loss) == pytest.approx(load_balance(probs, ids), rel=1e-12)
    expected = numeric_gradient(lambda p: load_balance(p, ids), probs)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-8)
    np.testing.assert_array_equal(np.sort(unbiased_expert_ids(tensor, 2).numpy()), np.sort(ids))


def test_load_balance_among_the_tokens_of_several_micro_batches(rng):
    """Their losses, weighed by tokens, are the loss of all tokens together, as is the gradient."""
    parts = [softmax(rng.normal(size=(tokens, 6)) * 2) for tokens in (3, 11, 7)]
    ids = [np.argsort(-probs, axis=-1)[:, :2] for probs in parts]
    whole, chosen = np.concatenate(parts), np.concatenate(ids)
    tensors = [leaf(probs) for probs in parts]
    losses = [load_balance_loss(tensor, counted(chosen, 6), 2) for tensor in tensors]
    total = sum(loss * (len(p) / len(whole)) for loss, p in zip(losses, parts, strict=True))
    total.backward()
    assert float(total) == pytest.approx(load_balance(whole, chosen), rel=1e-12)
    alone = [load_balance(*both) for both in zip(parts, ids, strict=True)]
    apart = np.average(alone, weights=[len(p) for p in parts])
    assert float(total) != pytest.approx(apart, rel=1e-2), "each by itself would be the same"
    expected = numeric_gradient(lambda p: load_balance(p, chosen), whole)
    found = np.concatenate([tensor.grad.numpy() for tensor in tensors])
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_choices_are_counted_for_each_layer(rng):
    ids = rng.integers(0, 5, (3, 7, 2))
    found = count_tokens_per_expert([paddle.to_tensor(of_layer) for of_layer in ids], 5).numpy()
    np.testing.assert_array_equal(found, [np.bincount(x.reshape(-1), minlength=5) for x in ids])


def test_load_balance_is_top_k_at_balance_and_more_off_it():
    probs = paddle.full([8, 4], 0.25)
    even = np.array([[t % 4, (t + 1) % 4] for t in range(8)])
    assert float(load_balance_loss(probs, counted(even, 4), 2)) == pytest.approx(2.0, rel=1e-6)
    skewed = paddle.to_tensor(softmax(np.tile([3.0, 2.0, 0.0, 0.0], (8, 1))).astype(np.float32))
    both = np.tile([0, 1], (8, 1))
    assert float(load_balance_loss(skewed, counted(both, 4), 2)) > 3.0


def test_selection_bias_moves_against_the_load():
    steps = selection_bias_step(np.array([[10, 0, 5, 5], [1, 1, 1, 5]]), 0.001)
    np.testing.assert_allclose(steps[0], [-0.001, 0.001, 0.0, 0.0], atol=1e-9)
    np.testing.assert_allclose(steps[1], [0.001, 0.001, 0.001, -0.001], atol=1e-9)
    assert steps.dtype == np.float32


def test_the_cosine_by_definition(rng):
    weight = rng.normal(size=(5, 4))
    columns = weight / np.linalg.norm(weight, axis=0)
    pairs = [abs(columns[:, i] @ columns[:, j]) for i in range(4) for j in range(4) if i != j]
    assert mean_absolute_cosine(paddle.to_tensor(weight)) == pytest.approx(np.mean(pairs), rel=1e-5)
