"""Blocks of a decoder layer, norm and residual included: one pass forward, one backward.

They call the other kernels one after another on plain memory. As many operators under Paddle's
autograd take several times as long on small batches: each has a node, shapes and a dispatch.

Shapes: T tokens, H hidden size, N query heads, K key/value heads, D head dimension, I width, E
experts, C experts of a token, R = T C rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paddle import Tensor

from ernie_train.kernels.attention import attention, attention_backward
from ernie_train.kernels.call import addresses, elements, integers, module, room, whole
from ernie_train.kernels.experts import experts, experts_backward, gather_rows, sum_pairs
from ernie_train.kernels.rows import rms_norm, rms_norm_backward, swiglu, swiglu_backward

Grads = list[Tensor | None]
_AB, _ATB, _ABT = 0, 1, 2


def _product(a: Tensor, b: Tensor, m: int, n: int, out: Tensor | None = None) -> Tensor:
    """Return a b [m,n], or add it to `out`; a [m,k] and b [k,n] may have other shapes."""
    made = room(m, n) if out is None else out
    beta = 0.0 if out is None else 1.0
    module().product(_AB, m, n, elements(a) // m, *addresses(a, b), beta, *addresses(made))
    return made


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, trains: bool) -> Tensor | None:
    """Return x^T grad, the gradient of a weight [in,out]; None where it does not train."""
    if not trains:
        return None
    (rows, columns), made = weight.shape, room(*weight.shape)
    tokens = elements(x) // rows
    module().product(_ATB, rows, columns, tokens, *addresses(x, grad), 0.0, *addresses(made))
    return made


def _input_gradient(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return grad weight^T, the gradient of x in x weight, or add it to `out`."""
    rows, columns = weight.shape
    tokens = elements(grad) // columns
    made = room(tokens, rows) if out is None else out
    beta = 0.0 if out is None else 1.0
    sizes = (tokens, rows, columns)
    module().product(_ABT, *sizes, *addresses(grad, weight), beta, *addresses(made))
    return made


# ---- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """Holds what attention needs besides tensors; documents as in `attention`."""

    documents: np.ndarray
    heads: tuple[int, int]
    head_dim: int
    eps: float


