"""Run a server until it ends or the process that wants it does; then end all that it started.

A script that imports nothing of the toolkit but `core/processes.py`, from its file, as packages
take time and change the environment: `python guard.py COMMAND...`. Its standard input is a pipe
that the owner holds open; the kernel closes it with the owner, however that ends. A server such as
vLLM is several processes, and a signal to the first leaves the others behind, so it runs in a
process group of its own, and this process adopts those below it whose parents end.
"""

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

_GRACE_S = 10.0
_POLL_S = 0.2


def main(command: list[str]) -> int:
    """Run `command`; return its exit status, once nothing of it is left."""
    processes, own = _processes(), os.getpid()
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: processes.die_with_parent(own),
    )
    try:
        while server.poll() is None:
            if select.select([sys.stdin], [], [], _POLL_S)[0] and not os.read(0, 1):
                break  # the owner has ended, or wants it to end
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in processes.descendants([os.getpid()]):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + _GRACE_S
        while _is_any_left(processes, server) and time.monotonic() < end:
            time.sleep(0.05)
        processes.kill_descendants()
    return server.wait()


def _is_any_left(processes: ModuleType, server: "subprocess.Popen[bytes]") -> bool:
    """Return whether the server or one below it runs; those that ended are reaped."""
    server.poll()
    for pid in processes.descendants([os.getpid()]) - {server.pid}:
        with suppress(ChildProcessError):  # a child of another one
            os.waitpid(pid, os.WNOHANG)
    return bool(processes.descendants([os.getpid()]))


def _processes() -> ModuleType:
    path = Path(__file__).parents[2] / "core" / "processes.py"
    spec = importlib.util.spec_from_file_location("processes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
