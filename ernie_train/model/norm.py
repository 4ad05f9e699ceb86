"""RMSNorm with a hand-written backward.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_train.model.pylayer import as_dtype, only, wanted


def _rows(column: Tensor, width: int) -> Tensor:
    # Paddle's CPU kernels multiply [T,H] by [T,1] four times slower than by an expanded copy.
    return paddle.expand(column, [column.shape[0], width])


class _RMSNorm(PyLayer):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32; saves x / rms and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        x32 = as_dtype(x, paddle.float32)
        # A product with a column of 1/H is the mean over H, and the fast way to it on a CPU.
        mean_square = paddle.matmul(x32 * x32, paddle.full([size, 1], 1.0 / size, "float32"))
        inverse_rms = paddle.rsqrt(mean_square + eps)  # [T,1]
        normalized = x32 * _rows(inverse_rms, size)
        ctx.save_for_backward(normalized, inverse_rms, weight)
        ctx.dtype, ctx.wanted = x.dtype, wanted(x, weight)
        y = normalized * paddle.expand(as_dtype(weight, paddle.float32), normalized.shape)
        return as_dtype(y, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        normalized, inverse_rms, weight = ctx.saved_tensor()
        tokens, size = normalized.shape
        grad32 = as_dtype(grad, paddle.float32)
        along = grad32 * normalized
        grad_weight = paddle.matmul(paddle.ones([1, tokens], "float32"), along).reshape([size])
        grad_normalized = grad32 * paddle.expand(as_dtype(weight, paddle.float32), grad32.shape)
        mean_along = paddle.matmul(
            grad_normalized * normalized, paddle.full([size, 1], 1.0 / size, "float32")
        )
        grad_x = grad_normalized.subtract_(normalized * _rows(mean_along, size))
        grad_x = grad_x.multiply_(_rows(inverse_rms, size))
        grads = (as_dtype(grad_x, ctx.dtype), as_dtype(grad_weight, weight.dtype))
        return only(ctx.wanted, grads)


class RMSNorm(nn.Layer):
    """Root-mean-square norm over the last axis of x [T,H] (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [size], default_initializer=nn.initializer.Constant(1.0)
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)
