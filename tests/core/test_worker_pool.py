"""Copies of this process do their work, tell what went wrong, and never stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ernie_train.core import worker_pool
from ernie_train.core.errors import ConfigError, ErnieTrainError
from ernie_train.core.processes import process_state
from ernie_train.core.worker_pool import WorkerPool, one_blas_thread, shared_zeros

LIMIT_S = 60.0


def until(condition, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def sleep_long():
    time.sleep(10 * LIMIT_S)


def test_what_jobs_write_is_there_afterwards():
    array = shared_zeros((3, 2), np.float32)
    assert array.shape == (3, 2) and array.dtype == np.float32 and not array.any()

    def write(row):
        array[row] = [row, os.getpid()]

    with WorkerPool() as pool:
        for row in (1, 2):
            pool.start(lambda row=row: write(row))
        pool.wait()
    assert array[:, 0].tolist() == [0, 1, 2]
    assert len(set(array[:, 1].tolist())) == 3 and os.getpid() not in array[:, 1]


def test_an_array_may_be_empty():
    assert shared_zeros((0, 5), np.int64).shape == (0, 5)


def test_an_error_arrives_as_itself():
    def fail():
        raise ConfigError("key: wrong", source="recipe.yaml")

    with pytest.raises(ConfigError) as caught, WorkerPool() as pool:
        pool.start(fail)
        pool.wait()
    assert str(caught.value) == "recipe.yaml: key: wrong"
    assert "in fail" in str(caught.value.__cause__)


class Stubborn(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_sent_arrives_as_text():
    def fail():
        raise Stubborn(1, 2)

    with pytest.raises(RuntimeError) as caught, WorkerPool() as pool:
        pool.start(fail)
        pool.wait()
    assert str(caught.value) == "Stubborn: 1 and 2"


def test_a_long_error_waits_until_somebody_looks():
    def fail():
        raise ValueError("x" * 300_000)

    with pytest.raises(ValueError) as caught, WorkerPool() as pool:
        pool.start(fail)
        pool.wait()
    assert str(caught.value) == "x" * 300_000


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL .memory may have"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV$"),
        (lambda: os._exit(3), "ended with status 3"),
    ],
)
def test_a_process_that_dies_is_an_error_that_says_how(job, message):
    with pytest.raises(ErnieTrainError, match=message), WorkerPool() as pool:
        pool.start(job)
        pool.wait()


def test_looking_does_not_wait_and_leaving_ends_all():
    with WorkerPool() as pool:
        for _ in range(2):
            pool.start(sleep_long)
        pids = list(pool._running.values())
        pool.poll()
        assert [process_state(pid).parent for pid in pids] == [os.getpid()] * 2
    assert [process_state(pid) for pid in pids] == [None, None]


def test_an_error_of_one_ends_the_others():
    def fail():
        raise ValueError("no")

    pids = []
    with pytest.raises(ValueError, match="no"), WorkerPool() as pool:
        pool.start(sleep_long)
        pool.start(fail)
        pids += pool._running.values()
        pool.wait()
    assert [process_state(pid) for pid in pids] == [None, None]


def test_signals_of_the_whole_group_are_for_the_parent():
    told = shared_zeros(1, np.int64)

    def job():
        told[0] = 1
        until(lambda: told[0] == 2)

    with WorkerPool() as pool:
        pool.start(job)
        until(lambda: told[0] == 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(next(iter(pool._running.values())), number)
        told[0] = 2
        pool.wait()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


PARENT = """
import atexit, time, ernie_train
from ernie_train.core.worker_pool import WorkerPool
print("in a buffer")
atexit.register(print, "at the end")
with WorkerPool() as pool:
    pool.start(lambda: {job})
    {then}
"""


def started(job, then):
    command = [sys.executable, "-c", PARENT.format(job=job, then=then)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=buffered)


def test_a_process_ends_with_its_killed_parent():
    then = "print(*pool._running.values(), flush=True); time.sleep(1000)"
    with started("time.sleep(1000)", then) as parent:
        assert parent.stdout.readline() == "in a buffer\n"  # once: the copy has not written it
        pid = int(parent.stdout.readline())
        assert process_state(pid).parent == parent.pid
        parent.kill()
        parent.wait()
        until(lambda: (found := process_state(pid)) is None or found.state in "ZX")


def test_buffers_and_exit_handlers_stay_with_the_parent():
    with started("print('in the copy')", "pool.wait()") as parent:
        assert parent.stdout.read() == "in a buffer\nat the end\n"


def test_blas_takes_one_thread_meanwhile():
    assert worker_pool.can_limit_blas()

    def threads():
        return worker_pool._openblas().info()[0]["num_threads"]

    with worker_pool._openblas().limit(limits=2):
        with pytest.raises(KeyError), one_blas_thread():
            assert threads() == 1
            raise KeyError
        assert threads() == 2
