"""Run the checks, one process each on a GPU, and print and write what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ernie_train.core import devices
from ernie_train.core.errors import UserError, did_you_mean
from ernie_train.core.terminal import one_line
from ernie_train.selftest import kernels, ranks, training
from ernie_train.selftest.check import FAIL, SKIPPED, Check, Outcome, run_check
from ernie_train.selftest.report import (
    check_report_path,
    facts,
    summary,
    without_paths,
    write_report,
)

CHECKS: dict[str, Check] = {
    "operators": kernels.operators,
    "attention": kernels.attention,
    "flashmask": kernels.flashmask_attention,
    "experts": kernels.experts,
    "native": kernels.native,
    "bfloat16": training.low_precision,
    "step": training.training_step,
    "recompute": training.recompute,
    "sampling": training.sampling,
    "ranks": ranks.two_ranks,
    "memory": training.memory,
    "speed": training.speed,
}
LIMIT_S = 600.0  # of a check in a process of its own
_COLOURS = {FAIL: "red", SKIPPED: "yellow"}


def selftest(only: Sequence[str], out: Path | None, console: Console) -> bool:
    """Run the checks named in `only`, all if it is empty; return whether none failed.

    Prints each as it ends, and writes the report to `out`. Raises `UserError` for an unknown check
    or a path that cannot be written.
    """
    for name in only:
        if name not in CHECKS:
            raise UserError(f"--only {name}: no such check{did_you_mean(name, CHECKS)}")
    if out is not None:
        check_report_path(out)
    device = devices.select_device("auto")
    if problem := devices.gpu_problem():
        console.print(problem, style="yellow", highlight=False)
    outcomes = []
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        outcomes.append(_apart(name) if device == "gpu" else run_check(name, check, device))
        _print(outcomes[-1], console)
    console.print(f"{summary(outcomes)} on {device}")
    if out is not None:
        write_report(out, outcomes, facts())
        console.print(f"report: {out}", highlight=False)
    return all(outcome.status != FAIL for outcome in outcomes)


def _print(outcome: Outcome, console: Console) -> None:
    told = "; ".join([*map(str, outcome.figures), *([outcome.note] if outcome.note else [])])
    line = f"{outcome.name:10} {outcome.status:8} {without_paths(told)}"
    console.print(line, style=_COLOURS.get(outcome.status), highlight=False, soft_wrap=True)


def _apart(name: str) -> Outcome:
    """Run a check in a process of its own, since a GPU's fault spoils the rest of a process."""
    command = [sys.executable, "-m", "ernie_train.selftest.command", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name, FAIL, note=f"no end after {LIMIT_S:.0f} s", seconds=LIMIT_S)
    try:
        return Outcome.from_dict(json.loads(done.stdout.strip().rpartition("\n")[2]))
    except (ValueError, TypeError, KeyError):
        end = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        note = one_line(f"its process ended with {done.returncode}: {end}", 600)
        return Outcome(name, FAIL, note=note)


if __name__ == "__main__":
    chosen = sys.argv[1]
    result = run_check(chosen, CHECKS[chosen], devices.select_device("auto"))
    print("\n" + json.dumps(result.as_dict()))
