"""FlashMask without a GPU: the index against a dense mask, the choice, the call of a stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ernie_train.core import devices
from ernie_train.model.attention import flashmask, layer
from ernie_train.model.batch_layout import BatchLayout

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
IDS = np.array([[1, 1, 0, 1, 2, 2, 2], [2, 0, 0, 3, 3, 3, 3]])


def dense_mask(ends):
    """[T,T] which queries may see which keys, as the kernel reads its causal index [1,1,T,1]:
    key j is hidden from queries before it and from queries ends[j] and later."""
    ends = np.asarray(ends).reshape(-1)
    tokens = len(ends)
    mask = np.zeros((tokens, tokens), bool)
    for key in range(tokens):
        mask[key : ends[key], key] = True
    return mask


def stand_in(query, key, value, startend_row_indices=None, *, causal=False, **other):
    """Attention with a dense mask, and the kernel's demands on shapes and types."""
    assert causal and not other
    batch, tokens, heads, head_dim = query.shape
    assert batch == 1
    assert key.shape == value.shape == [1, tokens, KEY_HEADS, head_dim]
    assert startend_row_indices.dtype == paddle.int32
    assert startend_row_indices.shape == [1, 1, tokens, 1]
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // KEY_HEADS, axis=1) for x in (k, v))
    mask = np.where(dense_mask(startend_row_indices.numpy()), 0.0, -1e30).astype(np.float32)
    scores = paddle.matmul(q, k, transpose_y=True) * head_dim**-0.5 + paddle.to_tensor(mask)
    return paddle.matmul(F.softmax(scores), v).transpose([0, 2, 1, 3])


def test_the_index_is_the_mask_of_packed_documents():
    layout = BatchLayout.from_document_ids(IDS)
    rows, columns = np.nonzero(IDS)
    # The hole in the first row ends a document, though its number goes on behind it.
    names = [f"{r}.{IDS[r, c]}.{IDS[r, :c].tolist().count(0)}" for r, c in
             zip(rows, columns, strict=True)]  # fmt: skip
    same = np.array([[a == b for b in names] for a in names])
    expected = same & np.tril(np.ones_like(same))
    ends = layout.attention(HEADS, KEY_HEADS).document_ends
    assert ends.dtype == paddle.int32
    np.testing.assert_array_equal(dense_mask(ends), expected)
    assert ends.flatten().tolist() == [2, 2, 3, 6, 6, 6, 7, 11, 11, 11, 11]


def attend(layout, seed=0):
    rng = np.random.default_rng(seed)
    rows = [layout.num_tokens * heads for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    leaves = [
        paddle.to_tensor(rng.normal(size=(n, HEAD_DIM)).astype(np.float32), stop_gradient=False)
        for n in rows
    ]
    weight = paddle.to_tensor(rng.normal(size=(rows[0], HEAD_DIM)).astype(np.float32))
    output = layer.document_attention(*leaves, layout.attention(HEADS, KEY_HEADS))
    (output * weight).sum().backward()
    return [output.numpy(), *(leaf.grad.numpy() for leaf in leaves)]


def test_the_call_gives_what_the_other_kernels_give(monkeypatch):
    layout = BatchLayout.from_document_ids(IDS)
    expected = attend(layout)
    calls = []

    def spy(*args, **kwargs):
        calls.append(1)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(F, "flashmask_attention", spy)
    monkeypatch.setattr(flashmask, "available", lambda x: True)
    results = attend(layout)
    assert calls == [1]
    for ours, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-6)


@pytest.fixture
def gpu_kernels(monkeypatch):
    """The kernels that Paddle is made to report for GPUs."""
    names = {"flashmask_attention"}

    def kernel_available(name, device):
        assert device == "gpu"
        return name in names

    monkeypatch.setattr(devices, "kernel_available", kernel_available)
    flashmask._registered.cache_clear()
    yield names
    flashmask._registered.cache_clear()


def on(gpu, dtype=paddle.bfloat16, head_dim=128):
    place = SimpleNamespace(is_gpu_place=lambda: gpu)
    return SimpleNamespace(place=place, dtype=dtype, shape=[6, head_dim])


def test_the_kernel_is_chosen_where_it_runs(gpu_kernels):
    assert flashmask.available(on(gpu=True))
    assert flashmask.available(on(gpu=True, dtype=paddle.float16, head_dim=256))
    assert not flashmask.available(on(gpu=False))
    assert not flashmask.available(on(gpu=True, dtype=paddle.float32))
    assert not flashmask.available(on(gpu=True, head_dim=12))
    assert not flashmask.available(on(gpu=True, head_dim=264))


def test_without_a_registered_kernel_it_is_not_chosen(gpu_kernels):
    gpu_kernels.clear()
    assert not flashmask.available(on(gpu=True))


def test_a_tensor_on_the_processor_takes_the_other_kernels(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("FlashMask has no kernel for processors")

    monkeypatch.setattr(F, "flashmask_attention", refuse)
    attend(BatchLayout.from_document_ids(IDS))


@pytest.mark.parametrize("length", [7, 200, 1100])
def test_without_the_kernel_bfloat16_is_computed_in_float32(length):
    """Masks are float32, and a product of two types fails; FlashMask refuses some head sizes."""
    layout = BatchLayout.full_rows(1, length)
    rows = [length * heads for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    rng = np.random.default_rng(1)
    rounded = [paddle.to_tensor(rng.normal(size=(n, HEAD_DIM)), "bfloat16") for n in rows]
    found = []
    for dtype in ("bfloat16", "float32"):
        leaves = [x.astype(dtype).detach() for x in rounded]
        for leaf in leaves:
            leaf.stop_gradient = False
        output = layer.document_attention(*leaves, layout.attention(HEADS, KEY_HEADS))
        assert output.dtype == leaves[0].dtype
        output.astype("float32").square().sum().backward()
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        found.append([x.astype("float32").numpy() for x in (output, *(x.grad for x in leaves))])
    for ours, other in zip(*found, strict=True):
        np.testing.assert_allclose(ours, other, atol=0.02 * np.abs(other).max())
