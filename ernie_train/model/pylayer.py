"""Small things about tensors: dtypes, and which gradients a hand-written backward must give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import Tensor


@contextmanager
def default_dtype(dtype: str) -> Iterator[None]:
    """Parameters that are created within have this dtype, unless they ask for another."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


def dtype_name(tensor: Tensor) -> str:
    """`float32`, `bfloat16`, ..."""
    return str(tensor.dtype).removeprefix("paddle.")


def wanted(*inputs: Tensor) -> tuple[bool, ...]:
    """For each input of a `PyLayer`, whether it takes a gradient; Paddle wants None for others."""
    return tuple(not tensor.stop_gradient for tensor in inputs)


def only(flags: tuple[bool, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients with None in the place of those that are not wanted."""
    return tuple(grad if flag else None for flag, grad in zip(flags, grads, strict=True))


def as_dtype(tensor: Tensor, dtype: Any) -> Tensor:
    """`tensor` as `dtype`; unlike `astype` it does not copy what has it already."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
