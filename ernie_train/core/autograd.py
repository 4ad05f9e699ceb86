"""Hand-written backward passes (Paddle's `PyLayer`): which inputs need gradients, how often."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")
Tensor = Any  # Paddle's, which is loaded when a function first needs it


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
        import paddle

        if paddle.is_grad_enabled():  # Paddle says so where `create_graph` was asked for
            raise RuntimeError("this backward pass has no derivative: create_graph is not possible")
        return backward(ctx, *grads)

    return checked
