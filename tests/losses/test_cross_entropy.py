"""Referee: numpy in float64, and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import paddle
import pytest

from ernie_train import kernels
from ernie_train.losses import cross_entropy, linear_cross_entropy, token_balanced_weights


def reference(hidden, weight, bias, labels, token_weights):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    probs = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    probs[np.arange(len(labels)), labels] -= 1
    d_logits = probs * token_weights[:, None]
    grads = (d_logits @ weight, d_logits.T @ hidden, d_logits.sum(0))
    return (losses * token_weights).sum(), losses, grads


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [10, 10_000])
def test_equals_float64_and_its_gradients(monkeypatch, with_bias, chunk_elements):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk_elements)
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(13, 6)), rng.normal(size=(7, 6))
    bias = rng.normal(size=7) if with_bias else None
    labels, token_weights = rng.integers(0, 7, 13), rng.random(13)
    tensors = [
        paddle.to_tensor(x.astype(np.float32), stop_gradient=False) for x in (hidden, weight)
    ]
    bias_tensor = None
    if with_bias:
        bias_tensor = paddle.to_tensor(bias.astype(np.float32), stop_gradient=False)
    total, losses = linear_cross_entropy(
        *tensors, bias_tensor, paddle.to_tensor(labels),
        paddle.to_tensor(token_weights.astype(np.float32)),
    )  # fmt: skip
    (total * 3.0).backward()
    expected, expected_losses, grads = reference(hidden, weight, bias, labels, token_weights)
    np.testing.assert_allclose(float(total), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.numpy(), expected_losses, rtol=1e-5)
    leaves = tensors + ([bias_tensor] if with_bias else [])
    for leaf, grad in zip(leaves, grads, strict=False):
        np.testing.assert_allclose(leaf.grad.numpy(), 3.0 * grad, atol=1e-5)
    assert losses.stop_gradient, "the shown losses must carry no gradient"


@pytest.mark.parametrize("way", ["native", "plain"])
@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_only_what_trains_gets_a_gradient(monkeypatch, way, frozen):
    """An LM head that alone trains, as LoRA on it does, included; the third is a bias."""
    if way == "plain":
        monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((13, 6), (7, 6), (7,))]
    labels, token_weights = rng.integers(0, 7, 13), rng.random(13)
    for with_bias in (False, True):
        leaves = [
            paddle.to_tensor(x.astype(np.float32), stop_gradient=still)
            for x, still in zip(arrays, frozen, strict=True)
        ][: 2 + with_bias]
        total, _ = linear_cross_entropy(
            *leaves, *([] if with_bias else [None]), paddle.to_tensor(labels),
            paddle.to_tensor(token_weights.astype(np.float32)),
        )  # fmt: skip
        still = [leaf.stop_gradient for leaf in leaves]
        assert total.stop_gradient == all(still)
        if not all(still):
            total.backward()
        _, _, grads = reference(*arrays[:2], arrays[2] * with_bias, labels, token_weights)
        for leaf, grad in zip(leaves, grads, strict=False):
            assert (leaf.grad is None) == leaf.stop_gradient
            if leaf.grad is not None:
                np.testing.assert_allclose(leaf.grad.numpy(), grad, atol=1e-5)


@pytest.mark.parametrize("way", ["native", "plain"])
def test_without_a_backward_pass_no_gradient_is_computed(monkeypatch, way):
    seen = []
    if way == "plain":
        monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
        plain = cross_entropy._chunk_gradients
        monkeypatch.setattr(
            cross_entropy, "_chunk_gradients", lambda *a: seen.append(plain(*a)) or seen[-1]
        )
    else:
        native = kernels.linear_cross_entropy
        monkeypatch.setattr(
            kernels,
            "linear_cross_entropy",
            lambda *a, trains: (
                seen.append(native(*a, trains=trains)[1:]) or native(*a, trains=trains)
            ),
        )
    leaves = [paddle.ones(shape) for shape in ([3, 2], [5, 2])]
    for leaf in leaves:
        leaf.stop_gradient = False
    arguments = (*leaves, None, paddle.zeros([3], "int64"), paddle.ones([3]))
    with paddle.no_grad():
        quiet, _ = linear_cross_entropy(*arguments)
    assert all(gradient is None for found in seen for gradient in found) and seen
    loud, _ = linear_cross_entropy(*arguments)
    assert float(quiet) == float(loud) and not loud.stop_gradient


def test_a_gpu_makes_more_logits_at_once(monkeypatch):
    """The gradient of a large head passes through its memory once a chunk: few tokens cost much."""
    hidden = paddle.zeros([4000, 1])

    def sizes():
        parts = list(cross_entropy.chunks(hidden, 103_424))
        assert parts[0].start == 0 and parts[-1].stop >= 4000
        return [part.stop - part.start for part in parts]

    assert set(sizes()) == {81}
    monkeypatch.setattr(paddle.base.core.Place, "is_gpu_place", lambda self: True, raising=False)
    assert sizes() == [648] * 7


def test_extreme_logits_stay_finite():
    hidden = paddle.to_tensor([[1e4, -1e4]], stop_gradient=False)
    weight = paddle.to_tensor([[1.0, 0.0], [0.0, 1.0]], stop_gradient=False)
    total, _ = linear_cross_entropy(
        hidden, weight, None, paddle.to_tensor([1]), paddle.to_tensor([1.0])
    )
    total.backward()
    assert float(total) == pytest.approx(2e4)
    assert np.isfinite(hidden.grad.numpy()).all()


def test_token_balanced_divides_by_all_positions_of_a_sample():
    # Row 0: sample 1 has 4 positions, 1 trained; sample 2 has 2 positions, both trained; 2 padding.
    document_ids = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    loss_mask = np.array([[0, 0, 0, 1, 1, 1, 0, 0]], np.float32)
    losses = np.array([[9, 9, 9, 2.0, 3.0, 5.0, 9, 9]], np.float32)
    weights, samples = token_balanced_weights(loss_mask, document_ids)
    total = (losses * weights).sum()
    assert float(total) == pytest.approx(2.0 / 4 + (3.0 + 5.0) / 2)
    assert samples == 2
    by_trained_tokens_alone = 2.0 / 1 + (3.0 + 5.0) / 2
    assert float(total) != pytest.approx(by_trained_tokens_alone)


def test_same_document_id_in_two_rows_is_two_samples():
    document_ids = np.array([[1, 1], [1, 0]])
    mask = np.array([[1, 1], [1, 0]], np.float32)
    losses = np.array([[1, 3], [7, 9]], np.float32)
    weights, samples = token_balanced_weights(mask, document_ids)
    total = (losses * weights).sum()
    assert (float(total), float(samples)) == (pytest.approx(2.0 + 7.0), 2.0)


def test_labels_of_int32_are_read_as_such_and_no_tokens_are_refused():
    hidden, weight, labels = paddle.ones([3, 2]), paddle.eye(2), paddle.to_tensor([0, 1, 1])
    both = [
        linear_cross_entropy(hidden, weight, None, labels.astype(dtype), paddle.ones([3]))
        for dtype in ("int32", "int64")
    ]
    assert float(both[0][0]) == float(both[1][0])
    with pytest.raises(ValueError, match="no tokens"):
        linear_cross_entropy(hidden[:0], weight, None, paddle.zeros([0], "int64"), paddle.ones([0]))
