"""Experts of few rows in three batched products, for GPUs: three kernels, not three per expert.

Every expert gets as many slots as the fullest one has rows; slots without a row hold zeros, which
add nothing to an output or a gradient. It computes what `moe._GroupedSwiGLU` does expert after
expert, to rounding.

Shapes: R routed rows, E experts, C slots of an expert, H hidden size, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_train.core.autograd import needs_grad, once_differentiable, select_grads

# With more rows an expert computes for longer than its kernels take to start: three products of
# 1024 x 2560 x 1536 take 0.05 ms at 500 TFLOP/s, as long as starting some ten (arithmetic, not
# measured). Zeros then only cost. So do too many of them, unless there are few rows at all, as in a
# step of decoding.
MOST_ROWS, MOST_SLOTS_PER_ROW, FEW_SLOTS = 1024, 2.0, 8192


def few_rows(rows: float, experts: int) -> bool:
    """Return whether starting the kernels of each expert would take longer than computing."""
    return rows < MOST_ROWS * experts


def pays(tokens_per_expert: list[int]) -> bool:
    """Return whether experts have few rows, and are loaded evenly, for batched products."""
    experts, rows = len(tokens_per_expert), sum(tokens_per_expert)
    slots = experts * max(tokens_per_expert)
    even = slots <= MOST_SLOTS_PER_ROW * rows
    return slots <= FEW_SLOTS or (even and few_rows(rows, experts))


@dataclass(frozen=True)
class _Slots:
    """Maps rows sorted by expert to the slots of all experts, and back."""

    experts: int  # E
    row_of_slot: Tensor  # [E*C]; R for an empty slot
    slot_of_row: Tensor  # [R]

    @classmethod
    def of(cls, tokens_per_expert: list[int]) -> _Slots:
        counts = np.array(tokens_per_expert)
        slots, rows = int(counts.max()), int(counts.sum())
        expert_of_row = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(rows) - (np.cumsum(counts) - counts)[expert_of_row]
        slot_of_row = expert_of_row * slots + place
        row_of_slot = np.full(len(counts) * slots, rows)
        row_of_slot[slot_of_row] = np.arange(rows)
        return cls(len(counts), paddle.to_tensor(row_of_slot), paddle.to_tensor(slot_of_row))

    def spread(self, rows: Tensor) -> Tensor:
        """Return rows [R,W] in their slots, [E,C,W]."""
        width = rows.shape[-1]
        padded = paddle.concat([rows, paddle.zeros([1, width], rows.dtype)])
        return paddle.gather(padded, self.row_of_slot).reshape([self.experts, -1, width])

    def collect(self, slots: Tensor) -> Tensor:
        """Return the rows [R,W] of slots [E,C,W]."""
        return paddle.gather(slots.reshape([-1, slots.shape[-1]]), self.slot_of_row)


class BatchedSwiGLU(PyLayer):
    """y = weight * (silu(x Wg) * (x Wu)) Wd for rows sorted by expert: x [R,H], weights [R,1]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        tokens_per_expert: list[int],
    ) -> Tensor:
        slots = _Slots.of(tokens_per_expert)
        spread = slots.spread(x)  # [E,C,H]
        u = paddle.matmul(spread, up)  # [E,C,I]
        g = paddle.matmul(spread, gate)
        sigmoid = F.sigmoid(g)
        silu = g * sigmoid
        weighted = silu * u * slots.spread(weights)
        ctx.save_for_backward(x, weights, gate, up, down, u, sigmoid, silu)
        ctx.slots, ctx.needs_grad = slots, needs_grad(x, weights, gate, up, down)
        return slots.collect(paddle.matmul(weighted, down))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, down, u, sigmoid, silu = ctx.saved_tensor()
        slots, needed = ctx.slots, ctx.needs_grad
        spread, weight, grad = (slots.spread(t) for t in (x, weights, grads[0]))
        d_weighted = paddle.matmul(grad, down, transpose_y=True)
        d_weights = (d_weighted * silu * u).sum(-1, keepdim=True)
        d_inner = d_weighted * weight
        d_up = d_inner * silu
        # silu'(g) = sigmoid + silu * (1 - sigmoid)
        d_gate = d_inner * u * (sigmoid + silu - silu * sigmoid)
        d_x = paddle.matmul(d_gate, gate, transpose_y=True)
        d_x = d_x + paddle.matmul(d_up, up, transpose_y=True)
        factors = ((spread, d_gate), (spread, d_up), (silu * u * weight, grad))
        stacks = (
            paddle.matmul(into, out, transpose_x=True) if trains else None
            for (into, out), trains in zip(factors, needed[2:], strict=True)
        )
        return select_grads(needed, (slots.collect(d_x), slots.collect(d_weights), *stacks))
