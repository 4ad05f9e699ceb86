"""Causal attention within documents, with probabilities kept for the backward pass.

A bucket of short documents is one batched block. A longer document is computed lane by lane and
block by block, so that masked keys cost nothing and every slice is contiguous; a lane is one
document under one key/value head. Longer ones still are computed by `online`.

Shapes: N query heads, K key/value heads, G = N/K, D head dimension, L padded length of a bucket.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_train.model.batch_layout import Bucket

_MASKED = -1e30  # finite, so that a row of padding gives no NaN


@lru_cache(maxsize=64)
def _causal_mask(group: int, block: int) -> np.ndarray:
    triangle = np.triu(np.full((block, block), _MASKED, np.float32), k=1)
    return np.tile(triangle, (group, 1))


def causal_mask(bucket: Bucket) -> Tensor:
    """Return [G*block, block] for a block on the diagonal: 0 where key j <= query i, else -1e30."""
    return paddle.to_tensor(_causal_mask(bucket.group, bucket.block))


def with_column(x: Tensor, column: Tensor) -> Tensor:
    """Return [x, column]: with one more feature, a matrix product also adds or subtracts a bias."""
    return paddle.concat([x, column], axis=-1)


def with_ones(x: Tensor) -> Tensor:
    """Return [x, 1] for x [rows,D]."""
    return with_column(x, paddle.ones([x.shape[0], 1], x.dtype))


def forward(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute q [lanes*blocks*G*block,D], k and v [lanes*L,D] -> output like q, probabilities.

    The caller has scaled q by 1 / sqrt(D). `backward` takes the probabilities as `kept`.
    """
    mask = causal_mask(bucket)
    if bucket.blocks == 1:
        q, k, v = (x.reshape([bucket.lanes, -1, x.shape[-1]]) for x in (q, k, v))
        scores = paddle.matmul(q, k, transpose_y=True)
        # Paddle 3.3.1 on a CPU, 256 lanes of 96 x 48 scores: adding the broadcast mask takes 0.66
        # ms, adding its expanded copy 0.27, the copy included.
        scores = scores.add_(paddle.expand(mask, scores.shape))
        probabilities = F.softmax(scores)
        output = paddle.matmul(probabilities, v)
        return output.reshape([-1, output.shape[-1]]), [probabilities]
    outputs, kept = [], []
    for q_block, k_seen, v_seen in _blocks(bucket, q, k, v):
        past = k_seen.shape[0] - bucket.block
        scores = paddle.matmul(q_block, k_seen[past:], transpose_y=True).add_(mask)
        if past:
            before = paddle.matmul(q_block, k_seen[:past], transpose_y=True)
            scores = paddle.concat([before, scores], axis=-1)
        kept.append(F.softmax(scores))
        outputs.append(paddle.matmul(kept[-1], v_seen))
    return paddle.concat(outputs), kept


def backward(
    bucket: Bucket, kept: list[Tensor], tensors: tuple[Tensor, ...], delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `kept` are the probabilities from `forward`.

    `tensors`: q, k, v and the output's gradient; `delta` [rows,1]: sum over D of gradient * output.
    """
    q, k, v, grad = tensors
    # [grad, -delta] [v, 1]^T = grad v^T - delta: the product does the subtraction.
    centred, v = with_column(grad, -delta), with_ones(v)
    if bucket.blocks == 1:
        lanes = [x.reshape([bucket.lanes, -1, x.shape[-1]]) for x in (q, k, v, grad, centred)]
        grads = _block_backward(kept[0], *lanes)
        dq, dk, dv = (x.reshape([-1, x.shape[-1]]) for x in grads)
        return dq, dk, dv
    dq_blocks = []
    dk, dv = paddle.zeros_like(k), paddle.zeros_like(k)
    blocks = zip(
        kept,
        _blocks(bucket, q, k, v),
        _blocks(bucket, grad, dk, dv),
        _blocks(bucket, centred, k, v),
        strict=True,
    )
    for probabilities, (q_block, k_seen, v_seen), (grad_block, dk_seen, dv_seen), seen in blocks:
        dq_block, dk_block, dv_block = _block_backward(
            probabilities, q_block, k_seen, v_seen, grad_block, seen[0]
        )
        dq_blocks.append(dq_block)
        dk_seen.add_(dk_block)  # a view of dk: adds in place
        dv_seen.add_(dv_block)
    return paddle.concat(dq_blocks), dk, dv


def _blocks(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Yield (queries of a block, keys up to it, values up to it) as views, lane by lane."""
    rows = bucket.group * bucket.block
    for lane in range(bucket.lanes):
        for block in range(bucket.blocks):
            start = (lane * bucket.blocks + block) * rows
            first = lane * bucket.length
            seen = first + (block + 1) * bucket.block
            yield q[start : start + rows], k[first:seen], v[first:seen]


def _block_backward(
    probabilities: Tensor, q: Tensor, k: Tensor, v_one: Tensor, grad: Tensor, centred: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dv = paddle.matmul(probabilities, grad, transpose_x=True)
    d_scores = paddle.matmul(centred, v_one, transpose_y=True).multiply_(probabilities)
    return paddle.matmul(d_scores, k), paddle.matmul(d_scores, q, transpose_x=True), dv
