"""Referee: softmax attention of one document in float64 numpy, its gradients by hand."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.model.attention import online
from ernie_train.model.batch_layout import Bucket

GROUP, BLOCK, BLOCKS, LANES, HEAD_DIM = 2, 8, 4, 3, 5
LENGTH = BLOCKS * BLOCK


def bucket(group=GROUP, block=BLOCK, blocks=BLOCKS, lanes=LANES):
    nothing = paddle.zeros([0], "int64")
    return Bucket(lanes, blocks, block, group, nothing, nothing)


def arrays(seed=0, scale=1.0):
    """q [lanes,blocks,G,block,D] and k, v [lanes,L,D], then a gradient like q; float32."""
    rng = np.random.default_rng(seed)
    rows = (LANES, BLOCKS, GROUP, BLOCK, HEAD_DIM)
    keys = (LANES, LENGTH, HEAD_DIM)
    q, k, v, grad = (rng.normal(size=shape) for shape in (rows, keys, keys, rows))
    return [x.astype(np.float32) for x in (q * scale, k, v, grad)]


def referee(q, k, v, grad):
    """(output, lse, dq, dk, dv) in float64; the lanes' query heads one after another."""
    q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
    hidden = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    output, lse, dq = np.zeros_like(q), np.zeros(q.shape[:-1]), np.zeros_like(q)
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    for lane in range(LANES):
        for head in range(GROUP):
            queries = q[lane, :, head].reshape(LENGTH, HEAD_DIM)
            g = grad[lane, :, head].reshape(LENGTH, HEAD_DIM)
            scores = np.where(hidden, -np.inf, queries @ k[lane].T)
            top = scores.max(1, keepdims=True)
            sums = np.exp(scores - top).sum(1, keepdims=True)
            p = np.exp(scores - top) / sums
            dp = g @ v[lane].T
            ds = p * (dp - (p * dp).sum(1, keepdims=True))
            shape = (BLOCKS, BLOCK, -1)
            output[lane, :, head] = (p @ v[lane]).reshape(shape)
            lse[lane, :, head] = (top + np.log(sums)).reshape(BLOCKS, BLOCK)
            dq[lane, :, head] = (ds @ k[lane]).reshape(shape)
            dk[lane] += ds.T @ queries
            dv[lane] += p.T @ g
    return output, lse, dq, dk, dv


def ours(q, k, v, grad, dtype="float32"):
    tensors = [paddle.to_tensor(x.reshape(-1, HEAD_DIM)).astype(dtype) for x in (q, k, v, grad)]
    output, kept = online.forward(bucket(), *tensors[:3])
    delta = (output * tensors[3]).sum(-1, keepdim=True)
    grads = online.backward(bucket(), kept, tuple(tensors), delta)
    assert {x.dtype for x in (output, *grads)} == {tensors[0].dtype}
    results = [x.astype("float32").numpy() for x in (output, kept[0], *grads)]
    shapes = [q.shape, q.shape[:-1], q.shape, k.shape, v.shape]
    return [x.reshape(shape) for x, shape in zip(results, shapes, strict=True)]


def assert_near(results, x, tolerance=2e-6):
    """`tolerance` is what float32 loses in a probability; a gradient of q multiplies it by keys."""
    q, k, v, _ = x
    sizes = {"output": v, "lse": np.ones(1), "dq": k, "dk": q, "dv": np.ones(1)}
    for (name, factor), a, b in zip(sizes.items(), results, referee(*x), strict=True):
        limit = tolerance * max(1.0, np.abs(b).max(), np.abs(factor).max())
        np.testing.assert_allclose(a, b, atol=limit, rtol=0, err_msg=name)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_equals_float64_with_gradients(scale):
    x = arrays(scale=scale)
    assert_near(ours(*x), x)


@pytest.mark.parametrize("height", [30.0, 60.0, 1000.0])
@pytest.mark.parametrize("early_key", [0, BLOCK + 3])
def test_a_key_far_above_the_diagonal_block(height, early_key):
    """Its scores rise above the references by less than the headroom, more, and beyond float32."""
    q, k, v, grad = arrays(seed=1, scale=0.1)
    q[..., 0] = 1.0
    k[..., 0] = 0.0
    k[:, early_key, 0] = height
    k[:, early_key + 9, 0] = height / 2  # another block, whose maximum is lower
    results = ours(q, k, v, grad)
    assert all(np.isfinite(x).all() for x in results)
    # A score is known to within 1e-7 of its size, and so is its exponential.
    assert_near(results, (q, k, v, grad), 2e-7 * height)


def test_references_rise_more_than_once():
    q, k, v, grad = arrays(seed=2, scale=0.1)
    q[..., 0] = 1.0
    k[..., 0] = 0.0
    for block, height in enumerate((50.0, 100.0, 150.0)):
        k[:, block * BLOCK + 2, 0] = height
    assert_near(ours(q, k, v, grad), (q, k, v, grad), 2e-7 * height)


def test_one_block_and_many_are_the_same():
    """Blocks of 4 and of 32 keys: only the order of additions differs."""
    rng = np.random.default_rng(3)
    k, v, q = (paddle.to_tensor(rng.normal(size=(32, 4)).astype(np.float32)) for _ in range(3))
    whole, _ = online.forward(bucket(1, 32, 1, 1), q, k, v)
    parts, _ = online.forward(bucket(1, 4, 8, 1), q, k, v)
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    """Inputs and outputs alone are rounded; a log-sum-exp in bfloat16 would be off by 1 %."""
    x = [paddle.to_tensor(a).astype("bfloat16").astype("float32").numpy() for a in arrays()]
    results, expected = ours(*x, dtype="bfloat16"), referee(*x)
    np.testing.assert_allclose(results[1], expected[1], atol=1e-5)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_stays_so(place):
    """The trainer refuses such a step; a swallowed NaN would train on."""
    q, k, v, grad = arrays()
    {"q": q, "k": k, "v": v}[place].reshape(-1)[0] = np.nan
    results = ours(q, k, v, grad)
    assert not np.isfinite(results[0]).all()
    assert not np.isfinite(results[2]).all()


def test_nothing_is_larger_than_a_block_of_scores(monkeypatch):
    """No product makes more than R x C numbers and only D+1 a row are kept, so memory is linear."""
    sizes = []
    matmul = paddle.matmul

    def spy(*args, **kwargs):
        product = matmul(*args, **kwargs)
        sizes.append(product.size)
        return product

    monkeypatch.setattr(paddle, "matmul", spy)
    x = [paddle.to_tensor(a.reshape(-1, HEAD_DIM)) for a in arrays()]
    _, kept = online.forward(bucket(), *x[:3])
    online.backward(bucket(), kept, tuple(x), paddle.zeros([x[0].shape[0], 1]))
    assert max(sizes) == GROUP * BLOCK * BLOCK
    pairs = LANES * BLOCKS * (BLOCKS + 1) // 2
    # Two products forward and five backward for each pair on or below the diagonal, no others.
    assert len(sizes) == 7 * pairs
    assert [list(t.shape) for t in kept] == [[x[0].shape[0], 1]]
