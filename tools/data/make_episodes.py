"""Writes problems that need tools: data/episodes/{demonstrations,problems,test}.jsonl.gz.

    python -m tools.data.make_episodes --out data/episodes

    product    a product of two numbers: one call of the calculator
    price      the price of a thing in the row's table: one look-up
    order      the price of several things: a look-up, then a product of what it found

The table stands in no prompt, and products of four digits are beyond what a small model knows by
heart, so no problem can be solved without its calls. Demonstrations are right; they show smaller
numbers than `problems` and `test` have. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.environments.calculator import Calculator, calculator
from ernie_train.environments.lookup import TABLE, Lookup

SEED = 20261129
THINGS = [
    "apple", "bag", "ball", "book", "bread", "candle", "chair", "clock", "coat", "cup", "desk",
    "door", "drum", "fish", "glass", "hat", "key", "lamp", "map", "pen", "ring", "rope", "shoe",
    "soap", "spoon", "table", "tent", "watch",
]  # fmt: skip
SIZES = {"demonstrations": 800, "problems": 300, "test": 100}  # rows of a task
TASKS = ("product", "price", "order")


@dataclass(frozen=True)
class Range:
    """The numbers of a split: factors, pieces of an order, prices, entries of a table."""

    factors: tuple[int, int]
    pieces: tuple[int, int]
    prices: tuple[int, int]
    entries: tuple[int, int]


EASY = Range((11, 999), (2, 9), (2, 99), (2, 4))
HARD = Range((1000, 9999), (10, 99), (100, 999), (4, 8))


def make_row(task: str, numbers: Range, rng: random.Random) -> dict[str, Any]:
    """Return a row with its right demonstration."""
    things = rng.sample(THINGS, rng.randint(*numbers.entries))
    table = {thing: str(rng.randint(*numbers.prices)) for thing in things}
    thing, pieces = rng.choice(things), rng.randint(*numbers.pieces)
    product = f"{rng.randint(*numbers.factors)} * {rng.randint(*numbers.factors)}"
    look_up = ("lookup", {"key": thing}, table[thing])
    calls: Sequence[tuple[str, dict[str, str], str]]
    if task == "product":
        question = rng.choice(["What is {}?", "Compute {}.", "How much is {}?"]).format(product)
        calls = [("calculator", {"expression": product}, calculator(product))]
    elif task == "price":
        question = rng.choice(["What does a {} cost?", "Tell me the price of a {}."]).format(thing)
        calls = [look_up]
    else:
        asked = rng.choice(["What do {} pieces of {} cost?", "Price of {} pieces of {}?"])
        question, expression = asked.format(pieces, thing), f"{pieces} * {table[thing]}"
        calls = [look_up, ("calculator", {"expression": expression}, calculator(expression))]
    offered = [Calculator.schema] if task == "product" else [Lookup.schema]
    offered = [Calculator.schema, Lookup.schema] if task == "order" else offered
    return {
        "domain": "episodes", "task": task, "reward": "exact", "answer": calls[-1][2],
        "messages": [{"role": "user", "content": question}, *_demonstration(calls)],
        "tools": offered, **({} if task == "product" else {TABLE: table}),
    }  # fmt: skip


def _demonstration(calls: Sequence[tuple[str, dict[str, str], str]]) -> list[dict[str, Any]]:
    """Return a turn and a result for each call, and the answer: the last result."""
    turns: list[dict[str, Any]] = []
    for name, arguments, result in calls:
        called = {"type": "function", "function": {"name": name, "arguments": arguments}}
        reasoning = " ".join([name, *arguments.values()])
        turns.append({"role": "assistant", "reasoning_content": reasoning, "tool_calls": [called]})
        turns.append({"role": "tool", "name": name, "content": result})
    answer = turns[-1]["content"]
    return [*turns, {"role": "assistant", "reasoning_content": "answer", "content": answer}]


def make_split(
    split: str, size: int, seed: int = SEED, seen: set[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a split, tasks in turn; none in `seen`, to which they are added."""
    numbers = EASY if split == "demonstrations" else HARD
    seen = set() if seen is None else seen
    rows: list[dict[str, Any]] = []
    draws = 0
    while len(rows) < size * len(TASKS):
        task = TASKS[len(rows) % len(TASKS)]
        row = make_row(task, numbers, random.Random(f"{seed}/{split}/{task}/{draws}"))
        draws += 1
        identity = json.dumps([row["messages"][0], row.get(TABLE)])
        if identity in seen:
            continue
        seen.add(identity)
        if split != "demonstrations":
            row["messages"] = row["messages"][:1]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Write every split; those of problems have no demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/episodes"))
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, size in SIZES.items():
        rows = make_split(split, size, options.seed, seen)
        text = "".join(
            json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
        )
        path = options.out / f"{split}.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
