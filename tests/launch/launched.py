"""Starting and watching launches in tests: the supervisor runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ernie_train.core import processes
from tests.workspace import REPOSITORY

TOY = REPOSITORY / "tests" / "launch" / "toy_rank.py"
SUPERVISOR = """
import sys
from pathlib import Path
from rich.console import Console
from ernie_train.launch import LaunchSettings, supervise
toy, behaviour, out, steps, settings = *sys.argv[1:5], eval(sys.argv[5])
command = [sys.executable, "-u", toy, behaviour, out, steps]
console = Console(stderr=True)
sys.exit(supervise(lambda _: command, LaunchSettings(**settings), Path(out), console))
"""
LIMIT_S = 60.0  # within which a job must be over, whatever happened to it


class Launch:
    """Toy ranks under the supervisor. `out` is the run directory too.

    `stdout` and `stderr` are pipes, which `end` reads, or files.
    """

    def __init__(
        self,
        behaviour: str,
        out: Path,
        *,
        steps: int = 3,
        stdout: int | IO[str] = subprocess.PIPE,
        stderr: int | IO[str] = subprocess.PIPE,
        **settings: Any,
    ) -> None:
        settings = {"nproc": 2, **settings}
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, TOY, behaviour, out, str(steps), repr(settings)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=stdout,
            stderr=stderr,
            text=True,
        )

    def rank(self, number: int) -> int:
        """The process of a rank, once it has begun."""
        path = self.out / f"pid_{number}"
        wait_for(path.exists, f"rank {number} did not begin")
        return int(path.read_text().split()[0])

    def wait_for_step(self, step: int) -> None:
        path = self.out / "step_0"
        wait_for(lambda: path.exists() and int(path.read_text() or 0) >= step, f"no step {step}")

    def end(self) -> tuple[int, str, str]:
        """Status, standard output and standard error, when it is over."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out or "", " ".join((err or "").split())


def wait_for(condition: Callable[[], bool], complaint: str, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.02)


def ranks_of(directory: Path) -> dict[int, int]:
    """The processes of the living ranks that train in a directory, by number."""
    found = {}
    for pid in left_behind(directory):
        try:
            variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        named = dict(variable.partition(b"=")[::2] for variable in variables)
        if b"PADDLE_TRAINER_ID" in named and alive(pid):
            found[int(named[b"PADDLE_TRAINER_ID"])] = pid
    return found


def alive(pid: int) -> bool:
    found = processes.process_state(pid)
    return found is not None and found.state not in "ZX"


def left_behind(out: Path) -> list[int]:
    """Processes whose arguments name the directory: supervisors, launchers and ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(out).encode() in arguments and processes.process_state(int(entry.name)):
                found.append(int(entry.name))
    return found