def attention_block(
    x: Tensor, parameters: Sequence[Tensor], tables: tuple[Tensor, Tensor], shape: AttentionShape
) -> tuple[Tensor, list[Tensor]]:
    """Return x + attention(norm(x)) for x [T,H], and what the backward pass needs besides x.

    parameters: the norm's weight, those of q, k, v and o; tables: cosines and sines [T,D].
    """
    x, norm, *projections, down = whole(x, *parameters)
    tokens, dim = x.shape[0], shape.head_dim
    h, inverse = rms_norm(x, norm, shape.eps)
    projected = []
    for weight in projections:
        made = room(tokens * (weight.shape[1] // dim), dim)
        module().product(_AB, tokens, weight.shape[1], x.shape[1], *addresses(h, weight), 0.0,
                         *addresses(made))  # fmt: skip
        projected.append(made)
    q, k, v = projected
    _rotate(q, tables, 1.0)
    _rotate(k, tables, 1.0)
    y, log_sums = attention(q, k, v, shape.documents, shape.heads)
    return _product(y, down, tokens, x.shape[1], x.clone()), [inverse, q, k, v, y, log_sums]


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor], sign: float) -> None:
    """Rotate x [T*N,D] in place."""
    (tokens, dim), (rows, _) = tables[0].shape, x.shape
    at = x.data_ptr()
    module().rope(at, *addresses(*tables), sign, tokens, rows // tokens, dim, at)


def attention_block_backward(
    x: Tensor,
    parameters: Sequence[Tensor],
    tables: tuple[Tensor, Tensor],
    shape: AttentionShape,
    saved: Sequence[Tensor],
    grad: Tensor,
    trains: Sequence[bool],
) -> tuple[Tensor, Grads]:
    """Return the gradients of x and of the parameters; `trains`: which of them take one."""
    x, grad, norm, *projections, down = whole(x, grad, *parameters)
    inverse, q, k, v, y, log_sums = saved
    dy = room(*y.shape)
    module().product(_ABT, grad.shape[0], *down.shape, *addresses(grad, down), 0.0, *addresses(dy))
    ddown = _weight_gradient(y, grad, down, trains[4])
    made = attention_backward((q, k, v), shape.documents, shape.heads, (y, log_sums), dy)
    _rotate(made[0], tables, -1.0)
    _rotate(made[1], tables, -1.0)
    h, _ = rms_norm(x, norm, shape.eps)
    dh: Tensor | None = None
    dweights: Grads = []
    for weight, d, train in zip(projections, made, trains[1:4], strict=True):
        dweights.append(_weight_gradient(h, d, weight, train))
        dh = _input_gradient(d, weight, dh)
    dx, dnorm = rms_norm_backward(x, norm, inverse, dh)
    return dx.add_(grad), [dnorm if trains[0] else None, *dweights, ddown]


# ---- MLP -----------------------------------------------------------------------------------------


def _mlp(h: Tensor, weights: Sequence[Tensor], out: Tensor) -> tuple[Tensor, Tensor]:
    """Add SwiGLU's MLP of h [T,H] to `out`; return h Wg and h Wu."""
    gate, up, down = weights
    tokens, width = h.shape[0], gate.shape[1]
    g, u = _product(h, gate, tokens, width), _product(h, up, tokens, width)
    _product(swiglu(g, u), down, tokens, out.shape[1], out)
    return g, u


def _mlp_backward(
    h: Tensor, weights: Sequence[Tensor], inner: tuple[Tensor, Tensor], grad: Tensor,
    dh: Tensor | None, trains: Sequence[bool],
) -> tuple[Tensor, Grads]:  # fmt: skip
    """Return the gradient of h, added to `dh` if given, and those of the weights."""
    gate, up, down = weights
    dinner = _input_gradient(grad, down)
    ddown = _weight_gradient(swiglu(*inner), grad, down, trains[2]) if trains[2] else None
    dg, du = swiglu_backward(*inner, dinner)
    dh = _input_gradient(du, up, _input_gradient(dg, gate, dh))
    made = (_weight_gradient(h, d, w, t) for d, w, t in zip((dg, du), (gate, up), trains[:2],
                                                            strict=True))  # fmt: skip
    return dh, [*made, ddown]


def mlp_block(x: Tensor, parameters: Sequence[Tensor], eps: float) -> tuple[Tensor, list[Tensor]]:
    """Return x + mlp(norm(x)), and what the backward pass needs; norm, gate, up, down."""
    x, norm, *weights = whole(x, *parameters)
    h, inverse = rms_norm(x, norm, eps)
    out = x.clone()
    return out, [inverse, *_mlp(h, weights, out)]


def mlp_block_backward(
    x: Tensor, parameters: Sequence[Tensor], eps: float, saved: Sequence[Tensor], grad: Tensor,
    trains: Sequence[bool],
) -> tuple[Tensor, Grads]:  # fmt: skip
    """Return the gradients of x and of the parameters."""
    x, grad, norm, *weights = whole(x, grad, *parameters)
    inverse, g, u = saved
    h, _ = rms_norm(x, norm, eps)
    dh, dweights = _mlp_backward(h, weights, (g, u), grad, None, trains[1:])
    dx, dnorm = rms_norm_backward(x, norm, inverse, dh)
    return dx.add_(grad), [dnorm if trains[0] else None, *dweights]


# ---- mixture of experts --------------------------------------------------------------------------


@dataclass(frozen=True)
class MoEShape:
    """Holds the experts of a token, the least sum of their probabilities, the norm's epsilon."""

    top_k: int
    norm_min: float
    eps: float


@dataclass(frozen=True)
class Routed:
    """Holds where the rows of a block went, as its backward pass needs it; `counts` per expert."""

    probs: Tensor  # [T,E]
    ids: Tensor  # [T,C]
    row_of_pair: Tensor  # [C T]
    token_of_row: Tensor  # [R]
    row_weights: Tensor  # [R,1]
    counts: list[int]


def _route(h: Tensor, weight: Tensor, bias: Tensor, shape: MoEShape) -> tuple[Tensor, Routed]:
    """Return the router's logits [T,E], and where it sends tokens."""
    (tokens, size), num, top_k = h.shape, weight.shape[1], shape.top_k
    logits, probs = room(tokens, num), room(tokens, num)
    ids, weights = integers(tokens, top_k), room(tokens, top_k)
    module().route(
        *addresses(h, weight, bias), tokens, size, num, top_k, shape.norm_min,
        *addresses(logits, probs, ids, weights),
    )  # fmt: skip
    counts, rows = np.empty(num, np.int64), tokens * top_k
    token_of_row, row_of_pair, row_weights = integers(rows), integers(rows), room(rows, 1)
    module().sort_pairs(
        *addresses(ids, weights), tokens, top_k, num, counts.ctypes.data,
        *addresses(token_of_row, row_of_pair, row_weights),
    )  # fmt: skip
    per_expert: list[int] = counts.tolist()
    return logits, Routed(probs, ids, row_of_pair, token_of_row, row_weights, per_expert)


def moe_block(
    x: Tensor, bias: Tensor, parameters: Sequence[Tensor], shape: MoEShape
) -> tuple[Tensor, Tensor, Routed, list[Tensor]]:
    """Return x + experts(norm(x)), router logits [T,E], routing, and what else is kept.

    parameters: the norm's weight, the router's, the stacks of gate, up and down, and of the shared
    experts, if there are any, gate, up and down. bias [1,E] chooses, and takes no gradient.
    """
    x, norm, router, *weights = whole(x, *parameters)
    h, inverse = rms_norm(x, norm, shape.eps)
    logits, routed = _route(h, router, bias, shape)
    rows = gather_rows(h, routed.token_of_row)
    made, *inner = experts(rows, routed.row_weights, tuple(weights[:3]), routed.counts)
    out = sum_pairs(made, routed.row_of_pair, x.shape[0])
    shared = _mlp(h, weights[3:], out) if len(weights) > 3 else ()
    return out.add_(x), logits, routed, [inverse, *inner, *shared]


def moe_block_backward(
    x: Tensor, parameters: Sequence[Tensor], shape: MoEShape, routed: Routed,
    saved: Sequence[Tensor], grads: tuple[Tensor, Tensor | None], trains: Sequence[bool],
) -> tuple[Tensor, Grads]:  # fmt: skip
    """Return the gradients of x and of the parameters; grads: of the output, of router logits."""
    x, grad, norm, router, *weights = whole(x, grads[0], *parameters)
    inverse, *inner = saved
    h, _ = rms_norm(x, norm, shape.eps)
    drows, drow_weights, *dstacks = experts_backward(
        gather_rows(h, routed.token_of_row), routed.row_weights, tuple(weights[:3]), routed.counts,
        (inner[0], inner[1]), gather_rows(grad, routed.token_of_row),
        (trains[2], trains[3], trains[4]),
    )  # fmt: skip
    dh = sum_pairs(drows, routed.row_of_pair, x.shape[0])
    dlogits = _route_backward(routed, drow_weights, grads[1], shape)
    drouter = _weight_gradient(h, dlogits, router, trains[1])
    dh = _input_gradient(dlogits, router, dh)
    dshared: Grads = []
    if len(weights) > 3:
        mine = (inner[2], inner[3])
        dh, dshared = _mlp_backward(h, weights[3:], mine, grad, dh, trains[5:])
    dx, dnorm = rms_norm_backward(x, norm, inverse, dh)
    return dx.add_(grad), [dnorm if trains[0] else None, drouter, *dstacks, *dshared]


def _route_backward(
    routed: Routed, drow_weights: Tensor, extra: Tensor | None, shape: MoEShape
) -> Tensor:
    tokens, num = routed.probs.shape
    made = room(tokens, num)
    (more,) = (None,) if extra is None else whole(extra)
    module().route_backward(
        *addresses(routed.probs, routed.ids, routed.row_of_pair, drow_weights),
        0 if more is None else more.data_ptr(), tokens, num, shape.top_k, shape.norm_min,
        *addresses(made),
    )  # fmt: skip
    return made
