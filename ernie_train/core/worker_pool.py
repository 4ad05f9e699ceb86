"""Run functions in forked copies of this process, for work that Python's threads cannot share.

A copy sees all memory as it was at the fork; a page is copied only once one side writes to it. It
must not call Paddle, whose threads a fork does not copy. Results come back in `shared_zeros`.
"""

from __future__ import annotations

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
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from ernie_train.core.errors import ErnieTrainError
from ernie_train.core.processes import die_with_parent, signal_name

_STOPS = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.002


def shared_zeros(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """Return zeros that forked processes share with this one; untouched pages take no memory."""
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, count).reshape(shape)


class WorkerPool:
    """Forked copies of this process with one job each; leaving the context kills those that run.

    with WorkerPool() as pool:
        pool.start(job)
        ...  # work of this process, with `pool.poll()` now and then
        pool.wait()
    """

    def __init__(self) -> None:
        self._running: dict[int, int] = {}  # a pipe that closes when the process ends -> its id

    def start(self, job: Callable[[], object]) -> None:
        """Fork a copy that runs `job`; the kernel kills it when this thread ends."""
        reading, writing = os.pipe()
        parent = os.getpid()
        # They stay blocked in the copy: this process gets them too, and decides.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            pid = os.fork()
            if pid == 0:
                _run_job(job, writing, parent)
            self._running[reading] = pid
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self, wait_s: float = 0.0) -> None:
        """Collect the processes that have ended, waiting up to `wait_s` for the first.

        Raises what a job raised, and `ErnieTrainError` for a process that was killed.
        """
        if not self._running:
            return
        poller = select.poll()
        for reading in self._running:
            poller.register(reading, select.POLLIN)
        for reading, _ in poller.poll(wait_s * 1000):
            with open(reading, "rb") as stream:
                sent = stream.read()
            _, status = os.waitpid(self._running.pop(reading), 0)
            if sent:
                pickled, text = pickle.loads(sent)
                error = pickle.loads(pickled)
                raise error from ErnieTrainError(f"It was raised in a forked process:\n{text}")
            if status:
                raise ErnieTrainError(f"a forked process {_describe_status(status)}")

    def wait(self, on_poll: Callable[[], object] = lambda: None) -> None:
        """Wait until all have ended, calling `on_poll`, which may raise. Raises as `poll` does."""
        while self._running:
            on_poll()
            self.poll(_POLL_S)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *raised: object) -> None:
        for pid in self._running.values():
            os.kill(pid, signal.SIGKILL)
        for reading, pid in self._running.items():
            os.waitpid(pid, 0)
            os.close(reading)
        self._running.clear()


def _run_job(job: Callable[[], object], writing: int, parent: int) -> NoReturn:
    """Run `job` in a copy, which leaves its parent's buffers, exit handlers and threads alone."""
    status = 1
    try:
        die_with_parent(parent)
        gc.disable()  # looking through all the parent's objects would copy their pages
        job()
        status = 0
    except BaseException as error:
        with open(writing, "wb") as stream:
            stream.write(pickle.dumps((_pickle_error(error), traceback.format_exc())))
    finally:
        os._exit(status)


def _pickle_error(error: BaseException) -> bytes:
    """Pickle an error; one that does not survive that becomes a `RuntimeError` with its text."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # whatever its constructor or its arguments may raise
        pickled = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return pickled


def _describe_status(status: int) -> str:
    if os.WIFSIGNALED(status):
        name = signal_name(os.WTERMSIG(status))
        memory = " (memory may have run out)" if name == "SIGKILL" else ""
        return f"was killed by {name}{memory}"
    return f"ended with status {os.WEXITSTATUS(status)}"


@cache
def _openblas() -> ThreadpoolController:
    """Return the control of numpy's OpenBLAS; it controls nothing where numpy has another BLAS."""
    return ThreadpoolController().select(internal_api="openblas")


def can_limit_blas() -> bool:
    """Return whether `one_blas_thread` can limit numpy's threads."""
    return len(_openblas()) > 0


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Make numpy multiply matrices on one thread; raises `RuntimeError` without OpenBLAS."""
    if not can_limit_blas():
        raise RuntimeError("numpy was not built with OpenBLAS")
    with _openblas().limit(limits=1):
        yield
