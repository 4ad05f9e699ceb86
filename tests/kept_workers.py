"""Scoring processes that outlive the service that started them: each start takes a second.

Only processes that wait for work are kept, and given to services in the same directory and
environment alone.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ernie_train.rewards.scoring import service
from ernie_train.rewards.scoring.worker_process import WorkerProcess

Surroundings = tuple[str, frozenset[tuple[str, str]]]
MOST_KEPT = 4
_kept: list[tuple[Surroundings, WorkerProcess]] = []


def _surroundings() -> Surroundings:
    """What a process takes over from the one that starts it."""
    told = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return os.getcwd(), frozenset(told.items())


class KeptWorker(WorkerProcess):
    """A scoring process that is put aside where others are ended."""

    def __init__(self) -> None:
        self.surroundings = _surroundings()
        super().__init__()

    def close(self, limit_s: float = 2.0) -> None:
        if not self.ready or self.task is not None:
            return super().close(limit_s)
        _kept.append((self.surroundings, self))
        if len(_kept) > MOST_KEPT:
            WorkerProcess.close(_kept.pop(0)[1], limit_s)


def _take() -> WorkerProcess:
    wanted = _surroundings()
    for at, (surroundings, worker) in enumerate(_kept):
        if surroundings == wanted:
            del _kept[at]
            return worker
    return KeptWorker()


@atexit.register
def _end() -> None:
    for _, worker in _kept:
        worker.kill()


@contextmanager
def kept_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "WorkerProcess", _take)
        yield
