"""Start, ask and kill a scoring process."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

START_S = 120.0
_MODULE = "ernie_train.rewards.scoring.worker"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerLost(Exception):
    """The process ended by itself."""


class WorkerProcess:
    """One scoring process in a session of its own; it loads no Paddle.

    `task` is what its owner gave it to do, None while it is free; `deadline` the moment
    (time.monotonic) by which it must have answered, or else be ready for its first task.
    """

    def __init__(self) -> None:
        here, there = Pipe()
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._pipe: Connection[Any, Any] = here
        # A signal of the terminal goes to its whole session: this one decides for itself.
        arguments = [str(there.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, *arguments],
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
        """Hand over a request; raises WorkerLost where the process is gone."""
        self.task, self.deadline = task, time.monotonic() + limit_s
        try:
            self._pipe.send(request)
        except OSError:
            raise WorkerLost from None

    def answer(self) -> list[Any]:
        """The reply that has come: ["ready"] first; raises WorkerLost where there will be none."""
        try:
            reply: list[Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerLost from None
        return reply

    def kill(self) -> None:
        """End the process and what it started in its session."""
        self._pipe.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._process.poll()
        self._process.wait()

    def close(self, limit_s: float = 2.0) -> None:
        """Let the process end by itself, as it does when its pipe is closed; kill it if not."""
        self._pipe.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
