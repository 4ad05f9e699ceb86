"""Items per second of every verifier but programs, through the scoring service.

`rewards.py` prints them beside the sandbox's. The processes are warm; each verifier gets
right and wrong answers in turn.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import ScoringService
from ernie_train.rewards.scoring.reference_completion import with_response
from ernie_train.rewards.scoring.service import Item

# Runs some items; how many, and in how many seconds.
Bench = Callable[[], tuple[int, float]]

ITEMS, LIBRARY_ITEMS = 4000, 400


def _items(reward: str, answers: Callable[[int], tuple[dict[str, Any], str]], n: int) -> list[Item]:
    cases = [answers(i) for i in range(n)]
    return [(reward, row, with_response(row, text)) for row, text in cases]


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


def _calls(n: int) -> list[Item]:
    row = {"expected_calls": [{"name": "f", "arguments": {"x": [1, "one"], "y": ["", 2]}}]}
    texts = [format_completion("so", None, [("f", {"x": i % 2})]) for i in range(n)]
    return [("tool_call", row, text) for text in texts]


def benches() -> dict[str, Bench]:
    """Names and runs, with one worker and with one a core."""
    work: dict[str, Callable[[], list[Item]]] = {
        "exact": functools.partial(_items, "exact", _exact, ITEMS),
        "format": functools.partial(_items, "format", _exact, ITEMS),
        "math, numbers": functools.partial(_items, "math", _number, ITEMS),
        "math, expressions": functools.partial(_items, "math", _expression, LIBRARY_ITEMS),
        "logic, truth labels": functools.partial(_items, "logic", _truth, ITEMS),
        "logic, assignments": functools.partial(_items, "logic", _people, ITEMS),
        "logic, reasoning-gym": functools.partial(_items, "logic", _gym, ITEMS),
        "tool_call": functools.partial(_calls, ITEMS),
    }
    cores = len(os.sched_getaffinity(0))
    return {
        f"{name}, {workers} worker{'s' if workers > 1 else ''}": functools.partial(
            _run, items, workers
        )
        for name, items in work.items()
        for workers in sorted({1, cores})
    }


def _run(make_items: Callable[[], list[Item]], workers: int) -> tuple[int, float]:
    items = make_items()
    service = ScoringService(workers)
    try:
        service.score(items[: 8 * workers])  # the processes are started, the libraries loaded
        start = time.perf_counter()
        scores, _ = service.score(items)
        seconds = time.perf_counter() - start
    finally:
        service.close()
    statuses = {score.status for score in scores}
    if statuses != {"correct", "wrong"} and items[0][0] != "format":
        raise RuntimeError(f"right and wrong answers: {statuses}")
    return len(items), seconds
