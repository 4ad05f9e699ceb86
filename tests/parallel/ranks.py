"""Runs scripts on several ranks that Paddle's launcher starts; no process outlives the tests.

The ranks are started once and run every script in a process forked for it: importing Paddle takes
longer than most scripts do.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing.connection import Listener
from pathlib import Path

from ernie_train.core.processes import free_ports
from tests import waiting

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MOST = 4  # a script for fewer ranks runs on the first ones


class Ranks:
    """The ranks of one launch, which wait for scripts."""

    def __init__(self) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.directory = Path(self.scratch.name)
        self.scripts = 0
        address = str(self.directory / "socket")
        command = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch"]
        command += ["--nproc_per_node", str(MOST), "--backend", "gloo"]
        command += ["--log_dir", str(self.directory / "log"), str(HERE / "waiting_rank.py")]
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        environment.pop("ERNIE_TRAIN_REFEREE", None)  # exports are proven by transformers elsewhere
        with Listener(address, backlog=MOST) as listener:
            self.launcher = subprocess.Popen(
                [*command, address],
                cwd=self.directory,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            atexit.register(self.end)
            self.connections = waiting.connected(listener, MOST)

    def run(self, ranks: int, script: str, arguments: tuple[object, ...], timeout_s: float) -> str:
        """Run a script on the first ranks; return all output."""
        self.scripts += 1
        ports = [f"127.0.0.1:{port}" for port in free_ports(ranks)]
        logs = [self.directory / f"{self.scripts}-rank{rank}" for rank in range(ranks)]
        for connection, port, log in zip(self.connections, ports, logs, strict=False):
            job = {
                "PADDLE_TRAINERS_NUM": str(ranks), "PADDLE_TRAINER_ENDPOINTS": ",".join(ports),
                "PADDLE_CURRENT_ENDPOINT": port, "PADDLE_MASTER": ports[0],
            }  # fmt: skip
            waiting.send(connection, HERE / script, arguments, job, os.devnull, log, log)
        statuses = waiting.ended(self.connections[:ranks], timeout_s)
        printed = "\n".join(log.read_text(errors="replace") for log in logs if log.exists())
        if statuses != dict.fromkeys(range(ranks), 0):
            told = f"{statuses}, {ranks - len(statuses)} without an end"
            raise AssertionError(f"{script} on {ranks} ranks: {told}\n{printed[-8000:]}")
        return printed

    def end(self) -> None:
        """Kill the launcher and its workers, which are in sessions of their own."""
        for process in [*_children(self.launcher.pid), self.launcher.pid]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.wait()
        self.scratch.cleanup()


_ranks = cache(Ranks)


def start_on_ranks(ranks: int, script: str, *arguments: object, timeout_s: float = 120) -> str:
    """Runs `script` of this directory on `ranks` ranks over gloo; returns what they printed.

    Fails with the end of their output where one fails or the time is up.
    """
    try:
        return _ranks().run(ranks, script, arguments, timeout_s)
    except AssertionError:
        _ranks().end()
        _ranks.cache_clear()  # the next script finds others
        raise


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            child = int(status.parent.name)
            found += [child, *_children(child)]
    return found
