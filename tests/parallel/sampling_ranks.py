"""On every rank: a share of the prompts is sampled, by two processes of the rank."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

import ernie_train  # noqa: F401
from ernie_train.core import process_group
from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import Interrupted
from ernie_train.core.process_group import Grid
from ernie_train.generate.sharded import generate_sharded
from tests.small_models import make_model

STOPPED_AFTER = 5


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 96, n).tolist() for n in rng.integers(3, 30, 40)]


def sampled() -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    numbers = [7 * i for i in range(40)]
    limits = [1 + i % 12 for i in range(40)]
    found = generate_sharded(
        make_model(), prompts(), sequence_ids=numbers, limits=limits,
        stop_requested=lambda: False, **settings,
    )  # fmt: skip
    return [completion.ids for completion in found]


def stopped() -> bool:
    """Whether a stop on the last rank interrupts this one."""
    asked = 0

    def stop_requested() -> bool:
        nonlocal asked
        asked += 1
        last = process_group.rank() + 1 == process_group.world_size()
        return last and asked > STOPPED_AFTER

    try:
        generate_sharded(make_model(), prompts(), max_new_tokens=40, stop_requested=stop_requested)
    except Interrupted:
        return True
    return False


def main(directory: Path) -> None:
    process_group.set_grid(Grid(data=2))
    cpu_setup().threads = 2
    forks: list[int] = []
    os.register_at_fork(after_in_parent=lambda: forks.append(1))
    result = {"ids": sampled(), "stopped": stopped(), "forks": len(forks)}
    (directory / f"{process_group.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
