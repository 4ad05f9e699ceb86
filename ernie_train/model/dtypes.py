"""Dtypes of tensors and of new parameters, and parameters that start as zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
from paddle import Tensor


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


def zero_parameter(shape: Sequence[int], dtype: str) -> Tensor:
    """Return a parameter of zeros that trains.

    Paddle 3.3.1 has no default initializer for bfloat16 outside layers, and refuses it without one.
    """
    zero = paddle.nn.initializer.Constant(0.0)
    return paddle.create_parameter(list(shape), dtype, default_initializer=zero)


def dtype_name(tensor: Tensor) -> str:
    """Return `float32`, `bfloat16`, ..."""
    return str(tensor.dtype).removeprefix("paddle.")


def cast(tensor: Tensor, dtype: Any) -> Tensor:
    """Return `tensor` as `dtype`; unlike Paddle's `astype`, do not copy one that has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
