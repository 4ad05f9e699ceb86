"""Programs of a sweep: one thread each, stopped on Ctrl-C and SIGTERM, their costs added up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPENT = "spent.json"  # costs of all starts of a run so far

_running: dict[subprocess.Popen[bytes], bool] = {}  # whether it was told to stop


def run_program(
    *arguments: str, note: Callable[[dict[str, float]], None] = lambda used: None
) -> dict[str, float]:
    """Run Python on one thread from the repository's root; return seconds and memory.

    An exception meanwhile, Ctrl-C too, ends the program with SIGTERM first. `note` gets the costs
    however the program ended. Raises `CalledProcessError` if it fails, after its own message on
    stderr.
    """
    command = [sys.executable, *arguments]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )
    _running[process] = False
    used: dict[str, float] | None = None
    try:
        used = _wait(process, started)
    finally:
        if used is None:
            _stop(process)
            used = _wait(process, started)
        del _running[process]
        note(used)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used


def stop_programs() -> None:
    """Send SIGTERM, once, to all programs that run: a second one would keep them from saving."""
    for process in list(_running):
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Popen's own methods would reap a child that has just ended, and lose its costs.
    if process.returncode is None and _running.get(process) is False:
        _running[process] = True
        os.kill(process.pid, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], started: float) -> dict[str, float]:
    """Wait for this child alone; RUSAGE_CHILDREN would count those beside it."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss / 1e6,  # of the largest process
    }


def train(
    recipe: str, overrides: Sequence[str], run_dir: Path, *, ranks: int = 1
) -> dict[str, float]:
    """Run the recipe, or the rest of it; return the costs of all starts, as `run_program` does.

    Data ranks take a core each; those that `run` would start by itself would take the cores of the
    runs beside this one. A start during which this process itself was killed is not counted.
    """
    file = run_dir / SPENT
    before: dict[str, float] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    spent: dict[str, float] = {}

    def note(used: dict[str, float]) -> None:
        for name, value in used.items():
            known = before.get(name, 0.0)
            spent[name] = max(known, value) if name == "peak_gb" else known + value
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, spent)

    run = ["-m", "ernie_train", "run", recipe, "--run-dir", str(run_dir)]
    run += ["--nproc", str(ranks)] if ranks > 1 else []
    run_program(*run, f"parallel.data={ranks}", *overrides, note=note)
    return spent


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def stop_on_sigterm() -> None:
    """Make SIGTERM act like Ctrl-C: the runs save and end before this process does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
