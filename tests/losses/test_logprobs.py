"""Referee: numpy in float64, its gradients by finite differences."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.losses import (
    cross_entropy,
    cross_entropy_rows,
    linear_cross_entropy,
    token_logprobs,
)
from ernie_train.losses import logprobs as logprobs_module
from tests.losses.finite_differences import gradient

TOKENS, HIDDEN, VOCABULARY = 7, 4, 5


def reference(hidden, weight, bias, ids, temperature):
    logits = (hidden @ weight.T + bias) / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return rows[np.arange(len(ids)), ids], -(np.exp(rows) * rows).sum(-1)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=shape) for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    ]
    return arrays, rng.integers(0, VOCABULARY, TOKENS), rng.normal(size=(2, TOKENS))


@pytest.mark.parametrize("chunk_elements", [12, 10_000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("parts", [(1, 0), (0, 1), (1, 1)])
def test_values_and_gradients(monkeypatch, case, parts, temperature, with_bias, chunk_elements):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk_elements)
    arrays, ids, (of_logprobs, of_entropy) = case
    if not with_bias:
        arrays = [*arrays[:2], np.zeros(VOCABULARY)]
    leaves = [paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in arrays]
    logprobs, entropy = token_logprobs(
        *leaves[:2], leaves[2] if with_bias else None, paddle.to_tensor(ids),
        temperature=temperature, with_entropy=True,
    )  # fmt: skip
    expected = reference(*arrays, ids, temperature)
    np.testing.assert_allclose(logprobs.numpy(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(entropy.numpy(), expected[1], rtol=1e-5)
    weights = [parts[0] * of_logprobs, parts[1] * of_entropy]
    sums = [
        (tensor * paddle.to_tensor(w.astype(np.float32))).sum()
        for tensor, w, wanted in zip((logprobs, entropy), weights, parts, strict=True)
        if wanted
    ]
    sum(sums[1:], sums[0]).backward()
    for i, tensor in enumerate(leaves[: 2 + with_bias]):

        def objective(z, i=i):
            changed = [*arrays[:i], z, *arrays[i + 1 :]]
            return np.sum(np.array(weights) * reference(*changed, ids, temperature))

        np.testing.assert_allclose(tensor.grad.numpy(), gradient(objective, arrays[i]), atol=3e-6)


def test_a_detached_entropy_costs_backward_nothing(monkeypatch, case):
    monkeypatch.setattr(logprobs_module.kernels, "usable", lambda *tensors: False)
    arrays, ids, _ = case
    calls = []
    plain = logprobs_module._weighted_logits
    monkeypatch.setattr(
        logprobs_module, "_weighted_logits", lambda *args: calls.append(1) or plain(*args)
    )
    for detached, expected in ((True, 1), (False, 2)):
        calls.clear()
        leaf = paddle.to_tensor(arrays[0].astype(np.float32), stop_gradient=False)
        weight = paddle.to_tensor(arrays[1].astype(np.float32))
        logprobs, entropy = token_logprobs(
            leaf, weight, None, paddle.to_tensor(ids), with_entropy=True
        )
        (logprobs.sum() + (entropy.detach() if detached else entropy).sum()).backward()
        assert len(calls) == expected, "one forward, and one backward where it has a gradient"


def test_without_entropy_and_with_a_detached_one_the_bits_are_the_same(case):
    arrays, ids, (of_logprobs, _) = case
    grads = []
    for with_entropy in (False, True):
        leaves = [paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in arrays]
        logprobs, entropy = token_logprobs(
            *leaves, paddle.to_tensor(ids), temperature=0.9, with_entropy=with_entropy
        )
        assert (entropy is not None) == with_entropy
        total = (logprobs * paddle.to_tensor(of_logprobs.astype(np.float32))).sum()
        if entropy is not None:
            total = total + entropy.detach().sum()
        total.backward()
        grads.append([leaf.grad.numpy() for leaf in leaves])
    for plain, shown in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, shown)


def test_logprobs_are_the_losses_of_supervised_training(case):
    arrays, ids, (of_logprobs, _) = case
    weights = paddle.to_tensor(of_logprobs.astype(np.float32))
    grads = []
    for supervised in (True, False):
        leaves = [paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in arrays]
        if supervised:
            total, losses = linear_cross_entropy(*leaves, paddle.to_tensor(ids), weights)
        else:
            logprobs, _ = token_logprobs(*leaves, paddle.to_tensor(ids))
            np.testing.assert_array_equal(-logprobs.numpy(), losses.numpy())
            total = -(logprobs * weights).sum()
        total.backward()
        grads.append([leaf.grad.numpy() for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("native", [False, True])
def test_the_sampler_s_logprobs_have_the_same_bits_by_the_same_operators(native, monkeypatch):
    if not native:
        monkeypatch.setattr(logprobs_module.kernels, "usable", lambda *tensors: False)
    rng = np.random.default_rng(1)
    hidden, weight = (
        paddle.to_tensor(rng.normal(size=s).astype(np.float32)) for s in ((9, 16), (33, 16))
    )
    ids = paddle.to_tensor(rng.integers(0, 33, 9))
    logits = paddle.matmul(hidden, weight, transpose_y=True).astype("float32") / 0.8
    sampled = -cross_entropy_rows(logits, ids)[0]
    logprobs, _ = token_logprobs(hidden, weight, None, ids, temperature=0.8)
    if native:  # sums in another order
        np.testing.assert_allclose(logprobs.numpy(), sampled.numpy(), rtol=2e-6)
    else:
        np.testing.assert_array_equal(logprobs.numpy(), sampled.numpy())


@pytest.mark.parametrize("chunk_elements", [12, 10_000])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2)])
def test_frozen_inputs_take_no_gradient_and_none_is_computed(
    monkeypatch, case, frozen, chunk_elements
):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk_elements)
    shapes = []
    plain = paddle.matmul

    def watched(*args, **options):
        shapes.append(plain(*args, **options).shape)
        return plain(*args, **options)

    arrays, ids, _ = case
    leaves = [
        paddle.to_tensor(a.astype(np.float32), stop_gradient=i in frozen)
        for i, a in enumerate(arrays)
    ]
    logprobs, _ = token_logprobs(*leaves, paddle.to_tensor(ids))
    monkeypatch.setattr(paddle, "matmul", watched)
    logprobs.sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(3)]
    assert ([VOCABULARY, HIDDEN] in shapes) == (1 not in frozen)
    assert ([VOCABULARY, 1] in shapes) == (2 not in frozen)


def test_extreme_logits_stay_finite_with_their_gradients():
    hidden = paddle.to_tensor([[1e4, -1e4], [0.0, 0.0]], stop_gradient=False)
    weight = paddle.to_tensor([[1.0, 0.0], [0.0, 1.0]], stop_gradient=False)
    logprobs, entropy = token_logprobs(
        hidden, weight, None, paddle.to_tensor([1, 1]), with_entropy=True
    )
    (logprobs.sum() + entropy.sum()).backward()
    np.testing.assert_allclose(logprobs.numpy(), [-2e4, -np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(entropy.numpy(), [0, np.log(2)], rtol=1e-6, atol=1e-20)
    np.testing.assert_allclose(hidden.grad.numpy(), [[-1, 1], [-0.5, 0.5]])


def test_a_nearly_certain_row_keeps_the_digits_of_its_entropy():
    """Large logits of one sign: log-sum-exp minus the mean logit would lose everything."""
    gap = 12.0
    hidden, weight = paddle.to_tensor([[1000.0, 1.0]]), paddle.to_tensor([[1.0, gap], [1.0, 0.0]])
    _, entropy = token_logprobs(hidden, weight, None, paddle.to_tensor([0]), with_entropy=True)
    p = 1 / (1 + np.exp(-gap))
    exact = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    np.testing.assert_allclose(entropy.numpy(), [exact], rtol=2e-2)


def test_backward_keeps_no_logits(monkeypatch, case):
    """Only one chunk's logits exist at a time, forward and backward."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 * VOCABULARY)
    rows = []
    plain = cross_entropy_rows

    def counted(logits, labels):
        rows.append(len(logits))
        return plain(logits, labels)

    monkeypatch.setattr(logprobs_module, "cross_entropy_rows", counted)
    arrays, ids, _ = case
    leaves = [paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in arrays]
    logprobs, entropy = token_logprobs(*leaves, paddle.to_tensor(ids), with_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert rows == [2, 2, 2, 1] * 2


def through_float32(operation):
    """`operation` on bfloat16 tensors, for which Paddle has no kernel on a processor."""

    def run(*args, **options):
        wide = [
            a.astype("float32")
            if isinstance(a, paddle.Tensor) and a.dtype == paddle.bfloat16
            else a
            for a in args
        ]
        assert len({a.dtype for a in args if isinstance(a, paddle.Tensor)} - {paddle.int64}) == 1
        return operation(*wide, **options).astype(args[0].dtype)

    return run


def compute_in_bfloat16(monkeypatch):
    """Let operations take bfloat16 tensors; those on float32 stay as they are."""
    operations = {
        paddle: ("matmul",),
        paddle.Tensor: ("add_", "__add__", "__mul__", "__neg__", "subtract_", "multiply_"),
    }
    for owner, names in operations.items():
        for name in names:
            operation = getattr(owner, name)
            narrow = through_float32(operation)
            monkeypatch.setattr(
                owner, name,
                lambda *args, plain=operation, narrow=narrow, **options: (
                    narrow if args[0].dtype == paddle.bfloat16 else plain
                )(*args, **options),
            )  # fmt: skip


def test_bfloat16_head(monkeypatch):
    """As on a GPU: gradients in bfloat16, what lies before them in float32."""
    compute_in_bfloat16(monkeypatch)
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((6, 8), (5, 8), (5,))]
    rounded = [paddle.to_tensor(a).astype("bfloat16") for a in arrays]
    exact = [t.astype("float32").numpy().astype(np.float64) for t in rounded]
    for tensor in rounded:
        tensor.stop_gradient = False
    ids = rng.integers(0, 5, 6)
    logprobs, entropy = token_logprobs(*rounded, paddle.to_tensor(ids), with_entropy=True)
    assert logprobs.dtype == entropy.dtype == paddle.float32
    expected = reference(*exact, ids, 1.0)
    np.testing.assert_allclose(logprobs.numpy(), expected[0], atol=1e-5)
    np.testing.assert_allclose(entropy.numpy(), expected[1], atol=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    for i, tensor in enumerate(rounded):
        slopes = gradient(
            lambda z, i=i: np.sum(reference(*exact[:i], z, *exact[i + 1 :], ids, 1.0)), exact[i]
        )
        np.testing.assert_allclose(tensor.grad.astype("float32").numpy(), slopes, atol=0.1)


def large_logits(tokens=64):
    """Hidden states and a head in bfloat16 whose logits go up to 20, and the exact logits."""
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(512, 64)).astype(np.float32)
    hidden = 0.25 * weight[rng.integers(0, 512, tokens)] + rng.normal(0, 0.05, (tokens, 64))
    rounded = [paddle.to_tensor(a.astype(np.float32)).astype("bfloat16") for a in (hidden, weight)]
    exact = [t.astype("float32").numpy().astype(np.float64) for t in rounded]
    logits = exact[0] @ exact[1].T
    assert 18 < logits.max() < 32
    return rounded, logits


