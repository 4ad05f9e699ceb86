"""Runs of one recipe that differ in a setting, with several seeds: what the ablation tools share.

A finished run leaves `result.json` in its directory and is not repeated, an interrupted one goes
on where it stopped, so a tool may be stopped and started again at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = "result.json"
SPENT = "spent.json"  # what all starts of a run have taken so far

Measure = Callable[[Path], dict[str, Any]]  # what a finished run directory shows


@dataclass(frozen=True)
class Arm:
    """A variant of the recipe: its overrides, as `ernie_train run` takes them."""

    name: str
    overrides: tuple[str, ...] = ()


_running: set[subprocess.Popen[bytes]] = set()


def run_program(
    *arguments: str, note: Callable[[dict[str, float]], None] = lambda used: None
) -> dict[str, float]:
    """Runs Python on one thread from the repository's root; returns seconds and memory.

    An exception that comes meanwhile, Ctrl-C too, ends the program with SIGTERM first. Raises
    `CalledProcessError` where the program fails; its own message is on stderr by then. `note` is
    told what it took, however it ended.
    """
    command = [sys.executable, *arguments]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
    )
    _running.add(process)
    used: dict[str, float] | None = None
    try:
        used = _end_of(process, started)
    finally:
        if used is None:
            _stop(process)
            used = _end_of(process, started)
        _running.discard(process)
        note(used)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return used


def _stop(process: subprocess.Popen[bytes]) -> None:
    # Popen's own methods would take the status of a child that has just ended, and what it used.
    if process.returncode is None:
        os.kill(process.pid, signal.SIGTERM)


def _end_of(process: subprocess.Popen[bytes], started: float) -> dict[str, float]:
    """Waits for this child, whatever runs beside it."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss / 1e6,  # of the largest process
    }


def train(recipe: str, arm: Arm, seed: int, run_dir: Path) -> dict[str, float]:
    """Runs the recipe, or the rest of it; returns what all starts took, as `run_program` does.

    A start during which this tool itself was killed is not counted.
    """
    file = run_dir / SPENT
    before: dict[str, float] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    spent: dict[str, float] = {}

    def note(used: dict[str, float]) -> None:
        for name, value in used.items():
            known = before.get(name, 0.0)
            spent[name] = max(known, value) if name == "peak_gb" else known + value
        run_dir.mkdir(parents=True, exist_ok=True)
        _write(file, spent)

    run = ("-m", "ernie_train", "run", recipe, "--run-dir", str(run_dir))
    run_program(*run, f"seed={seed}", *arm.overrides, note=note)
    return spent


def _write(file: Path, value: dict[str, Any]) -> None:
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def stop_on_sigterm() -> None:
    """Lets SIGTERM do what Ctrl-C does: the runs save and end before this process does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def result_of(recipe: str, arm: Arm, seed: int, run_dir: Path, measure: Measure) -> dict[str, Any]:
    """Trains and measures, unless the directory's result is of these very settings.

    Raises `ValueError` where it is of others: a table must not mix them.
    """
    identity = {
        "arm": arm.name,
        "seed": seed,
        "overrides": list(arm.overrides),
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256((ROOT / recipe).read_bytes()).hexdigest(),
    }
    file = run_dir / RESULT
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if {key: known.get(key) for key in identity} != identity:
            raise ValueError(f"{file} is of other settings; choose another --out or delete it")
        return known
    result = {**identity, **train(recipe, arm, seed, run_dir), **measure(run_dir)}
    _write(file, result)
    return result


def results_of(
    recipe: str,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path,
    measure: Measure,
    *,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Every arm with every seed, a whole seed after the other; also written to `results.json`.

    `jobs` of them run at a time; with more than one, `measure` must bear threads.
    """
    tasks = [(arm, seed) for seed in seeds for arm in arms]

    def run(task: tuple[Arm, int]) -> dict[str, Any]:
        arm, seed = task
        run_dir = out.resolve() / f"{arm.name}-seed{seed}"
        return result_of(recipe, arm, seed, run_dir, measure)

    found: dict[tuple[str, int], dict[str, Any]] = {}
    for result in map(run, tasks) if jobs == 1 else _side_by_side(run, tasks, jobs):
        arm, seed = result["arm"], result["seed"]
        found[arm, seed] = result
        print(f"{arm}, seed {seed}: {result['cpu_s']:.0f} s of one core", flush=True)
    results = [found[arm.name, seed] for arm, seed in tasks]
    text = json.dumps(results, indent=1) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    return results


def _side_by_side(
    run: Callable[[tuple[Arm, int]], dict[str, Any]], tasks: Sequence[tuple[Arm, int]], jobs: int
) -> Iterator[dict[str, Any]]:
    """Results as they come; the first failure, or Ctrl-C, ends all programs that run."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, task) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                _stop(process)
            raise


def values_of(results: Sequence[Mapping[str, Any]], arm: str, key: str) -> list[float]:
    """The figure `key` of an arm, one for each seed, in the order of the seeds."""
    ordered = sorted(results, key=lambda result: int(result["seed"]))
    return [float(result[key]) for result in ordered if result["arm"] == arm]


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean and the standard deviation of a sample, as "0.97 ± 0.02"."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of a sample's mean (Student's t).

    Raises `ValueError` for fewer than two values, which show no spread.
    """
    from scipy import stats

    if len(values) < 2:
        raise ValueError("an interval needs at least two values")
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_and_interval(values: Sequence[float], digits: int) -> str:
    """The mean of a sample and its 95 % confidence interval, as "0.97 ± 0.02"."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {interval(values):.{digits}f}" if len(values) > 1 else mean


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
