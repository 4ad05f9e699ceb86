"""Writes problems that need tools: data/episodes/{demonstrations,problems,test}.jsonl.gz.

    python -m tools.data.make_episodes --out data/episodes

    product    a product of two numbers: one call of the calculator
    price      the price of a thing in the row's table: one look-up
    order      the price of several things: a look-up, then a product of what it found

The table stands in no prompt, and the products are beyond what a small model knows by heart, so no
problem can be solved without its calls. Every task has two levels: in a number of the second two
digits follow each other that do so in none of the first; a hash makes three of ten pairs of digits
such pairs. Demonstrations are right and show the first level alone, `problems` and `test` have
both. Names of tasks of the second level end in `_2`. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from itertools import count, pairwise
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
# Rows of a task, of the first and of the second level.
SIZES = {"demonstrations": (1600, 0), "problems": (100, 300), "test": (50, 100)}
# Digits of the numbers of a task: two factors; a price; pieces and their price.
DIGITS: dict[str, Sequence[tuple[int, int]]] = {
    "product": [(1, 3), (1, 3)],
    "price": [(1, 3)],
    "order": [(1, 2), (1, 3)],
}
ENTRIES = (2, 8)  # of a table


def is_held_out(number: str) -> bool:
    """Return True if a number has two neighbouring digits of the second level."""
    pairs = (f"{a}{b}" for a, b in pairwise(number))
    return any(hashlib.sha256(f"digits {pair}".encode()).digest()[0] < 77 for pair in pairs)


def _numbers(digits: Sequence[tuple[int, int]], level: int, rng: random.Random) -> list[str]:
    """Draw numbers of a level; no 0 or 1, with which no product needs computing."""
    while True:
        sizes = [rng.randint(*bounds) for bounds in digits]
        found = [str(rng.randint(max(2, 10 ** (n - 1)), 10**n - 1)) for n in sizes]
        if any(map(is_held_out, found)) == bool(level):
            return found


def make_row(task: str, level: int, rng: random.Random) -> dict[str, Any]:
    """Return a row of a task at a level, from 0 on, with its right demonstration."""
    numbers = _numbers(DIGITS[task], level, rng)
    things = rng.sample(THINGS, rng.randint(*ENTRIES))
    table = {thing: str(rng.randint(2, 999)) for thing in things}
    thing, pieces = rng.choice(things), numbers[0]
    table[thing] = numbers[-1]
    look_up = ("lookup", {"key": thing}, table[thing])
    calls: Sequence[tuple[str, dict[str, str], str]]
    if task == "product":
        product = " * ".join(numbers)
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
        "domain": "episodes", "task": f"{task}_2" if level else task,
        "reward": "exact", "answer": calls[-1][2],
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
    split: str, sizes: Sequence[int], seed: int = SEED, seen: set[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a split, `sizes` of a task by level; none in `seen`, to which it adds."""
    seen = set() if seen is None else seen
    rows = []
    for level, size in enumerate(sizes):
        for task in DIGITS:
            draws = count()
            left = size
            while left:
                random_ = random.Random(f"{seed}/{split}/{level}/{task}/{next(draws)}")
                row = make_row(task, level, random_)
                identity = json.dumps([row["messages"][0], row.get(TABLE)])
                if identity in seen:
                    continue
                seen.add(identity)
                left -= 1
                if split != "demonstrations":
                    row["messages"] = row["messages"][:1]
                rows.append(row)
    random.Random(f"{seed}/{split}").shuffle(rows)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Write every split; those of problems have no demonstrations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/episodes"))
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, sizes in SIZES.items():
        rows = make_split(split, sizes, options.seed, seen)
        text = "".join(
            json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
        )
        path = options.out / f"{split}.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
