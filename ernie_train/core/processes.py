"""Processes that must not outlive their owner: their state, how they end, free ports for them.

`die_with_parent` has the kernel kill a process when its parent ends, for whatever reason.
`adopt_orphans` makes a process the parent of descendants whose own parent has ended, so that none
escapes it. `leave` ends this process.
"""

import atexit
import ctypes
import gc
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


class ProcessState(NamedTuple):
    """The state of a process, from /proc/PID/stat: R, S, D, T (stopped), Z (ended), ...

    `started` counts clock ticks since the machine started. Together with the process id it is
    unique, while an id alone is used again.
    """

    state: str
    parent: int
    cpu_ticks: int
    started: int


def signal_name(number: int) -> str:
    """Return a signal's name; of the real-time ones Python names the first and the last alone."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the thread that started it ends.

    Args:
        parent: id of the process that started this one, taken before it did. If that process
            ended before the kernel could be asked, this one ends here. None skips the check.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def import_path(environment: Mapping[str, str]) -> str:
    """Return a PYTHONPATH for `environment` by which another interpreter finds this package."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose parents end."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def process_state(pid: int) -> ProcessState | None:
    """Return the state of a process, or None if there is no process with this id.

    Not by psutil: its `create_time` (7.2.2) follows the wall clock, so after a correction of the
    clock two processes would disagree about the start of a third.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may hold anything, brackets too.
    words = text.rpartition(")")[2].split()
    return ProcessState(words[0], int(words[1]), int(words[11]) + int(words[12]), int(words[19]))


def is_running(pid: int, started: int) -> bool:
    """Return whether the process that began at `started` runs or is stopped, but has not ended."""
    found = process_state(pid)
    return found is not None and found.started == started and found.state not in "ZX"


def descendants(roots: Iterable[int]) -> set[int]:
    """Return the ids of all processes below `roots`, without `roots` themselves."""
    import psutil  # takes 20 ms, which workers that only call die_with_parent should not pay

    found: set[int] = set()
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found |= {child.pid for child in psutil.Process(root).children(recursive=True)}
    return found


def kill_descendants(spared: Iterable[int] = ()) -> set[int]:
    """Kill all descendants of this process but `spared` and those below them.

    This process must have called `adopt_orphans`. Returns the ids of those that still ran after
    10 seconds; only a process that waits inside the kernel does.
    """
    own, kept = os.getpid(), set(spared)
    end = time.monotonic() + 10.0
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


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def leave(status: int) -> NoReturn:
    """End this process as `sys.exit(status)` would at the end of a program.

    With Paddle loaded, Python takes 0.5 processor seconds to clear its memory up, and as much again
    on a busy machine. That alone is left out: threads are waited for, exit handlers called, files
    that nobody closed written out. Debuggers and profilers, which end a program their own way, and
    output that cannot be written get the ordinary end.
    """
    watched = sys.gettrace() or sys.getprofile() or sys.flags.interactive or sys.flags.inspect
    if "paddle" not in sys.modules or watched:
        sys.exit(status)
    threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a daemon may have neither
                stream.flush()
    except (OSError, ValueError):
        sys.exit(status)  # Python says what is wrong
    _write_out_open_files()
    ctypes.CDLL(None).fflush(None)  # what C and C++ wrote
    os._exit(status)


def _write_out_open_files() -> None:
    """Write out files that nobody closed, as clearing up does."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, io.IOBase)}
    files = [one for one in objects if type(one) in kinds]
    texts = [one.flush for one in files if isinstance(one, io.TextIOWrapper)]
    # gzip and its like write an end when they are closed.
    others = [one.close for one in files if type(one).__module__ not in ("_io", "io")]
    buffers = [one.flush for one in files if isinstance(one, io.BufferedWriter | io.BufferedRandom)]
    for write_out in (*texts, *others, *buffers):
        with suppress(OSError, ValueError):  # closed, or nobody reads it any more
            write_out()
