"""Writes the generated data sets: data/{train,validation,test,hard}/<domain>.jsonl.

`data/collected/<domain>.jsonl.gz` has the training problems as careless people solve them: where a
problem invites its task's usual mistake, most solutions make it. The verifier's fields are right.

    python -m tools.data.make_data --out data

The same seed gives the same bytes, on any machine and under any PYTHONHASHSEED. The splits share
no problem: a hash of the problem, not of its wording, decides where it belongs.
"""

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.data.tasks import DOMAINS, HARD_TASKS, TASKS, Item, Task, to_row

SEED = 20250701
SIZES = {"train": 850, "validation": 100, "test": 300}
HARD_SIZES = {"hard": 50}
COLLECTED = "collected"
SLIP_SHARE = 0.6  # of the solutions of problems that invite a mistake
# Shares of the problem space that belong to each split, in percent.
_SHARES = {"test": 15, "validation": 5, "train": 80}
_MAX_DRAWS_PER_ROW = 60


def split_of(task: Task, item: Item, splits: Iterable[str]) -> str:
    """Return the split that a problem belongs to, by the hash of its key."""
    names = list(splits)
    if len(names) == 1:
        return names[0]
    digest = hashlib.sha256(f"{task.name}\0{item.key}".encode()).digest()
    bucket = int.from_bytes(digest[:8], "big") % sum(_SHARES.values())
    for split, share in _SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("a bucket lies below the sum of all shares")


def prompt_identity(row: dict[str, Any]) -> str:
    """Return the prompt and tools; no two rows of a task, of any split, have the same."""
    return json.dumps([row["messages"][0]["content"], row.get("tools")], sort_keys=True)


def build_task(task: Task, sizes: dict[str, int], seed: int = SEED) -> dict[str, list[Item]]:
    """Return problems of one task for every split.

    Raises RuntimeError if the generator cannot fill the splits with different prompts.
    """
    items: dict[str, list[Item]] = {split: [] for split in sizes}
    seen: set[str] = set()
    for number in range(_MAX_DRAWS_PER_ROW * sum(sizes.values())):
        if all(len(items[split]) == size for split, size in sizes.items()):
            return items
        # A text seed is hashed with SHA-512 by `random`, not by PYTHONHASHSEED's hash().
        item = task.generate(random.Random(f"{seed}/{task.name}/{number}"))
        if item is None:
            continue
        split = split_of(task, item, sizes)
        identity = prompt_identity(to_row(task, item))
        if len(items[split]) == sizes[split] or identity in seen:
            continue
        seen.add(identity)
        items[split].append(item)
    counts = {split: len(made) for split, made in items.items()}
    raise RuntimeError(f"{task.name}: too few different prompts, got {counts} of {sizes}")


def rows_of_split(
    task: Task,
    split: str,
    items: dict[str, list[Item]],
    *,
    seed: int = SEED,
    verifiable_train: bool = False,
) -> list[dict[str, Any]]:
    """Return the rows of a split; those of `collected` are of the problems of `train`."""
    if split != COLLECTED:
        verifiable = verifiable_train or split != "train"
        return [to_row(task, item, verifiable=verifiable) for item in items[split]]
    chance = random.Random(f"{seed}/{task.name}/{COLLECTED}")
    return [to_row(task, item, slipped=chance.random() < SLIP_SHARE) for item in items["train"]]


def interleave(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Take turns between tasks, so that the first rows of a file show all of them."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def to_line(row: dict[str, Any]) -> str:
    """Return one line of JSON without spaces that carry no meaning."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Write every file and print its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--train-rows", type=int, default=SIZES["train"], help="rows a task")
    parser.add_argument(
        "--verifiable-train",
        action="store_true",
        help="give training rows the verifier's fields too, as reinforcement learning needs them",
    )
    options = parser.parse_args(argv)
    groups = [
        (TASKS, {**SIZES, "train": options.train_rows}),
        (HARD_TASKS, HARD_SIZES),
    ]
    for domain in options.domains:
        for tasks, sizes in groups:
            own = [task for task in tasks if task.domain == domain]
            built = [build_task(task, sizes, options.seed) for task in own]
            for split in [*sizes, COLLECTED] if "train" in sizes else sizes:
                rows = [
                    rows_of_split(
                        task,
                        split,
                        items,
                        seed=options.seed,
                        verifiable_train=options.verifiable_train,
                    )
                    for task, items in zip(own, built, strict=True)
                ]
                suffix = ".jsonl.gz" if split == COLLECTED else ".jsonl"
                _write(options.out / split / f"{domain}{suffix}", rows)


def _write(path: Path, groups: list[list[dict[str, Any]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = interleave(groups)
    text = "".join(map(to_line, rows)).encode()
    # Without a date in it, the same rows give the same file.
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