def test_logprobs_of_a_bfloat16_head_are_those_of_its_exact_logits(monkeypatch):
    compute_in_bfloat16(monkeypatch)
    (hidden, weight), logits = large_logits()
    ids = np.random.default_rng(7).integers(0, 512, len(logits))
    top = logits.max(-1, keepdims=True)
    exact = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    logprobs, entropy = token_logprobs(
        hidden, weight, None, paddle.to_tensor(ids), with_entropy=True
    )
    np.testing.assert_allclose(logprobs.numpy(), exact[np.arange(len(ids)), ids], atol=1e-4)
    np.testing.assert_allclose(entropy.numpy(), -(np.exp(exact) * exact).sum(-1), atol=1e-4)


def head_gradients(arrays, ids, dtype, supervised):
    """Gradients of hidden states and head, rounded to bfloat16 and computed in `dtype`."""
    leaves = [paddle.to_tensor(a).astype("bfloat16").astype(dtype) for a in arrays]
    for leaf in leaves:
        leaf.stop_gradient = False
    if supervised:
        total, _ = linear_cross_entropy(*leaves, None, ids, paddle.ones([len(ids)]))
    else:
        total = token_logprobs(*leaves, None, ids)[0].sum()
    total.backward()
    return [leaf.grad.astype("float32").numpy() for leaf in leaves]


