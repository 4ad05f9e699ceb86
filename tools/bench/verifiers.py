"""Items per second of every verifier, and programs per second of the sandbox.

    python -m tools.bench.verifiers [NAME ...]

Each with one worker and with one per core; the processes are warm, and each verifier gets right and
wrong answers in turn. The sandbox also without its pool of warmed interpreters.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import ScoringService
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.sandbox.api import Tests
from ernie_train.rewards.scoring.reference_completion import with_response
from ernie_train.rewards.scoring.service import Item

# Runs some items; returns how many, and the seconds they took.
Bench = Callable[[], tuple[int, float]]

ITEMS, LIBRARY_ITEMS = 4000, 400
PROGRAMS, PROGRAMS_WITHOUT_POOL = 600, 60

# ---- verifiers -----------------------------------------------------------------------------------


def _exact(i: int) -> tuple[dict[str, Any], str]:
    return {"answer": str(i)}, str(i - i % 2)


def _number(i: int) -> tuple[dict[str, Any], str]:
    return {"answer": f"{i}/8"}, f"So we get \\boxed{{{(i - i % 2) / 8}}}."


def _expression(i: int) -> tuple[dict[str, Any], str]:
    n = i + 2
    return {"answer": f"\\frac{{{n}}}{{\\sqrt{{{n}}}}}"}, f"\\boxed{{\\sqrt{{{n + i % 2}}}}}"


def _truth(i: int) -> tuple[dict[str, Any], str]:
    labels = ["True", "False", "Unknown"]
    return {"answer": labels[i % 3], "choices": labels}, f"The answer is {labels[i % 2]}."


def _people(i: int) -> tuple[dict[str, Any], str]:
    return (
        {"assignment": {"Zoey": True, "Ethan": False, "Mia": bool(i % 2)}},
        "(1) Zoey is a knight\n(2) Ethan is a knave\n(3) Mia is a knight",
    )


def _gym(i: int) -> tuple[dict[str, Any], str]:
    entry = {"question": f"{i} + 1 =", "answer": str(i + 1), "metadata": {}}
    return {"answer": str(i + 1), "rg_task": "chain_sum", "rg_entry": entry}, f"+{i + 1 + i % 2}.0"


def _call(i: int) -> tuple[dict[str, Any], str]:
    row = {"expected_calls": [{"name": "f", "arguments": {"x": [1, "one"], "y": ["", 2]}}]}
    return row, format_completion("so", None, [("f", {"x": i % 2})])


# Name -> verifier, the i-th row with an answer, how many of them.
VERIFIERS: dict[str, tuple[str, Callable[[int], tuple[dict[str, Any], str]], int]] = {
    "exact": ("exact", _exact, ITEMS),
    "format": ("format", _exact, ITEMS),
    "math, numbers": ("math", _number, ITEMS),
    "math, expressions": ("math", _expression, LIBRARY_ITEMS),
    "logic, truth labels": ("logic", _truth, ITEMS),
    "logic, assignments": ("logic", _people, ITEMS),
    "logic, reasoning-gym": ("logic", _gym, ITEMS),
    "tool_call": ("tool_call", _call, ITEMS),
}


def score(name: str, workers: int) -> tuple[int, float]:
    """Score the items of a verifier through the service."""
    reward, make, count = VERIFIERS[name]
    items: list[Item] = []
    for row, text in map(make, range(count)):
        whole = text if reward == "tool_call" else with_response(row, text)
        items.append((reward, row, whole))
    service = ScoringService(workers)
    try:
        service.score(items[: 8 * workers])  # the processes are started, the libraries loaded
        start = time.perf_counter()
        scores, _ = service.score(items)
        seconds = time.perf_counter() - start
    finally:
        service.close()
    statuses = {score.status for score in scores}
    if statuses != {"correct", "wrong"} and reward != "format":
        raise RuntimeError(f"right and wrong answers: {statuses}")
    return len(items), seconds


# ---- the sandbox ---------------------------------------------------------------------------------

SOURCE = "def f(values):\n    return sorted(value * 2 for value in values if value % 3)\n"
ARGUMENTS = [list(range(n)) for n in (3, 10, 30)]
EXPECTED = [sorted(v * 2 for v in values if v % 3) for values in ARGUMENTS]
TESTS = Tests([f"assert f({a}) == {e}" for a, e in zip(ARGUMENTS, EXPECTED, strict=True)], ["f"])


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


def run_programs(run: Callable[[bool], None], workers: int, *, pooled: bool) -> tuple[int, float]:
    count = PROGRAMS if pooled else PROGRAMS_WITHOUT_POOL
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(run, [pooled] * workers * 2))  # the sandboxes are warm
        start = time.perf_counter()
        list(threads.map(run, [pooled] * count))
        return count, time.perf_counter() - start


# ---- all -----------------------------------------------------------------------------------------


def benches() -> Iterator[tuple[str, Bench]]:
    """Yield names and runs, with one worker and with one per core."""
    for workers in sorted({1, len(os.sched_getaffinity(0))}):
        suffix = f", {workers} worker{'s' if workers > 1 else ''}"
        for name, run in (("calls", call), ("asserts", judge), ("script", script)):
            for pooled, pool in ((True, "pool"), (False, "no pool")):
                bench = functools.partial(run_programs, run, workers, pooled=pooled)
                yield f"sandbox, {name}{suffix}, {pool}", bench
        for name in VERIFIERS:
            yield name + suffix, functools.partial(score, name, workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="those whose names contain one")
    names = parser.parse_args().names
    print(f"sandbox layer: {api.layer_in_force()}")
    for name, bench in benches():
        if not names or any(wanted in name for wanted in names):
            items, seconds = bench()
            print(f"{name:44s} {items / seconds:9.0f} items/s", flush=True)


if __name__ == "__main__":
    main()
