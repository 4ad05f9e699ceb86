"""Causal attention of long documents with an online softmax: memory linear in their length.

FlashAttention-2 (arXiv:2307.08691): the forward pass keeps the output and each row's log-sum-exp,
the backward pass recomputes the probabilities from it, one block of queries against one block of
keys at a time. Blocks above the diagonal are skipped. A lane is one document under one key/value
head; its G query heads are scored together. All of it is float32, whatever the inputs are.

Unlike FlashAttention, a row's maximum is not updated block by block: on a CPU, Paddle's row-wise
maximum of a block takes as long as the product that makes it (0.31 and 0.26 ms at 1280 x 320). It
is computed for the block on the diagonal alone, as the reference that is subtracted from all scores
of the row. The row's sum is at least 1 then, and larger scores elsewhere are harmless while their
exp is far from overflow. Only a block that exceeds the references by more than `_HEADROOM`, known
from one maximum over all its scores (0.05 ms), raises them.

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
from ernie_train.model.dtypes import cast

_HEADROOM = 40.0  # exp(40) = 2e17; float32 ends at 3e38, and a row sums some 1e5 of them


@lru_cache(maxsize=64)
def _causal_ones(group: int, block: int) -> np.ndarray:
    return np.tile(np.tril(np.ones((block, block), np.float32)), (group, 1))


class _DiagonalBlock:
    """Masks for a block of queries against the keys of the same tokens."""

    def __init__(self, bucket: Bucket) -> None:
        self.mask = causal_mask(bucket)
        self.visible = paddle.to_tensor(_causal_ones(bucket.group, bucket.block))

    def exp(self, scores: Tensor) -> Tensor:
        """Compute exp of masked scores in place, 0 where masked.

        On a CPU, Paddle 3.3.1 returns exp(-1e30) = 2.9e-39, not 0. Products with subnormal numbers
        took several times longer on one of two processors, so they are multiplied away.
        """
        return scores.exp_().multiply_(self.visible)


def _split(bucket: Bucket, x: Tensor, lane: int) -> list[Tensor]:
    """Return the blocks of a lane, in float32."""
    rows = x.shape[0] // bucket.lanes
    part = cast(x[lane * rows : (lane + 1) * rows], paddle.float32)
    return list(part.split(bucket.blocks))


def _map_blocks(function: Callable[..., Tensor], *blocks: list[Tensor]) -> list[Tensor]:
    """Apply `function` to the first blocks, the second ones, and so on."""
    return [function(*parts) for parts in zip(*blocks, strict=True)]


def forward(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute q [lanes*blocks*R,D], k and v [lanes*L,D] -> output like q, log-sum-exps [rows,1].

    The caller has scaled q by 1 / sqrt(D). `backward` takes the log-sum-exps as `kept`.
    """
    diagonal = _DiagonalBlock(bucket)
    outputs, log_sums = [], []
    for lane in range(bucket.lanes):
        keys = _map_blocks(with_ones, _split(bucket, k, lane))
        values = _map_blocks(with_ones, _split(bucket, v, lane))
        for i, queries in enumerate(_split(bucket, q, lane)):
            output, log_sum = _attend(diagonal, queries, keys[: i + 1], values[: i + 1])
            outputs.append(output)
            log_sums.append(log_sum)
    return cast(paddle.concat(outputs), q.dtype), [paddle.concat(log_sums)]


def _attend(
    diagonal: _DiagonalBlock, q: Tensor, keys: list[Tensor], values: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Attend from a block q [R,D] to blocks [k, 1] and [v, 1], its own last: output, lse [R,1]."""
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
    """Return the gradients of q, k and v; `kept` are the log-sum-exps from `forward`.

    `tensors`: q, k, v and the output's gradient; `delta` [rows,1]: sum over D of gradient * output.
    """
    q, k, v, grad = tensors
    diagonal = _DiagonalBlock(bucket)
    lanes = []
    for lane in range(bucket.lanes):
        blocks = [_split(bucket, x, lane) for x in (q, grad, k, v, kept[0], delta)]
        lanes.append(_lane_backward(diagonal, *blocks))
    dq, dk, dv = (paddle.concat([x for lane in lanes for x in lane[n]]) for n in range(3))
    return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype)


def _lane_backward(
    diagonal: _DiagonalBlock,
    q: list[Tensor],
    grad: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    log_sums: list[Tensor],
    delta: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shifted = _map_blocks(lambda x, lse: with_column(x, -lse), q, log_sums)
    centred = _map_blocks(with_column, grad, [-d for d in delta])
    k_one, v_one = _map_blocks(with_ones, k), _map_blocks(with_ones, v)
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
