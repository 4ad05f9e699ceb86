"""Writes the generated data sets: data/{train,problems,validation,test,hard}/<domain>.jsonl.

Every task has three levels. `train` demonstrates the first. `problems` asks for the first and the
second, with a verifier and without solutions, for reinforcement learning; `validation` and `test`
have both. `hard` has the third, which nothing is trained on.

    python -m tools.data.make_data --out data

The same seed gives the same bytes, on any machine and under any PYTHONHASHSEED. The splits share
no problem: a hash of the problem, not of its wording, decides where it belongs.
"""

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.data.tasks import DOMAINS, TASKS, Item, Task, to_row

SEED = 20250701
# Rows a task, by level.
SIZES: dict[int, dict[str, int]] = {
    1: {"train": 800, "problems": 300, "validation": 50, "test": 150},
    2: {"problems": 600, "validation": 50, "test": 150},
    3: {"hard": 50},
}
SPLITS = tuple(dict.fromkeys(split for sizes in SIZES.values() for split in sizes))
PROBLEMS = "problems"
# Shares of the problem space of a level that belong to each of its splits.
_SHARES = {"test": 15, "validation": 5, "train": 45, PROBLEMS: 35, "hard": 100}
_MAX_DRAWS_PER_ROW = 1000

Sizes = dict[int, dict[str, int]]


def split_of(task: Task, level: int, item: Item) -> str:
    """Return the split that a problem of a level belongs to, by the hash of its key."""
    shares = {split: _SHARES[split] for split in SIZES[level]}
    digest = hashlib.sha256(f"{task.name}\0{item.key}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % sum(shares.values())
    for split, share in shares.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("a bucket lies below the sum of all shares")


def prompt_identity(row: dict[str, Any]) -> str:
    """Return the prompt and tools; no two rows of a task, of any split, have the same."""
    return json.dumps([row["messages"][0]["content"], row.get("tools")], sort_keys=True)


def build_task(
    task: Task, level: int, sizes: dict[str, int], seed: int = SEED, *, solutions: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Return rows of one level of a task for every split; with `solutions` problems have theirs.

    Raises RuntimeError if the generator cannot fill the splits with different prompts.
    """
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in sizes}
    seen: set[str] = set()
    for number in range(_MAX_DRAWS_PER_ROW * sum(sizes.values())):
        if all(len(rows[split]) == size for split, size in sizes.items()):
            return rows
        # A text seed is hashed with SHA-512 by `random`, not by PYTHONHASHSEED's hash().
        item = task.generate(random.Random(f"{seed}/{task.name}/{level}/{number}"), level)
        if item is None:
            continue
        split = split_of(task, level, item)
        if split not in sizes or len(rows[split]) == sizes[split]:
            continue
        solved = solutions or split != PROBLEMS
        row = to_row(task, level, item, solved=solved, verifiable=split != "train")
        identity = prompt_identity(row)
        if identity in seen:
            continue
        seen.add(identity)
        rows[split].append(row)
    counts = {split: len(made) for split, made in rows.items()}
    raise RuntimeError(f"{task.name}, level {level}: too few prompts, {counts} of {sizes}")


def interleave(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Take turns between tasks, so that the first rows of a file show all of them."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def to_line(row: dict[str, Any]) -> str:
    """Return one line of JSON without spaces that carry no meaning."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def rows_of_domain(
    domain: str, sizes: Sizes = SIZES, seed: int = SEED, *, solutions: bool = False
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each split and its rows, tasks and levels taking turns."""
    own = [task for task in TASKS if task.domain == domain]
    built = [
        build_task(task, level, rows, seed, solutions=solutions)
        for task in own
        for level, rows in sizes.items()
        if rows
    ]
    for split in SPLITS:
        groups = [rows[split] for rows in built if split in rows]
        if groups:
            yield split, interleave(groups)


def file_of(out: Path, split: str, domain: str) -> Path:
    """Return the path of a split; prompts for reinforcement learning are gzipped."""
    return out / split / f"{domain}.jsonl{'.gz' if split == PROBLEMS else ''}"


def main(argv: list[str] | None = None) -> None:
    """Write every file and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--rows",
        type=float,
        default=1.0,
        metavar="TIMES",
        help="more or fewer rows of every split, as far as the problems last",
    )
    parser.add_argument(
        "--solutions",
        action="store_true",
        help="end rows of `problems` in worked solutions too",
    )
    options = parser.parse_args(argv)
    sizes = {
        level: {s: max(1, round(n * options.rows)) for s, n in own.items() if s in options.splits}
        for level, own in SIZES.items()
    }
    for domain in options.domains:
        made = rows_of_domain(domain, sizes, options.seed, solutions=options.solutions)
        for split, rows in made:
            _write(file_of(options.out, split, domain), rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(map(to_line, rows)).encode()
    # Without a date in it, the same rows give the same file.
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
