"""Loads the compiled kernels, once, and says why where they cannot be had."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.core.errors import UserError

KERNELS = "ERNIE_TRAIN_KERNELS"  # "native" (the default) or "plain"
CHOICES = ("native", "plain")


def usable(*tensors: Tensor) -> bool:
    """Return whether kernels can take these tensors: float32 on a processor, and kernels there."""
    return all(
        t.dtype == paddle.float32 and t.place.is_cpu_place() for t in tensors
    ) and isinstance(load_kernels(), Kernels)


class Kernels:
    """The functions of `compiled`."""

    def __init__(self, module: Any) -> None:
        self.module = module


@cache
def load_kernels() -> Kernels | str:
    """Return the kernels, or why there are none; then one line on stderr says so.

    Raises `UserError` for an unknown value of ERNIE_TRAIN_KERNELS.
    """
    chosen = os.environ.get(KERNELS, CHOICES[0])
    if chosen not in CHOICES:
        raise UserError(f"{KERNELS}={chosen}: it must be one of {', '.join(CHOICES)}")
    if chosen == "plain":
        return f"switched off by {KERNELS}=plain"
    try:
        module = _import_compiled()
        _check(module)
    # Whatever keeps numba, LLVM or MKL from working here, training can do without them.
    except Exception as error:
        said, _, _ = str(error).strip().partition("\n")
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        if process_group.rank() == 0:
            line = f"native kernels cannot be loaded ({reason}): plain operators, slower"
            print(line, file=sys.stderr)
        return reason
    return Kernels(module)


def describe_kernels() -> str:
    """Return in words what training's fused passes run on."""
    loaded = load_kernels()
    return f"plain operators: {loaded}" if isinstance(loaded, str) else "native, by numba"


def _import_compiled() -> Any:
    import llvmlite.binding

    # Compiled code refers to MKL's product by name, so that numba may keep it on the disk.
    library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"))
    address = ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value
    llvmlite.binding.add_symbol("ernie_train_cblas_sgemm", address)
    try:
        from ernie_train.kernels import compiled
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    else:
        return compiled
    # Neither this directory nor the user's cache can be written: keep them for this process alone.
    import numba

    numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="ernie-train-kernels-")
    atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
    from ernie_train.kernels import compiled

    return compiled


def _check(module: Any) -> None:
    """Raise `RuntimeError` if a small product and exponential by the kernels are wrong."""
    rng = np.random.default_rng(0)
    hidden, head = (rng.standard_normal((5, 8)).astype(np.float32) for _ in range(2))
    labels, weights = np.arange(5), np.ones(5, np.float32)
    logits, losses = np.zeros((5, 5), np.float32), np.zeros(5, np.float32)
    arrays = (hidden, head, labels, weights)
    module.linear_cross_entropy(
        *(a.ctypes.data for a in arrays), 5, 8, 5, 5, logits.ctypes.data, losses.ctypes.data, 0, 0
    )
    scores = hidden.astype(np.float64) @ head.T.astype(np.float64)
    exact = np.log(np.exp(scores).sum(1)) - np.diag(scores)
    if not np.abs(losses - exact).max() < 1e-5:
        raise RuntimeError("a loss by the kernels is wrong on this processor")
