"""Addresses of tensors and room for results: what the calls of kernels share."""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle import Tensor, _C_ops

from ernie_train.kernels.loading import Kernels, load_kernels

_CPU = paddle.CPUPlace()


def module() -> Any:
    """Return the compiled functions. Raises `RuntimeError` where `usable` says no."""
    loaded = load_kernels()
    if not isinstance(loaded, Kernels):
        raise RuntimeError(f"no native kernels: {loaded}")
    return loaded.module


def whole(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors, those that are strided views as copies."""
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def addresses(*tensors: Tensor) -> list[int]:
    """Return where the data of contiguous tensors lies; the caller keeps them alive."""
    return [t.data_ptr() for t in tensors]


def elements(tensor: Tensor) -> int:
    """Return the number of elements; Paddle's own `size` takes 12 us."""
    return math.prod(tensor.shape)


def room(*shape: int) -> Tensor:
    """Return float32 of unknown values, aligned as Paddle aligns: MKL's bits depend on that.

    It lies where kernels compute, which need not be Paddle's default device.
    """
    return _C_ops.empty(shape, paddle.float32, _CPU)  # 3 us; `paddle.empty` takes 8


def integers(*shape: int) -> Tensor:
    """Return int64 of unknown values, there too."""
    return _C_ops.empty(shape, paddle.int64, _CPU)
