"""Passes over rows: RMSNorm, rotary embedding, SwiGLU, cross-entropy of the LM head.

Shapes: T tokens, H hidden size, N heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from ernie_train.kernels.call import addresses, elements, module, room, whole

# Logits of a chunk: 8 MB where the vocabulary is small, so that they stay in the cache between two
# products; at least 128 rows, or the sum of the head's gradient costs more than the products.
CHUNK_ELEMENTS, LEAST_ROWS = 2 * 1024 * 1024, 128


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + eps) * weight for x [T,H], and 1 / sqrt(...) [T]."""
    x, weight = whole(x, weight)
    tokens, size = x.shape
    y, inverse = room(tokens, size), room(tokens)
    module().rms_norm(*addresses(x, weight), eps, tokens, size, *addresses(y, inverse))
    return y, inverse


def rms_norm_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; `inverse` is the second result of `rms_norm`."""
    x, weight, grad = whole(x, weight, grad)
    tokens, size = x.shape
    dx, dweight, part = room(tokens, size), room(size), room(size)
    inputs, outputs = addresses(x, weight, inverse, grad), addresses(dx, dweight, part)
    module().rms_norm_backward(*inputs, tokens, size, *outputs)
    return dx, dweight


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [T*N,D], or [T,N*D], by the angles of cos and sin [T,D]."""
    x, cos, sin = whole(x, cos, sin)
    tokens, dim = cos.shape
    y = room(*x.shape)
    heads, sign = elements(x) // (tokens * dim), -1.0 if backward else 1.0
    module().rope(*addresses(x, cos, sin), sign, tokens, heads, dim, *addresses(y))
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate, up = whole(gate, up)
    y = room(*gate.shape)
    module().swiglu(*addresses(gate, up), elements(gate), *addresses(y))
    return y


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    gate, up, grad = whole(gate, up, grad)
    dgate, dup = room(*gate.shape), room(*gate.shape)
    size, outputs = elements(gate), addresses(dgate, dup)
    module().swiglu_backward(*addresses(gate, up, grad), size, *outputs)
    return dgate, dup


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, *, trains: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return cross-entropies [T] of hidden head^T, and gradients of their sum under `weights` [T].

    hidden [T,H], head [V,H], labels [T]. trains: whether hidden and head take a gradient;
    that of one which does not is None. Raises `ValueError` for a label outside the vocabulary.
    """
    labels = labels if labels.dtype == paddle.int64 else labels.astype("int64")
    hidden, head, labels, weights = whole(hidden, head, labels, weights)
    (tokens, size), vocab = hidden.shape, head.shape[0]
    losses = room(tokens)
    dhidden = room(tokens, size) if trains[0] else None
    dhead = room(vocab, size) if trains[1] else None
    rows = min(tokens, max(LEAST_ROWS, CHUNK_ELEMENTS // vocab))
    logits = room(rows, vocab)
    gradients = (0 if g is None else g.data_ptr() for g in (dhidden, dhead))
    inputs, outputs = addresses(hidden, head, labels, weights), addresses(logits, losses)
    bad = module().linear_cross_entropy(*inputs, tokens, size, vocab, rows, *outputs, *gradients)
    if bad >= 0:
        raise ValueError(f"label {int(labels[bad])} of token {bad} is outside {vocab} tokens")
    return losses, dhidden, dhead
