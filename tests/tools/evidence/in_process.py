"""Stand-ins for the programs of a sweep, in this process: Paddle is loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ernie_train.cli.main import main as ernie_train
from tools.evidence import measure, rejection_sampling


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


def train_here(recipe: str, overrides: list[str], run_dir: Path) -> dict[str, float]:
    return in_this_process(
        "-m", "ernie_train", "run", recipe, "--run-dir", str(run_dir), *overrides
    )
