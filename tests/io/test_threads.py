"""Files in threads: results in order, a bound on those at work, and an end of all at an error."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from ernie_train.io.threads import GoOn, in_threads


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_results_are_in_order_and_no_more_than_so_many_run(count: int) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work(item: int, go_on: GoOn) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002 * (item % 3))
        go_on()
        with lock:
            running -= 1
        return item * item

    assert in_threads(work, iter(range(20)), count) == [item * item for item in range(20)]
    assert most <= max(1, count) and (most > 1) == (count > 1)


@pytest.mark.parametrize("fails", ["work", "items", "signal"])
def test_an_error_ends_what_runs(fails: str) -> None:
    ended: list[int] = []
    started, taken = threading.Barrier(3, timeout=60), threading.Event()

    def work(item: int, go_on: GoOn) -> None:
        if item == 0:
            started.wait()
            if fails == "work":
                raise ValueError("the disk")
            if fails == "signal" and taken.wait(60):
                os.kill(os.getpid(), signal.SIGUSR1)
        try:
            if item:
                started.wait()
            while True:
                go_on()
        except CancelledError:
            ended.append(item)
            raise

    def items() -> Iterator[int]:
        yield from range(3)
        taken.set()
        if fails == "items":
            raise ValueError("the disk")

    def stop(*_: object) -> None:
        raise ValueError("the disk")

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(ValueError, match="the disk"):
            in_threads(work, items(), 4)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(ended) == ([1, 2] if fails == "work" else [0, 1, 2])
