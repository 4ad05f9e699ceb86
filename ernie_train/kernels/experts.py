"""Tokens to experts and back, and the experts' gated MLPs.

Shapes: T tokens, H hidden size, R rows sorted by expert, E experts, I expert width.
"""

from __future__ import annotations

import numpy as np
from paddle import Tensor

from ernie_train.kernels.call import addresses, module, room, whole

Stacks = tuple[Tensor, Tensor, Tensor]  # gate and up [E,H,I], down [E,I,H]


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] for x [T,H]; the caller answers for the index [R] int64."""
    x, index = whole(x, index)
    (tokens, size), rows = x.shape, index.shape[0]
    y = room(rows, size)
    module().gather_rows(*addresses(x, index), rows, tokens, size, *addresses(y))
    return y


def sum_pairs(rows: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Return, for each token, the sum of rows[index[k,t]] over k: [T,H].

    rows [R,H]; index [K*T] int64, k outermost; an index of R or more adds nothing.
    """
    rows, index = whole(rows, index)
    count, size = rows.shape
    y = room(tokens, size)
    choices = index.shape[0] // tokens
    module().sum_pairs(*addresses(rows, index), count, choices, tokens, size, *addresses(y))
    return y


def experts(
    x: Tensor, weights: Tensor, stacks: Stacks, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight * (silu(x Wg) * (x Wu)) Wd of x [R,H] under weights [R,1], x Wg and x Wu [R,I].

    counts [E]: rows of each expert.
    """
    x, weights, gate, up, down = whole(x, weights, *stacks)
    (rows, hidden), (num, _, width) = x.shape, gate.shape
    y, g, u = room(rows, hidden), room(rows, width), room(rows, width)
    per_expert = np.array(counts, np.int64)
    inner = room(max(counts), width)
    inputs, outputs = addresses(x, weights, gate, up, down), addresses(g, u, y, inner)
    module().experts(*inputs, per_expert.ctypes.data, num, hidden, width, *outputs)
    return y, g, u


def experts_backward(
    x: Tensor,
    weights: Tensor,
    stacks: Stacks,
    counts: list[int],
    inner: tuple[Tensor, Tensor],
    grad: Tensor,
    trains: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weights, gate, up and down.

    inner: what `experts` returned of x Wg and x Wu. trains: whether gate, up and down take one.
    """
    x, weights, gate, up, down, grad = whole(x, weights, *stacks, grad)
    (rows, hidden), (num, _, width) = x.shape, gate.shape
    dx, dweights = room(rows, hidden), room(rows, 1)
    made = [room(*p.shape) if t else None for p, t in zip((gate, up, down), trains, strict=True)]
    per_expert, most = np.array(counts, np.int64), max(counts)
    scratch = room(4, most, width)
    module().experts_backward(
        *addresses(x, weights, gate, up, down), per_expert.ctypes.data, num, hidden, width,
        *addresses(*inner, grad, dx, dweights), *(0 if m is None else m.data_ptr() for m in made),
        *addresses(scratch), most,
    )  # fmt: skip
    return dx, dweights, *made
