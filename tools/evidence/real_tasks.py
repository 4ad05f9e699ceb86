"""Problems for a small pre-trained model, with right solutions.

    python -m tools.evidence.real_tasks DIRECTORY [--count 20] [--seed 0]

Five tasks are trained on, three are kept back. Each has levels: digits, a bound of its numbers, how
many numbers, or minutes. All randomness comes from a seed, the name of the task and the level; no
problem is in two splits.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM = "Answer briefly, in the form that the question asks for."
DOMAIN = "real"
Row = dict[str, Any]
_NAMES = ("Ann", "Ben", "Cem", "Dora", "Eva", "Finn")
_GOODS = ("pens", "cups", "apples", "stamps", "books", "caps")


@dataclass(frozen=True)
class Problem:
    """A question, a right completion, and what the verifier `reward` compares."""

    question: str
    completion: str
    answer: str
    reward: str = "math"


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1), 10**digits)


def sums(rng: random.Random, level: int) -> Problem:
    """Two numbers of `level` digits."""
    a, b = _number(rng, level), _number(rng, level)
    return Problem(f"What is {a} + {b}?", f"The answer is {a + b}.", str(a + b))


def product(rng: random.Random, level: int) -> Problem:
    """A number below `level` times one of one digit, by the places of the larger."""
    a, b = rng.randrange(2, level), rng.randrange(3, 10)
    digits = str(a)
    parts = [int(d) * 10 ** (len(digits) - 1 - at) for at, d in enumerate(digits) if d != "0"]
    steps = " + ".join(str(part * b) for part in parts)
    return Problem(f"What is {a} * {b}?", f"{steps} = {a * b}. The answer is {a * b}.", str(a * b))


def change(rng: random.Random, level: int) -> Problem:
    """What is left after a purchase, of at most `level` coins, in tens."""
    paid = rng.randrange(20, level + 1, 10)
    count = rng.randrange(2, 10)
    price = rng.randrange(2, max(3, paid // count))
    cost = count * price
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    question = (
        f"{name} has {paid} coins and buys {count} {goods} for {price} coins each. "
        "How many coins are left?"
    )
    steps = f"{count} * {price} = {cost}, {paid} - {cost} = {paid - cost}."
    return Problem(question, f"{steps} The answer is {paid - cost}.", str(paid - cost))


def sorting(rng: random.Random, level: int) -> Problem:
    """`level` numbers below 100 in ascending order."""
    numbers = rng.sample(range(1, 100), level)
    answer = ", ".join(map(str, sorted(numbers)))
    shown = ", ".join(map(str, numbers))
    return Problem(f"Sort from smallest to largest: {shown}", answer, answer, "exact")


def clock(rng: random.Random, level: int) -> Problem:
    """The time of day some minutes later, in fives, fewer than `level`."""
    start, later = rng.randrange(0, 24 * 60, 5), rng.randrange(5, level, 5)
    end = (start + later) % (24 * 60)
    question = f"It is {_time(start)}. What time is it {later} minutes later? Write hours:minutes."
    return Problem(question, _time(end), _time(end), "exact")


def _time(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def largest(rng: random.Random, level: int) -> Problem:
    """The largest of `level` numbers below 100."""
    numbers = rng.sample(range(1, 100), level)
    most, shown = max(numbers), ", ".join(map(str, numbers))
    return Problem(f"Which number is the largest: {shown}?", f"The answer is {most}.", str(most))


def gift(rng: random.Random, level: int) -> Problem:
    """What is left of a number of `level` digits after some is given away."""
    given, owned = sorted((_number(rng, level), _number(rng, level)))
    name, left = rng.choice(_NAMES), owned - given
    question = f"{name} has {owned} coins and gives away {given} of them. How many coins are left?"
    return Problem(question, f"The answer is {left}.", str(left))


def double(rng: random.Random, level: int) -> Problem:
    """Twice a number of `level` digits."""
    a = _number(rng, level)
    return Problem(f"What is twice {a}?", f"The answer is {2 * a}.", str(2 * a))


Generator = Callable[[random.Random, int], Problem]
TASKS: dict[str, Generator] = {
    "sum": sums, "product": product, "change": change, "sorting": sorting, "clock": clock,
}  # fmt: skip
UNSEEN: dict[str, Generator] = {"largest": largest, "gift": gift, "double": double}
LEVELS: dict[str, tuple[int, ...]] = {  # to choose between
    "sum": (2, 3, 4), "product": (20, 50, 100, 1000), "change": (50, 100, 1000),
    "sorting": (3, 4, 5, 6), "clock": (30, 60, 120),
}  # fmt: skip
UNSEEN_LEVELS = {"largest": 3, "gift": 1, "double": 2}  # a start solves some of each


def make_rows(
    task: str, count: int, seed: int, level: int, taken: Collection[str] = ()
) -> list[Row]:
    """Return `count` rows of a task, all of different questions that are not `taken`.

    Raises `ValueError` where the level has not so many problems.
    """
    generate = (TASKS | UNSEEN)[task]
    rng = random.Random(f"{seed}/{task}/{level}")
    seen, rows = set(taken), []
    for _ in range(50 * count):
        problem = generate(rng, level)
        if problem.question not in seen:
            seen.add(problem.question)
            rows.append(_row(task, level, problem))
        if len(rows) == count:
            return rows
    raise ValueError(f"{task} at level {level} has fewer than {count} problems that are not taken")


def _row(task: str, level: int, problem: Problem) -> Row:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.completion},
    ]
    graded = {"reward": problem.reward, "answer": problem.answer}
    return {"domain": DOMAIN, "task": task, "difficulty": level, **graded, "messages": messages}


def write_rows(file: Path, rows: Sequence[Row]) -> set[str]:
    """Write rows; return their questions."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {row["messages"][1]["content"] for row in rows}


def write_all_levels(file: Path, count: int, seed: int, taken: Collection[str]) -> set[str]:
    """Write `count` rows of each trained task, shared out over its levels; return the questions."""
    rows: list[Row] = []
    for task, levels in LEVELS.items():
        each = math.ceil(count / len(levels))
        rows += [row for level in levels for row in make_rows(task, each, seed, level, taken)]
    return write_rows(file, rows)


def write_split(
    file: Path, count: int, seed: int, levels: Mapping[str, int], taken: Collection[str]
) -> set[str]:
    """Write `count` rows of each task in `levels`, of its level; return the questions."""
    made = (make_rows(task, count, seed, level, taken) for task, level in levels.items())
    return write_rows(file, [row for rows in made for row in rows])


def main(arguments: list[str] | None = None) -> None:
    """Write a file of all levels, to look at."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_all_levels(options.directory / "rows.jsonl", options.count, options.seed, ())


if __name__ == "__main__":
    main()
