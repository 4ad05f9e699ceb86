"""RMSNorm with a hand-written backward pass, the embedding, and the gated MLP.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import needs_grad, once_differentiable, select_grads
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.dtypes import cast

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate=True),
    "relu": F.relu,
}


class Embedding(nn.Embedding):
    """A table [V,H] of rows by id."""

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(ids, self.weight)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Return rows of `weight` [V,H] for ids [T]; their gradients are summed in float32.

    Paddle (3.3.1) sums those of equal ids in the type of the weights, and a bfloat16 sum loses what
    is a 512th of it: the gradient of a token that a batch has a thousand times.
    """
    trains = paddle.is_grad_enabled() and not weight.stop_gradient
    if not trains or weight.dtype == paddle.float32 or _sums_in_order():
        return F.embedding(ids, weight)
    return _LookUp.apply(weight, ids)


def _sums_in_order() -> bool:
    """Return whether Paddle is told to fix the order of sums: index_add is one thread then."""
    flag = os.environ.get("FLAGS_cudnn_deterministic", "")  # noqa: SIM112
    return flag.lower() not in ("", "0", "false")


class _LookUp(PyLayer):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (ids,) = ctx.saved_tensor()
        total = paddle.zeros(ctx.shape, "float32")
        paddle.index_add_(total, ids, 0, cast(grads[0], paddle.float32))
        return cast(total, ctx.dtype)


class MLP(nn.Layer):
    """down(act(gate(x)) * up(x)) for x [T,H] (SwiGLU with silu, arXiv:2002.05202)."""

    def __init__(self, config: Ernie4_5_MoeConfig, width: int) -> None:
        super().__init__()
        bias = None if config.use_bias else False
        self.gate_proj = nn.Linear(config.hidden_size, width, bias_attr=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias_attr=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias_attr=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.act is F.silu and kernels.usable(gate, up):
            return self.down_proj(_NativeSwiGLU.apply(gate, up))
        return self.down_proj(self.act(gate) * up)


class _NativeSwiGLU(PyLayer):
    """silu(gate) * up; saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.needs_grad = needs_grad(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensor()
        return select_grads(ctx.needs_grad, kernels.swiglu_backward(gate, up, grads[0]))


def _expand(column: Tensor, width: int) -> Tensor:
    # Paddle 3.3.1 on a CPU: [T,H] times [T,1] takes 0.19 ms at 2048 x 256, times the expanded copy
    # 0.10, the copy included.
    return paddle.expand(column, [column.shape[0], width])


class _RMSNorm(PyLayer):
    """y = x / sqrt(mean(x^2) + eps) * weight, in float32; saves x / rms and 1 / rms.

    Written by hand because `F.rms_norm` has no CPU kernel in Paddle 3.3.1, and autograd of plain
    operations would keep every intermediate.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        x32 = cast(x, paddle.float32)
        # The product with a column of 1/H is the mean over H: 0.08 ms at 2048 x 256 on a CPU, where
        # Paddle's own mean takes 0.43.
        mean_square = paddle.matmul(x32 * x32, paddle.full([size, 1], 1.0 / size, "float32"))
        inverse_rms = paddle.rsqrt(mean_square + eps)  # [T,1]
        normalized = x32 * _expand(inverse_rms, size)
        ctx.save_for_backward(normalized, inverse_rms, weight)
        ctx.dtype, ctx.needs_grad = x.dtype, needs_grad(x, weight)
        y = normalized * paddle.expand(cast(weight, paddle.float32), normalized.shape)
        return cast(y, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        normalized, inverse_rms, weight = ctx.saved_tensor()
        tokens, size = normalized.shape
        grad32 = cast(grad, paddle.float32)
        grad_dot = grad32 * normalized
        grad_weight = paddle.matmul(paddle.ones([1, tokens], "float32"), grad_dot).reshape([size])
        grad_normalized = grad32 * paddle.expand(cast(weight, paddle.float32), grad32.shape)
        mean_dot = paddle.matmul(
            grad_normalized * normalized, paddle.full([size, 1], 1.0 / size, "float32")
        )
        grad_x = grad_normalized.subtract_(normalized * _expand(mean_dot, size))
        grad_x = grad_x.multiply_(_expand(inverse_rms, size))
        grads = (cast(grad_x, ctx.dtype), cast(grad_weight, weight.dtype))
        return select_grads(ctx.needs_grad, grads)


class _NativeRMSNorm(PyLayer):
    """The same; saves x, which others keep anyway, and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = kernels.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.needs_grad = needs_grad(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensor()
        made = kernels.rms_norm_backward(x, weight, inverse, grads[0])
        return select_grads(ctx.needs_grad, made)


class RMSNorm(nn.Layer):
    """Root-mean-square norm over the last axis of x [T,H] (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [size], default_initializer=nn.initializer.Constant(1.0)
        )
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        norm = _NativeRMSNorm if kernels.usable(x, self.weight) else _RMSNorm
        return norm.apply(x, self.weight, self.eps)


# ---- blocks at once ------------------------------------------------------------------------------

_ORDINARY: set[type] = {nn.Linear, RMSNorm, MLP}


def ordinary(layer: type) -> type:
    """Let `is_ordinary` know a class of layers; a decorator."""
    _ORDINARY.add(layer)
    return layer


def acting(module: nn.Layer) -> nn.Layer:
    """Return the layer that computes: an adapted one that is switched off acts as its base."""
    if type(module) in _ORDINARY or getattr(module, "is_on", True):
        return module
    base: nn.Layer = module.base
    return base


def is_ordinary(*modules: nn.Layer) -> bool:
    """Return whether native kernels may compute a block of these modules at once.

    They are the model's own, without bias, and nobody watches them by hooks.
    """
    return all(
        (type(m) in _ORDINARY)
        and not m._forward_pre_hooks
        and not m._forward_post_hooks
        and (type(m) is not nn.Linear or m.bias is None)
        for m in modules
    )


def mlp_block(norm: RMSNorm, mlp: MLP, x: Tensor) -> Tensor | None:
    """Return x + mlp(norm(x)) for x [T,H]; None where it is not computed here."""
    projections = [acting(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    if not (
        is_ordinary(norm, mlp, *projections)
        and mlp.act is F.silu
        and kernels.usable(x, norm.weight)
    ):
        return None
    return _MLPBlock.apply(x, norm.weight, *(p.weight for p in projections), norm.eps)


class _MLPBlock(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        parameters = (norm, gate, up, down)
        out, saved = kernels.mlp_block(x, parameters, eps)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.eps, ctx.needs_grad = eps, needs_grad(x, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensor()
        needs_x, *trains = ctx.needs_grad
        dx, made = kernels.mlp_block_backward(x, rest[:4], ctx.eps, rest[4:], grads[0], trains)
        return dx if needs_x else None, *made
