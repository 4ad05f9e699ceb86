"""What a rank tells the command that supervises it, and what it owes to it.

The launcher between the two hides exit statuses and messages, so they go through files in a
directory of this launch, which the variable ERNIE_TRAIN_LAUNCH names:

    rank_0.pid    the rank is there: its process, its place on this machine
    rank_0.beat   touched every second by a thread of the rank
    rank_0.end    how it ended: status and message
    notes.NAME    something that was done once and must not be done again after a restart

A process outside of a launch has none of this; `RankReport.of_this_process` is None there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ernie_train.core import process_group, processes
from ernie_train.io.files import write_json

DIRECTORY = "ERNIE_TRAIN_LAUNCH"
SUPERVISOR = "ERNIE_TRAIN_SUPERVISOR"  # number of the supervising process
TERMINAL = "ERNIE_TRAIN_TERMINAL"  # set if what rank 0 prints ends up in a terminal
BEAT_EVERY_S = 1.0


@dataclass(frozen=True)
class RankProcess:
    """A rank that has come up. `local_rank` counts the ranks of this machine."""

    rank: int
    local_rank: int
    pid: int
    started: int


@dataclass(frozen=True)
class RankExit:
    """How a rank ended, by its own word; `at` is a moment of time.monotonic(), for their order."""

    rank: int
    status: int
    message: str
    at: float


class RankReport:
    """This process as a rank of a supervised launch."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank

    @classmethod
    def of_this_process(cls) -> RankReport | None:
        directory = os.environ.get(DIRECTORY)
        return cls(Path(directory), process_group.rank()) if directory else None

    def begin(self) -> None:
        """Binds this process to its supervisor and begins to give signs of life."""
        processes.die_with_parent()
        self._refuse_to_be_an_orphan()
        if self.rank == 0 and os.environ.get(TERMINAL):
            os.environ["FORCE_COLOR"] = "1"  # rich then draws its bars, into a file too
        self._beat_file.touch()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        local_rank = int(os.environ.get("PADDLE_LOCAL_RANK", "0"))
        own = processes.process_state(os.getpid())
        started = own.started if own else 0
        process = RankProcess(self.rank, local_rank, os.getpid(), started)
        write_json(self.directory / f"rank_{self.rank}.pid", asdict(process))

    def end(self, status: int, message: str) -> None:
        """Leaves the last word. The process should then exit with 0: see launch/launcher.py."""
        ending = RankExit(self.rank, status, message, time.monotonic())
        write_json(self.directory / f"rank_{self.rank}.end", asdict(ending))

    @property
    def _beat_file(self) -> Path:
        return self.directory / f"rank_{self.rank}.beat"

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_EVERY_S)
            try:
                os.utime(self._beat_file)
            except OSError:
                return  # the supervisor has cleared up

    def _refuse_to_be_an_orphan(self) -> None:
        """The launcher may have ended before this process could ask to die with it."""
        parent = processes.process_state(os.getppid())
        if parent is None or str(parent.parent) != os.environ.get(SUPERVISOR):
            raise SystemExit("the command that started this rank has ended")


def is_supervised() -> bool:
    """Whether this process is a rank whose last word a supervisor reads."""
    return bool(os.environ.get(DIRECTORY))


def note(name: str) -> None:
    """Tells the supervisor that something was done which a restart must not do again."""
    directory = os.environ.get(DIRECTORY)
    if directory and process_group.is_main():
        (Path(directory) / f"notes.{name}").touch()


# ---- the supervisor's side ---------------------------------------------------------------------


def was_noted(directory: Path, name: str) -> bool:
    return (directory / f"notes.{name}").exists()


def read_processes(directory: Path) -> Iterator[RankProcess]:
    """The ranks that have come up."""
    for path in sorted(directory.glob("rank_*.pid")):
        yield RankProcess(**json.loads(path.read_text(encoding="utf-8")))


def read_endings(directory: Path) -> Iterator[RankExit]:
    """The last words of ranks that left any."""
    for path in sorted(directory.glob("rank_*.end")):
        yield RankExit(**json.loads(path.read_text(encoding="utf-8")))


def last_beat(directory: Path, rank: int) -> float:
    """A value that changes with each sign of life."""
    return (directory / f"rank_{rank}.beat").stat().st_mtime
