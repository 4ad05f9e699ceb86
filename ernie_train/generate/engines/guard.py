"""Run a server until it ends or the process that wants it does; then end all that it started.

A script without imports of the toolkit: `python guard.py COMMAND...`. Its standard input is a pipe
that the owner holds open; the kernel closes it with the owner, however that ends. A server such as
vLLM is several processes, and a signal to the first leaves the others behind, so it runs in a
process group of its own.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

_GRACE_S = 10.0
_POLL_S = 0.2


def main(command: list[str]) -> int:
    """Run `command`; return its exit status, once nothing of it is left."""
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while server.poll() is None:
        if select.select([sys.stdin], [], [], _POLL_S)[0] and not os.read(0, 1):
            break  # the owner has ended, or wants it to end
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        end = time.monotonic() + _GRACE_S
        while _is_group_alive(server) and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    return server.wait()


def _is_group_alive(server: "subprocess.Popen[bytes]") -> bool:
    server.poll()  # reaps it: a zombie would keep its group alive
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
