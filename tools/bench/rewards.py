"""Items per second of every verifier, and programs per second of the sandbox.

    python -m tools.bench.rewards [NAME ...]

For the sandbox: one worker and one per core, with the pool of warmed interpreters and without it.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ernie_train.rewards.sandbox import api
from ernie_train.rewards.sandbox.api import Tests
from tools.bench import verifiers as bench_verifiers

# Runs some items; how many, and in how many seconds.
Bench = Callable[[], tuple[int, float]]

SOURCE = "def f(values):\n    return sorted(value * 2 for value in values if value % 3)\n"
ARGUMENTS = [list(range(n)) for n in (3, 10, 30)]
EXPECTED = [sorted(v * 2 for v in values if v % 3) for values in ARGUMENTS]
TESTS = Tests([f"assert f({a}) == {e}" for a, e in zip(ARGUMENTS, EXPECTED, strict=True)], ["f"])
PROGRAMS, PROGRAMS_WITHOUT_POOL = 600, 60


def call(pooled: bool) -> None:
    outcome = api.run_calls(SOURCE, "f", [[a] for a in ARGUMENTS], pooled=pooled)
    if outcome.values != [["value", expected] for expected in EXPECTED]:
        raise RuntimeError(f"a right program: {outcome}")


def judge(pooled: bool) -> None:
    outcome = api.run_tests(SOURCE, TESTS, pooled=pooled)
    if not all(passed for passed, _ in outcome.values) or not outcome.values:
        raise RuntimeError(f"a right program: {outcome}")


def script(pooled: bool) -> None:
    outcome = api.run_script("print(sum(map(int, input().split())))", "1 2 3\n", pooled=pooled)
    if outcome.values != ["6\n"]:
        raise RuntimeError(f"a right program: {outcome}")


def programs(run: Callable[[bool], None], workers: int, *, pooled: bool) -> tuple[int, float]:
    count = PROGRAMS if pooled else PROGRAMS_WITHOUT_POOL
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(run, [pooled] * workers * 2))  # the sandboxes are warm
        start = time.perf_counter()
        list(threads.map(run, [pooled] * count))
        return count, time.perf_counter() - start


def _sandbox_benches() -> dict[str, Bench]:
    cores = len(os.sched_getaffinity(0))
    benches: dict[str, Bench] = {}
    for name, run in (("calls", call), ("asserts", judge), ("script", script)):
        for workers in sorted({1, cores}):
            for pooled in (True, False):
                label = f"sandbox, {name}, {workers} worker{'s' * (workers > 1)}, "
                label += "pool" if pooled else "no pool"
                benches[label] = functools.partial(programs, run, workers, pooled=pooled)
    return benches


BENCHES: dict[str, Bench] = {**_sandbox_benches(), **bench_verifiers.benches()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="those whose names contain one")
    names = parser.parse_args().names
    print(f"sandbox layer: {api.layer_in_force()}")
    for name, bench in BENCHES.items():
        if names and not any(wanted in name for wanted in names):
            continue
        items, seconds = bench()
        print(f"{name:44s} {items / seconds:9.0f} items/s")


if __name__ == "__main__":
    main()
