"""The benchmark runs on a small batch, and notices when the sides do different work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_both_sides_train_the_same_model(referee: object) -> None:
    """`referee` only makes sure that the environment is there."""
    sizes = ["--rows", "1", "--length", "64", "--rounds", "2", "--steps", "1", "--trials", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.train", *sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^peer's best: attention (sdpa|eager), experts \w+", done.stdout, re.M)
    ratio = re.search(r"^ratio ours / peer: (\d+\.\d+) with 1 thread", done.stdout, re.M)
    assert ratio is not None and float(ratio[1]) > 0


def test_different_training_is_an_error() -> None:
    from tools.bench.train import check_losses

    check_losses(8.31801, 8.31802, 1e-4)
    with pytest.raises(RuntimeError, match="different things"):
        check_losses(8.32, 8.31, 1e-4)
    with pytest.raises(RuntimeError, match="different things"):
        check_losses(float("nan"), 8.31, 1e-4)