@pytest.mark.parametrize("supervised", [True, False])
def test_bfloat16_gradients_of_many_chunks_are_summed_in_float32(monkeypatch, supervised):
    """A sum in bfloat16 would be off by a tenth: small parts of it are rounded away."""
    compute_in_bfloat16(monkeypatch)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 16)
    rng = np.random.default_rng(3)
    arrays = [rng.normal(0.5, 1, size=s).astype(np.float32) for s in ((1000, 4), (16, 4))]
    ids = paddle.to_tensor(rng.integers(0, 16, 1000))
    exact, ours = (head_gradients(arrays, ids, d, supervised)[1] for d in ("float32", "bfloat16"))
    assert np.linalg.norm(ours - exact) < 5e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("supervised", [True, False])
def test_a_bfloat16_head_learns_from_tokens_that_it_nearly_knows(monkeypatch, supervised):
    """0.998 is 1 in bfloat16: rounded before 1 is taken from it, a gradient would be all wrong."""
    compute_in_bfloat16(monkeypatch)
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(16, 8)).astype(np.float32)
    ids = rng.integers(0, 16, 64)
    hidden = 2 * weight[ids] + rng.normal(0, 0.1, size=(64, 8)).astype(np.float32)
    logits = hidden @ weight.T
    known = np.exp(logits - logits.max(-1, keepdims=True))
    known = (known / known.sum(-1, keepdims=True))[np.arange(64), ids]
    hidden, ids = (a[(known > 0.98) & (known < 0.9999)] for a in (hidden, ids))
    assert len(ids) > 10
    exact, ours = (
        head_gradients((hidden, weight), paddle.to_tensor(ids), dtype, supervised)
        for dtype in ("float32", "bfloat16")
    )
    for right, found in zip(exact, ours, strict=True):
        assert np.linalg.norm(found - right) < 0.06 * np.linalg.norm(right)


@pytest.mark.parametrize(
    "tokens, temperature, message", [(0, 1.0, "no tokens"), (2, 0.0, "temperature=0.0")]
)
def test_mistakes_are_refused(tokens, temperature, message):
    ids = paddle.zeros([tokens], "int64")
    with pytest.raises(ValueError, match=message):
        token_logprobs(
            paddle.ones([tokens, 3]), paddle.ones([4, 3]), None, ids, temperature=temperature
        )


def test_second_derivatives_are_refused_not_missing(case):
    (hidden, weight, bias), ids, _ = case
    leaves = [paddle.to_tensor(a.astype(np.float32), stop_gradient=False) for a in (hidden, weight)]
    logprobs, _ = token_logprobs(*leaves, paddle.to_tensor(bias, "float32"), paddle.to_tensor(ids))
    # Paddle wraps what a backward pass raises.
    with pytest.raises(OSError, match="RuntimeError: this backward pass has no derivative"):
        paddle.grad(logprobs.sum(), leaves, create_graph=True)
