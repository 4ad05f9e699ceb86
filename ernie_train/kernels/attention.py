"""Causal attention within documents, of any length, with memory linear in it.

The rows of a block of queries are scored at once, softmax and all; the backward pass computes the
probabilities again from the log-sum-exps (FlashAttention-2, arXiv:2307.08691).

Shapes: T tokens, N query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.kernels.call import addresses, module, room, whole


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: np.ndarray, heads: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(D)) v within documents, like q, and log-sum-exps [T,N].

    q [T*N,D], k and v [T*K,D], tokens outermost; heads: N and K. documents [n,4] int64: first
    token and number of tokens of each document, and of the one that it continues (0, 0: none).
    """
    q, k, v = whole(q, k, v)
    dim, (queries, keys) = q.shape[-1], heads
    y, log_sums, scores = room(*q.shape), room(q.shape[0]), room(*_block(documents))
    module().attention(
        *addresses(q, k, v), documents.ctypes.data, len(documents), queries, keys, dim, dim**-0.5,
        *addresses(y, log_sums, scores),
    )  # fmt: skip
    return y, log_sums


def attention_backward(
    tensors: tuple[Tensor, ...],
    documents: np.ndarray,
    heads: tuple[int, int],
    result: tuple[Tensor, Tensor],
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, the `tensors`; `result` is what `attention` returned."""
    q, k, v, grad = whole(*tensors, grad)
    dim, (queries, keys) = q.shape[-1], heads
    dq, dk, dv = room(*q.shape), paddle.zeros_like(k), paddle.zeros_like(v)
    block = _block(documents)
    scores, dscores = room(*block), room(*block)
    module().attention_backward(
        *addresses(q, k, v), documents.ctypes.data, len(documents), queries, keys, dim, dim**-0.5,
        *addresses(*result, grad, dq, dk, dv, scores, dscores),
    )  # fmt: skip
    return dq, dk, dv


def _block(documents: np.ndarray) -> tuple[int, int]:
    longest = int((documents[:, 1] + documents[:, 3]).max())
    return module().QUERY_BLOCK, longest
