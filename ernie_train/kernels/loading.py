"""Loads the compiled kernels, once, and says why where they cannot be had."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.core.errors import UserError

KERNELS = "ERNIE_TRAIN_KERNELS"  # "native" (the default) or "plain"
CHOICES = ("native", "plain")
MKL = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"  # Paddle's own
_MODULES = ("compiled", "compiled_steps")
_switched_off = False  # within `plain_operators`


class WrongResultError(RuntimeError):
    """Compiled kernels compute something else here."""


def usable(*tensors: Tensor) -> bool:
    """Return whether kernels can take these tensors: float32 on a processor, and kernels there."""
    return (
        not _switched_off
        and all(t.dtype == paddle.float32 and t.place.is_cpu_place() for t in tensors)
        and isinstance(load_kernels(), Kernels)
    )


@contextmanager
def plain_operators() -> Iterator[None]:
    """Compute without the kernels within the context, as a reference for them."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


class Kernels:
    """The functions of `compiled`."""

    def __init__(self, module: Any) -> None:
        self.module = module


def chosen_kernels() -> str:
    """Return which of `CHOICES` ERNIE_TRAIN_KERNELS names; `UserError` for another value."""
    chosen = os.environ.get(KERNELS, CHOICES[0])
    if chosen not in CHOICES:
        raise UserError(f"{KERNELS}={chosen}: it must be one of {', '.join(CHOICES)}")
    return chosen


@cache
def load_kernels() -> Kernels | str:
    """Return the kernels, or why there are none; then one line on stderr says so.

    Raises `UserError` for an unknown value of ERNIE_TRAIN_KERNELS.
    """
    if chosen_kernels() == "plain":
        return f"switched off by {KERNELS}=plain"
    try:
        return Kernels(_checked(_import_compiled()))
    # Whatever keeps numba, LLVM or MKL from working here, training can do without them.
    except Exception as error:
        said, _, _ = str(error).strip().partition("\n")
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        _say(f"native kernels cannot be loaded ({reason}): plain operators, slower")
        return reason


def _say(line: str) -> None:
    if process_group.rank() == 0:
        print(line, file=sys.stderr)


def describe_kernels() -> str:
    """Return in words what training's fused passes run on."""
    loaded = load_kernels()
    return f"plain operators: {loaded}" if isinstance(loaded, str) else "native, by numba"


def agree_over_ranks() -> str:
    """Switch the kernels off where a rank has none, and return in words what this job computes by.

    A collective call, before the first step.
    """
    global _switched_off
    if not paddle.get_device().startswith("cpu"):
        return "the GPU's operators"
    missing = isinstance(load_kernels(), str)
    if process_group.any_rank(missing) and not missing:
        _switched_off = True
        _say("another rank has no native kernels: plain operators on all, slower")
        return "plain operators: another rank has no native kernels"
    return describe_kernels()


def _import_compiled() -> Any:
    import llvmlite.binding

    # Compiled code refers to MKL's product by name, so that numba may keep it on the disk.
    library = ctypes.CDLL(str(MKL))
    address = ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value
    llvmlite.binding.add_symbol("ernie_train_cblas_sgemm", address)
    try:
        return _import_modules()
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    # Neither this directory nor the user's cache can be written.
    return _compile_for_this_process()


def _import_modules() -> SimpleNamespace:
    """Return what both modules of kernels hold."""
    first = importlib.import_module("ernie_train.kernels.compiled")
    second = importlib.import_module("ernie_train.kernels.compiled_steps")
    return SimpleNamespace(**{**vars(first), **vars(second)})


def _checked(module: Any) -> Any:
    """Return the functions, once called; compiled again where the cache is damaged or full."""
    try:
        _check(module)
    except WrongResultError:
        raise
    except Exception:
        place = module.rms_norm.stats.cache_path
        _say(f"the compiled kernels in {place} cannot be used: compiled again, for this process "
             f"alone; remove {place}/compiled.*.nb? or make room there")  # fmt: skip
        for name in _MODULES:
            sys.modules.pop(f"ernie_train.kernels.{name}", None)
        module = _compile_for_this_process()
        _check(module)
    return module


def _compile_for_this_process() -> Any:
    import numba

    numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="ernie-train-kernels-")
    atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)
    return _import_modules()


def _check(module: Any) -> None:
    """Call every kernel once, so that none is loaded or compiled within training.

    Raises `WrongResultError` if a product and exponential are wrong, or a result is not finite.
    """
    rows = np.ones((16, 64), np.float32)  # room for each argument
    at = [row.ctypes.data for row in rows]
    index, counts, documents = np.array([0, 1]), np.array([2]), np.array([0, 2, 0, 0])
    shape = (documents.ctypes.data, 1, 1, 1, 4, 0.5)
    module.rms_norm(*at[:2], 1e-5, 2, 4, *at[2:4])
    module.rms_norm_backward(*at[:4], 2, 4, *at[4:7])
    module.rope(*at[:3], 1.0, 2, 1, 4, at[3])
    module.swiglu(*at[:2], 8, at[2])
    module.swiglu_backward(*at[:3], 8, *at[3:5])
    module.gather_rows(at[0], index.ctypes.data, 2, 2, 4, at[1])
    module.sum_pairs(at[0], index.ctypes.data, 2, 1, 2, 4, at[1])
    module.experts(*at[:5], counts.ctypes.data, 1, 4, 4, *at[5:9])
    module.experts_backward(*at[:5], counts.ctypes.data, 1, 4, 4, *at[5:14], 2)
    module.attention(*at[:3], *shape, *at[3:6])
    module.attention_backward(*at[:3], *shape, *at[3:11])
    _check_steps(module, at)
    if not (np.isfinite(rows).all() and _loss_is_right(module)):
        raise WrongResultError("a result by the kernels is wrong on this processor")


def _check_steps(module: Any, at: list[int]) -> None:
    """Call the kernels of `compiled_steps`."""
    ids, counts, token_of_row, row_of_pair = np.zeros((4, 2), np.int64)
    index = (ids.ctypes.data, row_of_pair.ctypes.data)
    module.product(0, 2, 4, 4, *at[:2], 0.0, at[2])
    module.route(*at[:3], 2, 4, 2, 1, 1e-12, *at[3:5], ids.ctypes.data, at[5])
    module.sort_pairs(
        ids.ctypes.data, at[5], 2, 1, 2, counts.ctypes.data, token_of_row.ctypes.data,
        row_of_pair.ctypes.data, at[6],
    )  # fmt: skip
    module.route_backward(at[4], *index, at[5], 0, 2, 2, 1, 1e-12, at[7])
    sizes = (2, 4, 5, 2)
    module.token_logprobs(*at[:2], ids.ctypes.data, 1.0, *sizes, *at[2:6])
    module.token_logprobs_backward(
        *at[:2], ids.ctypes.data, 1.0, at[5], at[6], at[4], at[7], 0, *sizes, at[2], *at[8:10]
    )


def _loss_is_right(module: Any) -> bool:
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
    return bool(np.abs(losses - exact).max() < 1e-5)
