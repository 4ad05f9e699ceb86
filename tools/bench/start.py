"""Measures what people wait for before anything happens: help, status, and the first training step.

    python -m tools.bench.start [--recipe recipes/tiny.yaml] [--imports 12]

Each command runs in a process of its own. The first step is timed from the command to its line in
`metrics.jsonl`, with an empty cache of encoded rows and then with a full one; the run is stopped
after it. CPU seconds stand beside, since they depend less on other work of the machine. With
`--imports` the packages that take longest to import follow, by Python's own clock.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0
PROGRAM = [sys.executable, "-m", "ernie_train"]
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")


class Waited(NamedTuple):
    """Seconds from the command on, and those of the processor in it and its processes."""

    what: str
    wall_s: float
    cpu_s: float


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(what: str, *arguments: str) -> Waited:
    """Run a command to its end."""
    began, cpu = time.perf_counter(), _cpu_s()
    subprocess.run([*PROGRAM, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return Waited(what, time.perf_counter() - began, _cpu_s() - cpu)


def first_step(what: str, recipe: str, run_dir: Path, cache: Path) -> Waited:
    """Start a run, wait for the line of its first step, and stop it."""
    lines = run_dir / "01-sft" / "metrics.jsonl"
    environment = {**os.environ, "ERNIE_TRAIN_CACHE": str(cache)}
    began, cpu = time.perf_counter(), _cpu_s()
    run = subprocess.Popen(
        [*PROGRAM, "run", recipe, "--run-dir", str(run_dir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (lines.exists() and lines.stat().st_size):
            if run.poll() is not None or time.perf_counter() - began > LIMIT_S:
                raise SystemExit(f"{recipe}: no first step, exit status {run.poll()}")
            time.sleep(0.01)
        wall_s = time.perf_counter() - began
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    return Waited(what, wall_s, _cpu_s() - cpu)


def slow_imports(most: int) -> Iterator[tuple[str, float]]:
    """Yield packages and the seconds of their import, nested ones apart, the longest first."""
    code = "import ernie_train.run.pipeline"
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    own: dict[str, float] = {}
    for line in told.splitlines():
        if found := _IMPORT.match(line):
            package = found[4].split(".")[0]
            own[package] = own.get(package, 0.0) + int(found[1]) / 1e6
    yield from sorted(own.items(), key=lambda item: -item[1])[:most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--recipe", default="recipes/tiny.yaml")
    parser.add_argument("--imports", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache, runs = Path(scratch) / "cache", Path(scratch)
        waited = [command("--help", "--help")]
        waited.append(first_step("first step, no cache", options.recipe, runs / "cold", cache))
        waited.append(first_step("first step, cached rows", options.recipe, runs / "warm", cache))
        waited.append(command("status", "status", str(runs / "warm")))
    print("| command | s | CPU s |\n|---|---:|---:|")
    for what, wall_s, cpu_s in waited:
        print(f"| {what} | {wall_s:.2f} | {cpu_s:.2f} |")
    for package, seconds in slow_imports(options.imports) if options.imports else ():
        print(f"import {package}: {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
