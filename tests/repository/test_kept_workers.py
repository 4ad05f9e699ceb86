"""Which scoring processes `tests/kept_workers.py` hands on: none that could give another result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ernie_train.rewards.scoring import service
from ernie_train.rewards.scoring.worker_process import WorkerProcess
from tests import kept_workers


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WorkerProcess]]:
    """Processes that were closed for good; none is real, and none of other tests is handed on."""
    found: list[WorkerProcess] = []

    def start(self: WorkerProcess) -> None:
        self.ready, self.task = True, None

    monkeypatch.setattr(WorkerProcess, "__init__", start)
    monkeypatch.setattr(WorkerProcess, "close", lambda self, limit_s=2.0: found.append(self))
    monkeypatch.setattr(kept_workers, "_kept", [])
    with kept_workers.kept_workers():
        yield found


def closed(worker: WorkerProcess) -> WorkerProcess:
    worker.close()
    return worker


def test_an_idle_process_is_handed_on_once(ended: list[WorkerProcess]) -> None:
    first = closed(service.WorkerProcess())
    assert service.WorkerProcess() is first
    assert service.WorkerProcess() is not first
    assert ended == []


@pytest.mark.parametrize(("name", "value"), [("ready", False), ("task", "something")])
def test_one_that_starts_or_works_ends(
    ended: list[WorkerProcess], name: str, value: object
) -> None:
    worker = service.WorkerProcess()
    setattr(worker, name, value)
    assert ended == [closed(worker)]
    assert service.WorkerProcess() is not worker


def test_another_directory_or_environment_has_processes_of_its_own(
    ended: list[WorkerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = closed(service.WorkerProcess())
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        assert service.WorkerProcess() is not first
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TMPDIR", str(tmp_path))
        assert service.WorkerProcess() is not first
    assert service.WorkerProcess() is first


def test_the_oldest_ends_where_too_many_wait(ended: list[WorkerProcess]) -> None:
    workers = [service.WorkerProcess() for _ in range(kept_workers.MOST_KEPT + 1)]
    for worker in workers:
        worker.close()
    assert ended == workers[:1]
