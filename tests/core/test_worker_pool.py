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


def finish(crew):
    crew.wait(lambda: None)


def test_what_jobs_write_is_there_afterwards():
    array = shared_zeros((3, 2), np.float32)
    assert array.shape == (3, 2) and array.dtype == np.float32 and not array.any()

    def write(row):
        array[row] = [row, os.getpid()]

    with WorkerPool() as crew:
        for row in (1, 2):
            crew.start(lambda row=row: write(row))
        finish(crew)
    assert array[:, 0].tolist() == [0, 1, 2]
    assert len(set(array[:, 1].tolist())) == 3 and os.getpid() not in array[:, 1]


def test_an_array_may_be_empty():
    assert shared_zeros((0, 5), np.int64).shape == (0, 5)


def test_an_error_arrives_as_itself():
    def fail():
        raise ConfigError("key: wrong", source="recipe.yaml")

    with pytest.raises(ConfigError) as caught, WorkerPool() as crew:
        crew.start(fail)
        finish(crew)
    assert str(caught.value) == "recipe.yaml: key: wrong"
    (note,) = caught.value.__notes__
    assert "in fail" in note


class Stubborn(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_sent_arrives_as_text():
    def fail():
        raise Stubborn(1, 2)

    with pytest.raises(RuntimeError) as caught, WorkerPool() as crew:
        crew.start(fail)
        finish(crew)
    assert str(caught.value) == "Stubborn: 1 and 2"


def test_a_long_error_waits_until_somebody_looks():
    def fail():
        raise ValueError("x" * 300_000)

    with pytest.raises(ValueError) as caught, WorkerPool() as crew:
        crew.start(fail)
        finish(crew)
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
    with pytest.raises(ErnieTrainError, match=message), WorkerPool() as crew:
        crew.start(job)
        finish(crew)


def test_looking_does_not_wait_and_leaving_ends_all():
    with WorkerPool() as crew:
        for _ in range(2):
            crew.start(sleep_long)
        pids = list(crew._running.values())
        crew.look()
        assert [process_state(pid).parent for pid in pids] == [os.getpid()] * 2
    assert [process_state(pid) for pid in pids] == [None, None]


def test_an_error_of_one_ends_the_others():
    def fail():
        raise ValueError("no")

    pids = []
    with pytest.raises(ValueError, match="no"), WorkerPool() as crew:
        crew.start(sleep_long)
        crew.start(fail)
        pids += crew._running.values()
        finish(crew)
    assert [process_state(pid) for pid in pids] == [None, None]


def test_signals_of_the_whole_group_are_for_the_parent():
    told = shared_zeros(1, np.int64)

    def job():
        told[0] = 1
        until(lambda: told[0] == 2)

    with WorkerPool() as crew:
        crew.start(job)
        until(lambda: told[0] == 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(next(iter(crew._running.values())), number)
        told[0] = 2
        finish(crew)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


PARENT = """
import atexit, time, ernie_train
from ernie_train.core.worker_pool import Crew
print("in a buffer")
atexit.register(print, "at the end")
with Crew() as crew:
    crew.start(lambda: {job})
    {then}
"""


def started(job, then):
    command = [sys.executable, "-c", PARENT.format(job=job, then=then)]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=buffered)


def test_a_process_ends_with_its_killed_parent():
    then = "print(*crew._running.values(), flush=True); time.sleep(1000)"
    with started("time.sleep(1000)", then) as parent:
        assert parent.stdout.readline() == "in a buffer\n"  # once: the copy has not written it
        pid = int(parent.stdout.readline())
        assert process_state(pid).parent == parent.pid
        parent.kill()
        parent.wait()
        until(lambda: (found := process_state(pid)) is None or found.state in "ZX")


def test_buffers_and_exit_handlers_stay_with_the_parent():
    with started("print('in the copy')", "crew.wait(lambda: None)") as parent:
        assert parent.stdout.read() == "in a buffer\nat the end\n"


def test_blas_takes_one_thread_meanwhile():
    get, put = worker_pool._openblas()
    before = get()
    put(2)
    try:
        with pytest.raises(KeyError), one_blas_thread():
            assert get() == 1
            raise KeyError
        assert get() == 2
    finally:
        put(before)
