"""The benchmarks run in small, and notice when the sides do different work."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tools.bench.protocol import ROOT, Side
from tools.bench.rollout import COMPARED_TOKENS, check_agreement
from tools.bench.scaling import check_losses as check_layout
from tools.bench.train import check_losses

TRAIN = ["train", "--rows", "1", "--length", "64", "--steps", "1"]
ROLLOUT = [
    "rollout",
    "--model",
    "tiny",
    "--batch",
    "4",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "16",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "agreement"),
    [
        (TRAIN, "same training: last losses"),
        (ROLLOUT, "greedy tokens agree in 100% of the completions"),
    ],
    ids=["train", "rollout"],
)
def test_both_sides_do_the_same_work(arguments: list[str], agreement: str, referee: object) -> None:
    """`referee` only makes sure that the environment is there."""
    name, *sizes = arguments
    command = [sys.executable, "-m", f"tools.bench.{name}", *sizes, "--rounds=2", "--trials=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^peer's best: attention (sdpa|eager), experts \w+", done.stdout, re.M)
    assert agreement in done.stdout
    ratio = re.search(r"^ratio ours / peer: (\d+\.\d+) with 1 thread", done.stdout, re.M)
    assert ratio is not None and float(ratio[1]) > 0


def test_a_side_that_has_ended_says_how() -> None:
    """As one does whose environment lacks a package: before it reads what it is asked."""
    side = Side([sys.executable, "-c", "raise SystemExit(3)"], {})
    side.process.wait()
    with pytest.raises(RuntimeError, match="ended with 3; see its messages"), side:
        side.ask(describe={})


def test_different_training_is_an_error() -> None:
    check_losses(8.31801, 8.31802, 1e-4)
    with pytest.raises(RuntimeError, match="different things"):
        check_losses(8.32, 8.31, 1e-4)
    with pytest.raises(RuntimeError, match="different things"):
        check_losses(float("nan"), 8.31, 1e-4)


def test_different_completions_are_an_error() -> None:
    ours = [list(range(COMPARED_TOKENS + 5)) for _ in range(10)]
    late = [ids[:COMPARED_TOKENS] + [0] * 5 for ids in ours]
    assert check_agreement(ours, late) == 1.0
    early = [[99, *ids[1:]] for ids in ours]
    assert check_agreement(ours, ours[:9] + early[9:]) == 0.9
    with pytest.raises(RuntimeError, match="only 80%"):
        check_agreement(ours, ours[:8] + early[8:])
    with pytest.raises(RuntimeError, match="lengths"):
        check_agreement(ours, [ids[:-1] for ids in ours])


@pytest.mark.parametrize("losses", [[8.3, 8.1], [8.3, float("nan")], [float("nan"), 8.0]])
def test_layouts_must_have_the_same_losses(losses: list[float]) -> None:
    check_layout("two ranks", [8.3, 8.0001], [8.3, 8.0])
    with pytest.raises(SystemExit, match="two ranks: losses differ by"):
        check_layout("two ranks", losses, [8.3, 8.0])
