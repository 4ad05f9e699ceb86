"""Starts a script on several ranks through Paddle's launcher; no process outlives the call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def start_on_ranks(
    ranks: int, script: str, *arguments: object, timeout_s: float = 120, expected: int = 0
) -> str:
    """Runs `script` of this directory on `ranks` ranks over gloo; returns what they printed.

    Fails with the end of every rank's log where the launcher's exit status is not `expected` or the
    time is up.
    """
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "log"
        command = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch"]
        command += ["--nproc_per_node", str(ranks), "--backend", "gloo", "--log_dir", str(logs)]
        command += [str(HERE / script), *map(str, arguments)]
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        environment.pop("ERNIE_TRAIN_REFEREE", None)  # exports are proven by transformers elsewhere
        launcher = subprocess.Popen(
            command,
            cwd=scratch,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            status: int | str = launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = f"no end after {timeout_s:g} s"
        finally:
            _kill(launcher)
        printed = {log.name: log.read_text(errors="replace") for log in logs.glob("workerlog.*")}
    if status != expected:
        ends = "\n".join(f"== {name}\n{text[-3000:]}" for name, text in sorted(printed.items()))
        raise AssertionError(f"{script} on {ranks} ranks: {status}\n{ends}")
    return "\n".join(printed[name] for name in sorted(printed))


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """Kills the launcher and its workers, which are in sessions of their own."""
    for process in [*_children(launcher.pid), launcher.pid]:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait()


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
