"""Addresses of tensors and room for results: what the calls of kernels share."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from ernie_train.kernels.loading import Kernels, load_kernels


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


def room(*shape: int) -> Tensor:
    """Return float32 of unknown values, aligned as Paddle aligns: MKL's bits depend on that.

    It lies where kernels compute, which need not be Paddle's default device.
    """
    return paddle.empty(shape, "float32", device="cpu")
