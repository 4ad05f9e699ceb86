"""Processes that have imported what takes long, and run each script they are sent in a fork.

They wait at one end of a connection, in another virtual environment if need be: nothing but the
standard library is imported here.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import NoReturn

START_LIMIT_S = 300.0
# How long the others may take to end once one has failed: they may wait for it in vain.
GRACE_S = 3.0


def serve(address: str, number: int = 0) -> None:
    """Run scripts in forks of this process until the other end of the connection is closed."""
    with Client(address) as connection:
        connection.send(number)
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            child = os.fork()
            if child == 0:
                connection.close()
                _become(*request)
            connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _become(
    script: str, arguments: list[str], directory: str, environ: dict[str, str], streams: list[str]
) -> NoReturn:
    os.chdir(directory)
    os.environ.update(environ)
    for number, path in enumerate(streams):
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        os.dup2(os.open(path, mode), number)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        else:
            status = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Freeing all that was imported would copy it first: 0.7 s.
    os._exit(status)


def connected(listener: Listener, count: int) -> list[Connection]:
    """The connections of `count` processes that were told to `serve`, by their numbers."""
    listener._listener._socket.settimeout(START_LIMIT_S)  # type: ignore[attr-defined]
    met = [listener.accept() for _ in range(count)]
    return [connection for _, connection in sorted((c.recv(), c) for c in met)]


def send(
    connection: Connection,
    script: Path,
    arguments: Sequence[object],
    environ: Mapping[str, str],
    *streams: Path | str,
) -> None:
    """Have a process run a script in this directory; `streams`: files for its input and outputs."""
    paths = [str(path) for path in streams]
    connection.send((str(script), list(map(str, arguments)), os.getcwd(), dict(environ), paths))


def ended(connections: Sequence[Connection], timeout_s: float) -> dict[int, int | str]:
    """The exit status of each process's script, by its place; of those alone that ended in time.

    Where one fails, the others have `GRACE_S` left.
    """
    deadline = time.monotonic() + timeout_s
    waiting = {connection: at for at, connection in enumerate(connections)}
    found: dict[int, int | str] = {}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            at = waiting.pop(connection)  # type: ignore[arg-type]
            try:
                found[at] = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                found[at] = "gone"
            if found[at] != 0:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return found
