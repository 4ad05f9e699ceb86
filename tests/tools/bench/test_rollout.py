"""The benchmark runs on a small batch, and notices when the sides compute different things."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_both_sides_complete_the_same_prompts(referee: object) -> None:
    """`referee` only makes sure that the environment is there."""
    sizes = ["--batch", "4", "--prompt-tokens", "8", "--new-tokens", "16", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.rollout", "--model", "tiny", *sizes, "--trials=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^peer's best: attention (sdpa|eager), experts \w+, cache", done.stdout, re.M)
    assert "greedy tokens agree in 100% of the completions" in done.stdout
    ratio = re.search(r"^ratio ours / peer: (\d+\.\d+) with 1 thread", done.stdout, re.M)
    assert ratio is not None and float(ratio[1]) > 0


def test_different_completions_are_an_error() -> None:
    from tools.bench.rollout import COMPARED_TOKENS, check_agreement

    ours = [list(range(COMPARED_TOKENS + 5)) for _ in range(10)]
    late = [ids[:COMPARED_TOKENS] + [0] * 5 for ids in ours]
    assert check_agreement(ours, late) == 1.0
    early = [[99, *ids[1:]] for ids in ours]
    assert check_agreement(ours, ours[:9] + early[9:]) == 0.9
    with pytest.raises(RuntimeError, match="only 80%"):
        check_agreement(ours, ours[:8] + early[8:])
    with pytest.raises(RuntimeError, match="lengths"):
        check_agreement(ours, [ids[:-1] for ids in ours])
