"""Start a process that answers requests, such as those that score, send it some and kill it."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ernie_train.core.processes import import_path

START_S = 120.0
SCORING_WORKER = "ernie_train.rewards.scoring.worker"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerLost(Exception):
    """Signal that the process ended by itself."""


class WorkerProcess:
    """Control one process in a session of its own; it loads no Paddle.

    module: what it runs, with the descriptor of its pipe and the id of this process as arguments.
        It answers ["ready"] at first, then each request, as JSON.

    `task` is the task in progress, None while there is none; `deadline` is the time
    (time.monotonic) by which the process must have answered or, at its start, be ready.
    """

    def __init__(self, module: str = SCORING_WORKER) -> None:
        here, there = Pipe()
        path = import_path(os.environ)
        self._pipe: Connection[Any, Any] = here
        # A signal of the terminal goes to its whole session: a session of its own gets none.
        arguments = [str(there.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONPATH": path},
            start_new_session=True,
        )
        there.close()
        self.ready = False
        self.task: Any = None
        self.deadline = time.monotonic() + START_S

    def fileno(self) -> int:
        return self._pipe.fileno()

    def ask(self, task: Any, request: tuple[Any, ...], limit_s: float) -> None:
        """Send a request; raises WorkerLost if the process has ended."""
        self.task, self.deadline = task, time.monotonic() + limit_s
        try:
            self._pipe.send(request)
        except OSError:
            raise WorkerLost from None

    def answer(self) -> list[Any]:
        """Read a reply, ["ready"] at first; raises WorkerLost if the process has ended."""
        try:
            reply: list[Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerLost from None
        return reply

    def kill(self) -> None:
        """Kill the process and all others in its session."""
        self._pipe.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.poll()
        self._process.wait()

    def close(self, limit_s: float = 2.0) -> None:
        """Close the pipe, which ends the process; kill it if it has not ended after `limit_s`."""
        self._pipe.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
