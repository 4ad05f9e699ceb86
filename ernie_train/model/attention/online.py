"""Causal attention of long documents with an online softmax: memory linear in their length.

FlashAttention-2 (arXiv:2307.08691). The forward pass keeps the output and each row's log-sum-exp,
the backward pass makes the probabilities again from it, one block of queries against one block of
keys at a time. Blocks above the diagonal are never touched. A lane is one document under one
key/value head; its G query heads are scored together. All in float32, whatever the inputs are.

On a CPU a row's maximum costs as much as a product, so it is taken in the block on the diagonal
alone and serves as the reference of the whole row: the block's sum is at least 1 under it, and what
stands above it elsewhere does no harm while exp(scores) is far from overflow. A block that exceeds
its references by more than `_HEADROOM` raises them.

Shapes: R = G*block rows of a block of queries, C = block keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.model.attention.blocked import causal_mask, with_column, with_ones
from ernie_train.model.batch_layout import Bucket
from ernie_train.model.pylayer import as_dtype

_HEADROOM = 40.0  # exp(40) = 2e17: float32 ends at 3e38, and a row adds up some 1e5 of them


@lru_cache(maxsize=64)
def _allowed(group: int, block: int) -> np.ndarray:
    return np.tile(np.tril(np.ones((block, block), np.float32)), (group, 1))


class _Diagonal:
    """What a block of queries needs to attend to its own keys: later ones are hidden."""

    def __init__(self, bucket: Bucket) -> None:
        self.mask = causal_mask(bucket)
        self.allowed = paddle.to_tensor(_allowed(bucket.group, bucket.block))

    def exp(self, scores: Tensor) -> Tensor:
        """exp(scores) in their place, 0 where masked.

        Paddle's exp ends at 3e-39, and products with such numbers take several times longer.
        """
        return scores.exp_().multiply_(self.allowed)


def _split(bucket: Bucket, x: Tensor, lane: int) -> list[Tensor]:
    """The blocks of a lane, in float32."""
    rows = x.shape[0] // bucket.lanes
    part = as_dtype(x[lane * rows : (lane + 1) * rows], paddle.float32)
    return list(part.split(bucket.blocks))


def _each(combine: Callable[..., Tensor], *blocks: list[Tensor]) -> list[Tensor]:
    return [combine(*parts) for parts in zip(*blocks, strict=True)]


def forward(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """q [lanes*blocks*R,D], k and v [lanes*L,D] -> output like q, log-sum-exps [rows,1] to keep.

    The scores are q k^T as it is: whoever calls has scaled q.
    """
    diagonal = _Diagonal(bucket)
    outputs, log_sums = [], []
    for lane in range(bucket.lanes):
        keys = _each(with_ones, _split(bucket, k, lane))
        values = _each(with_ones, _split(bucket, v, lane))
        for i, queries in enumerate(_split(bucket, q, lane)):
            output, log_sum = _attend(diagonal, queries, keys[: i + 1], values[: i + 1])
            outputs.append(output)
            log_sums.append(log_sum)
    return as_dtype(paddle.concat(outputs), q.dtype), [paddle.concat(log_sums)]


def _attend(
    diagonal: _Diagonal, q: Tensor, keys: list[Tensor], values: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """One block q [R,D] over [k, 1] and [v, 1] of its keys, its own last: output, lse [R,1]."""
    shifted = with_column(q, paddle.zeros([q.shape[0], 1], q.dtype))
    scores = paddle.matmul(shifted, keys[-1], transpose_y=True).add_(diagonal.mask)
    reference = scores.max(-1, keepdim=True)
    scores = scores.subtract_(paddle.expand(reference, scores.shape))
    total = paddle.matmul(diagonal.exp(scores), values[-1])  # [R,D+1], the last column sums
    shifted = with_column(q, -reference)  # [q, -m] [k, 1]^T = q k^T - m
    for k, v in zip(keys[:-1], values[:-1], strict=True):
        scores = paddle.matmul(shifted, k, transpose_y=True)
        if float(scores.max()) > _HEADROOM:
            excess = paddle.clip(scores.max(-1, keepdim=True), min=0.0)
            reference = reference + excess
            shifted = with_column(q, -reference)
            scores = scores.subtract_(paddle.expand(excess, scores.shape))
            total = total * paddle.expand(paddle.exp(-excess), total.shape)
        total = total.add_(paddle.matmul(scores.exp_(), v))
    weight = total[:, -1:]
    return total[:, :-1] / paddle.expand(weight, q.shape), reference + paddle.log(weight)


def backward(
    bucket: Bucket, kept: list[Tensor], tensors: tuple[Tensor, ...], delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `kept` is what `forward` kept.

    `tensors`: q, k, v and the output's gradient; `delta` [rows,1]: sum over D of gradient * output.
    """
    q, k, v, grad = tensors
    diagonal = _Diagonal(bucket)
    lanes = []
    for lane in range(bucket.lanes):
        blocks = [_split(bucket, x, lane) for x in (q, grad, k, v, kept[0], delta)]
        lanes.append(_lane_backward(diagonal, *blocks))
    dq, dk, dv = (paddle.concat([x for lane in lanes for x in lane[n]]) for n in range(3))
    return as_dtype(dq, q.dtype), as_dtype(dk, k.dtype), as_dtype(dv, v.dtype)


def _lane_backward(
    diagonal: _Diagonal,
    q: list[Tensor],
    grad: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    log_sums: list[Tensor],
    delta: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shifted = _each(lambda x, lse: with_column(x, -lse), q, log_sums)
    centred = _each(with_column, grad, [-d for d in delta])
    k_one, v_one = _each(with_ones, k), _each(with_ones, v)
    dq: list[Tensor] = []
    dk: list[Tensor] = []
    dv: list[Tensor] = []
    for i in range(len(q)):
        for j in reversed(range(i + 1)):
            scores = paddle.matmul(shifted[i], k_one[j], transpose_y=True)
            p = diagonal.exp(scores.add_(diagonal.mask)) if j == i else scores.exp_()
            d_scores = paddle.matmul(centred[i], v_one[j], transpose_y=True).multiply_(p)
            _accumulate(dq, i, paddle.matmul(d_scores, k[j]))
            _accumulate(dk, j, paddle.matmul(d_scores, q[i], transpose_x=True))
            _accumulate(dv, j, paddle.matmul(p, grad[i], transpose_x=True))
    return dq, dk, dv


def _accumulate(sums: list[Tensor], index: int, part: Tensor) -> None:
    if index == len(sums):
        sums.append(part)
    else:
        sums[index].add_(part)
