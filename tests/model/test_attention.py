"""Referee: attention with a full mask in plain operations, differentiated by autograd."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train import kernels
from ernie_train.model import KVCache, batch_layout
from ernie_train.model.attention import blocked, layer, online
from ernie_train.model.attention.layer import document_attention
from ernie_train.model.batch_layout import BatchLayout
from tests.losses.test_logprobs import compute_in_bfloat16
from tests.small_models import make_config


def plain_attention(q, k, v, segment_of_token, heads, key_heads):
    """softmax(q k^T / sqrt(D)) v with a [T,T] mask; q [T*N,D], k and v [T*K,D]."""
    tokens, head_dim = len(segment_of_token), q.shape[-1]
    q = q.reshape([tokens, heads, head_dim]).transpose([1, 0, 2])
    k, v = (x.reshape([tokens, key_heads, head_dim]).transpose([1, 0, 2]) for x in (k, v))
    k, v = (x.repeat_interleave(heads // key_heads, axis=0) for x in (k, v))
    same = segment_of_token[:, None] == segment_of_token[None, :]
    allowed = same & np.tril(np.ones((tokens, tokens), bool))
    mask = paddle.to_tensor(np.where(allowed, 0.0, -1e30).astype(np.float32))
    scores = paddle.matmul(q, k, transpose_y=True) * head_dim**-0.5 + mask
    out = paddle.matmul(paddle.nn.functional.softmax(scores), v)
    return out.transpose([1, 0, 2]).reshape([-1, head_dim])


def compare(document_ids, heads, key_heads, head_dim=4, seed=0):
    layout = BatchLayout.from_document_ids(document_ids)
    tokens = layout.num_tokens
    rng = np.random.default_rng(seed)
    shapes = [(tokens * heads, head_dim)] + [(tokens * key_heads, head_dim)] * 2
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weight = paddle.to_tensor(rng.normal(size=shapes[0]).astype(np.float32))
    owner = np.concatenate([np.full(s.length, i) for i, s in enumerate(layout.documents)])
    results = []
    ours = partial(document_attention, layout=layout.attention(heads, key_heads))
    masked = partial(plain_attention, segment_of_token=owner, heads=heads, key_heads=key_heads)
    for attend, operators in (
        (masked, nullcontext),
        (ours, nullcontext),  # the native kernel
        (ours, kernels.plain_operators),  # `blocked` and `online`
    ):
        leaves = [paddle.to_tensor(a, stop_gradient=False) for a in arrays]
        with operators():
            out = attend(*leaves)
            (out * weight).sum().backward()
        results.append([out.numpy(), *(leaf.grad.numpy() for leaf in leaves)])
    expected, *found = results
    for one in found:
        for a, b in zip(one, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "lengths",
    [
        [[5, 3, 9, 1]],
        [[250], [250]],  # longer than a batched block, equal lengths in one bucket
        [[200, 130, 40], [255]],  # blocked documents whose last block is partly empty
        [[192, 193]],  # both sides of the border
        [[256, 257]],  # and of the one beyond which nothing is kept
        [[280, 30], [140, 280]],  # long ones of equal length in one bucket
    ],
)
def test_equals_a_full_mask_with_gradients(monkeypatch, lengths):
    for name, size in (("KEPT_LENGTH", 256), ("_LONG_BLOCK", 96)):  # 1024 takes the mask 10 s
        monkeypatch.setattr(batch_layout, name, size)
    width = max(sum(row) for row in lengths) + 7
    ids = np.zeros((len(lengths), width), np.int64)
    for row, documents in zip(ids, lengths, strict=True):
        row[: sum(documents)] = np.repeat(np.arange(1, len(documents) + 1), documents)
    compare(ids, heads=4, key_heads=2)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
)
def test_any_packing_with_holes(rows, heads):
    width = max(sum(row) + len(row) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    for row, documents in zip(ids, rows, strict=True):
        at = 0
        for number, length in enumerate(documents, 1):
            row[at : at + length] = number
            at += length + number % 2  # a hole of padding behind every second document
    compare(ids, *heads)


def test_only_long_documents_are_recomputed():
    """What is kept for the backward pass grows with the length, not with its square."""
    ids = np.repeat([1, 2, 3, 4], [1025, 1024, 300, 8])[None]
    gathering = BatchLayout.from_document_ids(ids).attention(4, 2).gathered
    kept = []
    for bucket in gathering.buckets:
        q = paddle.ones([len(bucket.query_rows), 4])
        k, v = (paddle.ones([len(bucket.key_rows), 4]) for _ in range(2))
        kernel = online if bucket.is_long else blocked
        kept.append(sum(x.size for x in kernel.forward(bucket, q, k, v)[1]))
    # A number for each head and query; then 4 heads of 8 (3) blocks of 128 (104) queries.
    expected = [4 * 1056, 4 * 36 * 128 * 128, 4 * 6 * 104 * 104, 4 * 8 * 8]
    assert kept == expected


def test_documents_are_split_at_padding_and_at_row_ends():
    ids = np.array([[1, 1, 0, 1, 2], [2, 2, 0, 0, 3]])
    layout = BatchLayout.from_document_ids(ids)
    assert [(s.start, s.length) for s in layout.documents] == [
        (0, 2), (2, 1), (3, 1), (4, 2), (6, 1),
    ]  # fmt: skip
    assert layout.default_positions().tolist() == [0, 1, 0, 0, 0, 1, 0]
    assert layout.row_counts.tolist() == [4, 3]


@pytest.mark.parametrize("elements", [1, 64 * 1024 * 1024])
def test_cached_attention_in_bfloat16_has_scores_of_float32(monkeypatch, elements):
    """A score of 20 has a rounding of 0.06 in bfloat16, which is that of its probability."""
    compute_in_bfloat16(monkeypatch)
    monkeypatch.setattr(layer, "WIDENED_ELEMENTS", elements)
    rng = np.random.default_rng(3)
    config = make_config(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    cache = KVCache(config, 3, "bfloat16")
    lengths = np.array([9, 5, 7])
    cache.begin(BatchLayout.from_document_ids((np.arange(9) < lengths[:, None]).astype(int)))
    keys, values, queries = (
        paddle.to_tensor(rng.normal(size=shape).astype(np.float32)).astype("bfloat16")
        for shape in ((6, cache.capacity, 8), (6, cache.capacity, 8), (12, 8))
    )
    queries = (6 * queries.astype("float32")).astype("bfloat16")
    cache.begin(BatchLayout.full_rows(3, 1))
    found = layer.cached_attention(queries, cache.step, keys, values)
    assert found.dtype == paddle.bfloat16
    k, v, q = (t.astype("float32").numpy().astype(np.float64) for t in (keys, values, queries))
    tops = []
    for at in range(12):
        lane, slots = at // 2, int(cache.lengths[at // 4])
        scores = k[lane, :slots] @ q[at] / np.sqrt(8)
        tops.append(np.abs(scores).max())
        probs = np.exp(scores - scores.max())
        exact = probs @ v[lane, :slots] / probs.sum()
        # Probabilities and outputs have 8 bits.
        np.testing.assert_allclose(found[at].astype("float32").numpy(), exact, atol=0.012)
    assert max(tops) > 15
