"""Read or write several files at a time, each in a thread of its own.

Threads help here: hashes, copies of arrays and system calls leave Python's lock to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event, Semaphore
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

FILES_AT_ONCE = 4  # of each rank: eight on one machine have 32 threads
GoOn = Callable[[], None]


def in_threads(work: Callable[[T, GoOn], R], items: Iterable[T], count: int) -> list[R]:
    """Return `work(item, go_on)` of each item, in order; `count` run at a time.

    Items are taken in the calling thread, each when there is a thread for it. An error, or a signal
    that raises one, ends all: work calls `go_on` now and then, which raises once that is so.
    """
    if count <= 1:
        return [work(item, lambda: None) for item in items]
    ended, at_work = Event(), Semaphore(count)

    def go_on() -> None:
        if ended.is_set():
            raise CancelledError

    def run(item: T) -> R:
        with at_work:
            go_on()
            return work(item, go_on)

    found: list[R] = []
    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                running.append(pool.submit(run, item))
                if len(running) == count:
                    found.append(running.popleft().result())
            found += [job.result() for job in running]
        except BaseException:
            ended.set()
            # The pool does not know of a thread during whose start a signal came.
            for _ in range(count):
                at_work.acquire()
            at_work.release(count)
            raise
    return found
