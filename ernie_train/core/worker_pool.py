"""A part of the work in forked copies of this process, for what Python's threads cannot share.

A copy sees everything as it was when it began, and pages are copied only once one side writes to
them. It must do without Paddle, whose threads it does not have. What it finds out comes back in
arrays of `shared_zeros`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ernie_train.core.errors import ErnieTrainError
from ernie_train.core.processes import die_with_parent

_STOPS = (signal.SIGTERM, signal.SIGINT)


def shared_zeros(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Zeros in memory that copies of this process share with it; what is not touched takes none."""
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, count).reshape(shape)


class WorkerPool:
    """Copies of this process with a job each; whoever still works when the context ends is killed.

    with Crew() as crew:
        crew.start(job)
        ...  # own work, and `crew.look()` at times
        crew.wait(lambda: None)
    """

    def __init__(self) -> None:
        self._running: dict[int, int] = {}  # a pipe that closes when the process ends -> its number

    def start(self, job: Callable[[], object]) -> None:
        """Forks a copy that does `job`, and ends with this thread at the latest."""
        reading, writing = os.pipe()
        parent = os.getpid()
        # They stay blocked in the copy: this process hears of them too, and decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            pid = os.fork()
            if pid == 0:
                _work(job, writing, parent)
            self._running[reading] = pid
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def look(self, wait_s: float = 0.0) -> None:
        """Takes note of those that have ended; waits for one so long.

        Raises what a job raised, and `ErnieTrainError` for a process that was killed.
        """
        if not self._running:
            return
        poll = select.poll()
        for reading in self._running:
            poll.register(reading, select.POLLIN)
        for reading, _ in poll.poll(wait_s * 1000):
            with open(reading, "rb") as stream:
                told = stream.read()
            _, status = os.waitpid(self._running.pop(reading), 0)
            if told:
                packed, text = pickle.loads(told)
                error = pickle.loads(packed)
                error.add_note(f"It was raised in a forked process:\n{text}")
                raise error
            if status:
                raise ErnieTrainError(f"a forked process {_ending(status)}")

    def wait(self, ask: Callable[[], object], every_s: float = 0.002) -> None:
        """Waits for all to end, and calls `ask` in between, which may raise. Raises as `look`."""
        while self._running:
            ask()
            self.look(every_s)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *raised: object) -> None:
        for pid in self._running.values():
            os.kill(pid, signal.SIGKILL)
        for reading, pid in self._running.items():
            os.waitpid(pid, 0)
            os.close(reading)
        self._running.clear()


def _work(job: Callable[[], object], writing: int, parent: int) -> NoReturn:
    """What a copy does. It leaves buffers, handlers and threads of its parent alone."""
    status = 1
    try:
        die_with_parent(parent)
        gc.disable()  # looking through all the parent's objects would copy their pages
        job()
        status = 0
    except BaseException as error:
        with open(writing, "wb") as stream:
            stream.write(pickle.dumps((_packed(error), traceback.format_exc())))
    finally:
        os._exit(status)


def _packed(error: BaseException) -> bytes:
    """The error as bytes; one that cannot be rebuilt from them as a `RuntimeError`."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
    except Exception:  # whatever its constructor or its arguments may raise
        packed = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        memory = " (memory may have run out)" if name == "SIGKILL" else ""
        return f"was killed by {name}{memory}"
    return f"ended with status {os.WEXITSTATUS(status)}"


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """What reads and sets the number of threads of numpy's OpenBLAS; None for another library."""
    # Symbols are looked up in the libraries that this one needs, too.
    library: Any = ctypes.CDLL(np.core._multiarray_umath.__file__)
    for suffix in ("64_", ""):
        get = getattr(library, f"openblas_get_num_threads{suffix}", None)
        if get is not None:
            return get, getattr(library, f"openblas_set_num_threads{suffix}")
    return None


def can_limit_blas() -> bool:
    """Whether `one_blas_thread` can do what it says."""
    return _openblas() is not None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Has numpy multiply matrices on one thread; raises `RuntimeError` without OpenBLAS."""
    functions = _openblas()
    if functions is None:
        raise RuntimeError("numpy was not built with OpenBLAS")
    get, put = functions
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)
