"""Processes that must not outlive their owner: what Linux says of them, and how they are ended.

A process that asks to die with its parent is killed by the kernel when the parent ends, however
that happens. A process that adopts orphans becomes the parent of descendants whose own parent has
ended, so that none escapes it.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_PROC = Path("/proc")


class ProcessState(NamedTuple):
    """What /proc/PID/stat says. `state` is R, S, D, T (stopped), Z (ended), ..."""

    state: str
    parent: int
    cpu_ticks: int
    started: int  # with the number of the process it names a process for good


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the thread that started it ends, however that happens.

    `parent` is the number of the process that started it, taken before it did: where that one has
    ended before the kernel could be asked, this process ends here. None leaves that to the caller.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose parents end."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def process_state(pid: int) -> ProcessState | None:
    """The state of a process, None if there is none of this number."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may hold anything, brackets too.
    words = text.rpartition(")")[2].split()
    return ProcessState(words[0], int(words[1]), int(words[11]) + int(words[12]), int(words[19]))


def is_running(pid: int, started: int) -> bool:
    """Whether the process that began at `started` has not ended yet; a stopped one has not."""
    found = process_state(pid)
    return found is not None and found.started == started and found.state not in "ZX"


def descendants(roots: Iterable[int]) -> set[int]:
    """All processes below `roots`, without them."""
    parents = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (found := process_state(int(entry.name))) is not None:
            parents[int(entry.name)] = found.parent
    found_below: set[int] = set()
    level = set(roots)
    while level:
        level = {pid for pid, parent in parents.items() if parent in level} - found_below
        found_below |= level
    return found_below


def kill_descendants(spared: Iterable[int] = (), limit_s: float = 10.0) -> set[int]:
    """Kills all that this process started, and what those started, but not `spared`.

    Returns what still ran after `limit_s`, which only a process in the kernel's hands does. This
    process must have called `adopt_orphans`.
    """
    own, kept = os.getpid(), set(spared)
    end = time.monotonic() + limit_s
    while True:
        doomed = descendants([own]) - kept - descendants(kept)
        for pid in doomed:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not doomed or time.monotonic() > end:
            return doomed
        time.sleep(0.02)
