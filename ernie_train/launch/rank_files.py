"""Write and read the files by which ranks report to the command that supervises them.

Paddle's launcher, between the two, hides exit statuses and messages. So each rank writes to a
directory of its launch, which the variable ERNIE_TRAIN_LAUNCH names:

    rank_0.process    the rank has started: its process, its place on this machine
    rank_0.heartbeat  touched every second by a thread of the rank
    rank_0.exit       exit status and message
    marker.NAME       something was done that a restart must not do again

Outside of a launch no file is written, and `RankReporter.of_this_process` returns None.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ernie_train.core import process_group, processes
from ernie_train.io.files import write_json

DIRECTORY = "ERNIE_TRAIN_LAUNCH"
SUPERVISOR = "ERNIE_TRAIN_SUPERVISOR"  # process id of the supervisor
TERMINAL = "ERNIE_TRAIN_TERMINAL"  # set if the output of rank 0 is shown in a terminal
HEARTBEAT_EVERY_S = 1.0
STAGES_SET_ASIDE = "stages_set_aside"  # marker: the stages that --from repeats were renamed


@dataclass(frozen=True)
class RankProcess:
    """Hold a rank that has started. `local_rank` counts the ranks of this machine."""

    rank: int
    local_rank: int
    pid: int
    started: int  # start time of the process: a process id may be reused


@dataclass(frozen=True)
class RankExit:
    """Hold the exit of a rank as reported by the rank itself."""

    rank: int
    status: int
    message: str
    monotonic_s: float  # time.monotonic() of the report, for the order of exits


class RankReporter:
    """Report the state of this process, as a rank of a supervised launch."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank

    @classmethod
    def of_this_process(cls) -> RankReporter | None:
        directory = os.environ.get(DIRECTORY)
        return cls(Path(directory), process_group.rank()) if directory else None

    def start(self) -> None:
        """Tie this process to its supervisor, start the heartbeat, report the process."""
        processes.die_with_parent()
        self._refuse_to_be_an_orphan()
        restore_proxies(os.environ)
        if self.rank == 0 and os.environ.get(TERMINAL):
            os.environ["FORCE_COLOR"] = "1"  # makes rich draw progress bars into a file too
        self._heartbeat_file.touch()
        threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()
        local_rank = int(os.environ.get("PADDLE_LOCAL_RANK", "0"))
        own = processes.process_state(os.getpid())
        started = own.started if own else 0
        process = RankProcess(self.rank, local_rank, os.getpid(), started)
        write_json(self.directory / f"rank_{self.rank}.process", asdict(process))

    def finish(self, status: int, message: str) -> None:
        """Report the exit. The process should then exit with 0: see launch/launcher.py."""
        report = RankExit(self.rank, status, message, time.monotonic())
        write_json(self.directory / f"rank_{self.rank}.exit", asdict(report))

    @property
    def _heartbeat_file(self) -> Path:
        return self.directory / f"rank_{self.rank}.heartbeat"

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(HEARTBEAT_EVERY_S)
            try:
                os.utime(self._heartbeat_file)
            except OSError:
                return  # the supervisor has deleted the directory

    def _refuse_to_be_an_orphan(self) -> None:
        # The launcher may have ended before this process could ask to die with it.
        parent = processes.process_state(os.getppid())
        if parent is None or str(parent.parent) != os.environ.get(SUPERVISOR):
            raise SystemExit("the command that started this rank has ended")


def restore_proxies(environ: MutableMapping[str, str]) -> None:
    """Set the proxies again that Paddle's launcher renames (3.3.1): a judge may be behind one."""
    for name in ("http_proxy", "https_proxy"):
        if value := environ.pop(f"{name}_original", None):
            environ.setdefault(name, value)


def is_supervised() -> bool:
    """Return True if this process is a rank whose exit report a supervisor reads."""
    return bool(os.environ.get(DIRECTORY))


def write_marker(name: str) -> None:
    """Record on rank 0 that something was done which a restart must not do again."""
    directory = os.environ.get(DIRECTORY)
    if directory and process_group.is_main():
        (Path(directory) / f"marker.{name}").touch()


# ---- the supervisor's side ---------------------------------------------------------------------


def has_marker(directory: Path, name: str) -> bool:
    """Return True if `write_marker` has written this marker."""
    return (directory / f"marker.{name}").exists()


def read_processes(directory: Path) -> Iterator[RankProcess]:
    """Yield the ranks that have started."""
    for path in sorted(directory.glob("rank_*.process")):
        yield RankProcess(**json.loads(path.read_text(encoding="utf-8")))


def read_exits(directory: Path) -> Iterator[RankExit]:
    """Yield the exits that ranks have reported."""
    for path in sorted(directory.glob("rank_*.exit")):
        yield RankExit(**json.loads(path.read_text(encoding="utf-8")))


def last_heartbeat(directory: Path, rank: int) -> float:
    """Return a value that changes with each heartbeat."""
    return (directory / f"rank_{rank}.heartbeat").stat().st_mtime
