"""Products with a weight that MKL has packed once: sampling multiplies it by a few rows every step.

With few rows most of a product is reading the weight and bringing it into the order in which it is
multiplied. One thread of a busy Intel Xeon with AVX-512, [576,3072], microseconds:

    rows   numpy's OpenBLAS in column blocks   MKL   packed
       8                                1102  1125      768
      32                                1688  1902     1323
      64                                3898  2382     2114

The bits of a row depend neither on the other rows nor on where the arrays lie.

Shapes: T rows, n inputs, m outputs.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from ernie_train.core import blas
from ernie_train.kernels.loading import MKL, chosen_kernels

# Smaller weights fit into the caches and were not compared; golden curves hold their bits.
_LEAST_INPUTS = 512
_ROWS = 32  # for which MKL chooses the order; any number may be multiplied
_ROW_MAJOR, _PLAIN, _TRANSPOSED, _PACKED, _SECOND = 101, 111, 112, 151, 162  # of cblas.h


def packs(inputs: int) -> bool:
    """Return whether a `PackedWeight` [inputs,m] can be made here, and is faster.

    On AMD it was never measured; MKL's kernels there know no AVX-512, and OpenBLAS's do.
    """
    return inputs >= _LEAST_INPUTS and _library() is not None and _is_right()


class PackedWeight:
    """A copy of a weight [n,m] float32 in MKL's order. Raises `RuntimeError` where none is made."""

    def __init__(self, weight: np.ndarray) -> None:
        library = _library()
        if library is None:
            raise RuntimeError("no MKL that packs weights")
        self.shape = n, m = weight.shape
        order, columns = _PLAIN, m
        if weight.T.flags.c_contiguous:  # as that of a head, whose rows are those of the embedding
            weight, order, columns = weight.T, _TRANSPOSED, n
        weight = np.ascontiguousarray(weight, np.float32)
        self._packed = library.cblas_sgemm_alloc(_SECOND, _ROWS, m, n)
        if not self._packed:
            raise MemoryError(f"no memory for a packed weight of {n} x {m}")
        weakref.finalize(self, library.cblas_sgemm_free, self._packed)
        library.cblas_sgemm_pack(
            _ROW_MAJOR, _SECOND, order, _ROWS, m, n, 1.0, weight.ctypes.data, columns, self._packed
        )
        self._compute = library.cblas_sgemm_compute

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return x [T,n] times the weight, [T,m]."""
        n, m = self.shape
        x = np.ascontiguousarray(x, np.float32)
        if x.shape[1] != n:
            raise ValueError(f"rows of {x.shape[1]} numbers for a weight of {n} inputs")
        output = np.empty((len(x), m), np.float32)
        if len(x):
            self._compute(
                _ROW_MAJOR, _PLAIN, _PACKED, len(x), m, n, x.ctypes.data, n, self._packed, m, 0.0,
                output.ctypes.data, m,
            )  # fmt: skip
        return output


@contextmanager
def one_mkl_thread() -> Iterator[None]:
    """Multiply by packed weights on one thread, here and in processes forked from here."""
    library = _library()
    if library is None:
        yield
        return
    before = library.MKL_Set_Num_Threads_Local(1)
    try:
        yield
    finally:
        library.MKL_Set_Num_Threads_Local(before)


@cache
def _library() -> ctypes.CDLL | None:
    """Return MKL if it packs weights here, else None."""
    if chosen_kernels() == "plain" or blas.read_processor().vendor != "GenuineIntel":
        return None
    number, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    try:
        library = ctypes.CDLL(str(MKL))
        library.cblas_sgemm_alloc.argtypes = [number] * 4
        library.cblas_sgemm_alloc.restype = pointer
        library.cblas_sgemm_free.argtypes = [pointer]
        library.cblas_sgemm_pack.argtypes = [*[number] * 6, real, pointer, number, pointer]
        library.cblas_sgemm_compute.argtypes = [
            *[number] * 6, pointer, number, pointer, number, real, pointer, number,
        ]  # fmt: skip
        library.MKL_Set_Num_Threads_Local.argtypes = [number]
    except (OSError, AttributeError):  # another build of Paddle
        return None
    return library


@cache
def _is_right() -> bool:
    random = np.random.default_rng(0)
    x, weight = random.random((3, 40), np.float32), random.random((40, 20), np.float32)
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    return bool(np.abs(PackedWeight(weight)(x) - exact).max() < 1e-4)
