"""Runs that are killed at random moments, again and again, until they are through.

A moment is told by the steps that a process has written, not by the clock alone: most of a small
run's time is its start, and how long that takes depends on what else the machine does.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Begin = Callable[[], "subprocess.Popen[str]"]
POLL_S = 0.005
MOST_STEPS = 2  # of a process before it is killed
MOST_RUNS = 40


@dataclass
class Pace:
    """Seconds of the last processes: until their first step was written, and of a further one."""

    first_s: float
    step_s: float

    def follow(self, times: list[float], began: float) -> None:
        """Take those of a process; a machine that grows busy or idle changes them."""
        if times:
            self.first_s = times[0] - began
        if len(times) > 1:
            self.step_s = (times[-1] - times[0]) / (len(times) - 1)


def finish(begin: Begin, metrics: Path) -> Pace:
    """Run it to its end, which must be a good one; return how fast it was."""
    began, process = time.time(), begin()
    _, told = process.communicate()
    assert process.returncode == 0, told
    pace = Pace(0.0, 0.0)
    pace.follow(step_times(metrics, began), began)
    return pace


def step_times(metrics: Path, since: float) -> list[float]:
    """Return when each step from `since` on was written, as seconds of the epoch."""
    if not metrics.exists():
        return []
    *lines, _ = metrics.read_text(encoding="utf-8").split("\n")  # the last may be half written
    times: list[float] = [json.loads(line)["time"]["unix_s"] for line in lines]
    return [moment for moment in times if moment >= since]


def kill_until_through(begin: Begin, metrics: Path, pace: Pace, rng: random.Random) -> int:
    """Start a run again after each kill until it is through; return the number of kills.

    One kill of three comes at any moment until the first step of a process, the others in the step
    behind one that it has written, or while that is saved. `pace` follows the processes.
    """
    kills = 0
    while True:
        began, process = time.time(), begin()
        steps = rng.randint(0, MOST_STEPS)
        while process.poll() is None and len(step_times(metrics, began)) < steps:
            time.sleep(POLL_S)
        moment_s = rng.uniform(0, pace.step_s if steps else pace.first_s)
        try:
            _, told = process.communicate(timeout=moment_s)
            assert process.returncode == 0, told
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        finally:
            pace.follow(step_times(metrics, began), began)


def kill_often(kills: int, killed_run: Callable[[int], int]) -> None:
    """Call `killed_run`, which returns its kills, with 0, 1 and so on until there are enough."""
    happened = 0
    for number in range(MOST_RUNS):
        happened += killed_run(number)
        if happened >= kills:
            return
    raise AssertionError(f"only {happened} kills hit a running stage")
