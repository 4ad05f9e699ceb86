"""Runs of one recipe that differ in a setting, with several seeds: what the ablation tools share.

A finished run leaves `result.json` in its directory and is not repeated, an interrupted one goes
on where it stopped, so a tool may be stopped and started again at any time.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = "result.json"

Measure = Callable[[Path], dict[str, Any]]  # what a finished run directory shows


@dataclass(frozen=True)
class Arm:
    """A variant of the recipe: its overrides, as `ernie_train run` takes them."""

    name: str
    overrides: tuple[str, ...] = ()


def train(recipe: str, arm: Arm, seed: int, run_dir: Path) -> dict[str, float]:
    """Runs the recipe on one thread, or the rest of it; returns wall and processor seconds.

    Raises `CalledProcessError` where the run fails; its own message is on stderr by then.
    """
    command = [sys.executable, "-m", "ernie_train", "run", recipe, "--run-dir", str(run_dir)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, f"seed={seed}", *arm.overrides],
        cwd=ROOT,
        env={**os.environ, **threads},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.perf_counter() - started, "cpu_s": cpu}


def result_of(recipe: str, arm: Arm, seed: int, run_dir: Path, measure: Measure) -> dict[str, Any]:
    """Trains and measures, unless the directory's result is of these very settings.

    Raises `ValueError` where it is of others: a table must not mix them.
    """
    identity = {"arm": arm.name, "seed": seed, "overrides": list(arm.overrides), "recipe": recipe}
    file = run_dir / RESULT
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if {key: known.get(key) for key in identity} != identity:
            raise ValueError(f"{file} is of other settings; choose another --out or delete it")
        return known
    result = {**identity, **train(recipe, arm, seed, run_dir), **measure(run_dir)}
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
    return result


def results_of(
    recipe: str, arms: Sequence[Arm], seeds: Sequence[int], out: Path, measure: Measure
) -> list[dict[str, Any]]:
    """Every arm with every seed, a whole seed after the other; also written to `results.json`."""
    results = []
    for seed in seeds:
        for arm in arms:
            run_dir = out.resolve() / f"{arm.name}-seed{seed}"
            result = result_of(recipe, arm, seed, run_dir, measure)
            print(f"{arm.name}, seed {seed}: {result['cpu_s']:.0f} s of one core", flush=True)
            results.append(result)
    text = json.dumps(results, indent=1) + "\n"
    (out / "results.json").write_text(text, encoding="utf-8")
    return results


def values_of(results: Sequence[Mapping[str, Any]], arm: str, key: str) -> list[float]:
    """The figure `key` of an arm, one for each seed, in the order of the seeds."""
    ordered = sorted(results, key=lambda result: int(result["seed"]))
    return [float(result[key]) for result in ordered if result["arm"] == arm]


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean and the standard deviation of a sample, as "0.97 ± 0.02"."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
