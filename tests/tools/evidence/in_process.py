"""Stand-ins for the programs of a sweep, in this process: Paddle is loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ernie_train.cli.main import main as ernie_train
from tools.evidence import measure, rejection_sampling, rivals, sweep


def in_this_process(*arguments: str, note: Any = None) -> dict[str, float]:
    """Stand for `run_program`."""
    module, given = arguments[1], list(arguments[2:])
    if module == "ernie_train":
        with pytest.raises(SystemExit) as ended:
            ernie_train(given)
        assert ended.value.code == 0, given
    elif module == "tools.evidence.measure":
        measure.main(given)
    else:
        assert module == "tools.evidence.rejection_sampling"
        rejection_sampling.main(given)
    return {"wall_s": 1.0, "cpu_s": 1.0, "peak_gb": 0.1}


def train_here(
    recipe: str, overrides: list[str], run_dir: Path, *, ranks: int = 1
) -> dict[str, float]:
    return in_this_process(
        "-m", "ernie_train", "run", recipe, "--run-dir", str(run_dir), *overrides
    )


@contextmanager
def one_process(*modules: ModuleType) -> Iterator[None]:
    """Run the programs that sweeps start in this process; `modules` are others that start some."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (sweep, rivals, *modules):
            patch.setattr(module, "run_program", in_this_process)
        for module in (sweep, *modules):
            patch.setattr(module, "train", train_here)
        patch.delenv("ERNIE_TRAIN_REFEREE", raising=False)  # torch takes seconds to load
        yield
