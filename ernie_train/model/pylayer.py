"""Helpers of hand-written backward passes (`PyLayer`): dtypes, and which inputs need gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import paddle
from paddle import Tensor

T = TypeVar("T")


@contextmanager
def default_dtype(dtype: str) -> Iterator[None]:
    """Create parameters in `dtype` within the context, unless they name another one."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


@contextmanager
def zero_parameters() -> Iterator[None]:
    """Create parameters as zeros within the context, whatever their layers would draw."""
    zero = paddle.nn.initializer.Constant(0.0)
    paddle.nn.initializer.set_global_initializer(zero, zero)
    try:
        yield
    finally:
        paddle.nn.initializer.set_global_initializer(None)


def dtype_name(tensor: Tensor) -> str:
    """Return `float32`, `bfloat16`, ..."""
    return str(tensor.dtype).removeprefix("paddle.")


def needs_grad(*inputs: Tensor) -> tuple[bool, ...]:
    """Return, for each tensor input of a `PyLayer`, whether it takes a gradient."""
    return tuple(not tensor.stop_gradient for tensor in inputs)


def select_grads(needed: tuple[bool, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the gradients with None for inputs that need none, as Paddle's `PyLayer` demands."""
    return tuple(grad if need else None for need, grad in zip(needed, grads, strict=True))


def once_differentiable(backward: Callable[..., T]) -> Callable[..., T]:
    """Let a backward pass that Paddle cannot differentiate refuse second derivatives.

    They would be missing without a word: its results do not depend on anything by Paddle's tape.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> T:
        if paddle.is_grad_enabled():  # Paddle says so where `create_graph` was asked for
            raise RuntimeError("this backward pass has no derivative: create_graph is not possible")
        return backward(ctx, *grads)

    return checked


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """Return `tensor` as `dtype`; unlike Paddle's `astype`, do not copy one that has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
