"""Whole runs beside TRL: both sides do the same, and it is noticed when they do not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.protocol import ROOT
from tools.bench.rl import check_near
from tools.bench.trl.reward import score
from tools.bench.trl.runs import versions_in, watch_run

RL = ["rl", "--prompts", "2", "--group", "4", "--new-tokens", "8", "--micro-batch", "4"]
SFT = ["sft", "--rows", "8", "--seq-len", "256"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [RL, SFT], ids=["rl", "sft"])
def test_both_sides_do_the_same_work(arguments: list[str], referee: object) -> None:
    """`referee` only makes sure that the environment is there."""
    name, *sizes = arguments
    command = [sys.executable, "-m", f"tools.bench.{name}", *sizes, "--model=tiny", "--threads=1"]
    command += ["--rounds=1", "--steps=1", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "same work:" in done.stdout
    ratio = re.search(r"^ratio TRL / ours: (\d+\.\d+) in seconds", done.stdout, re.M)
    assert ratio is not None and float(ratio[1]) > 0


def test_different_work_is_an_error() -> None:
    check_near("tokens", 1000, 1001, 0.01)
    for ours in (1200, float("nan")):
        with pytest.raises(RuntimeError, match="different work: tokens"):
            check_near("tokens", ours, 1000, 0.01)


def test_the_reward_tells_completions_of_a_group_apart() -> None:
    assert score({}, "aaaa") == 0.25 and score({}, "abcd") == 1.0 and score({}, "") == 0.0


def test_a_run_is_watched(tmp_path: Path) -> None:
    """Two lines, of which the first warms up; 100 MB held and half a second of processor time.

    What a run does after the last line is none of its iterations.
    """
    lines = tmp_path / "lines"
    code = f"""
import time
with open({str(lines)!r}, "w") as out:
    print('{{"n": 0}}', file=out, flush=True)
    time.sleep(0.4)
    held, end = b"x" * 100_000_000, time.process_time() + 0.5
    while time.process_time() < end: pass
    print('{{"n": 1}}', file=out, flush=True)
    time.sleep(0.4)
end = time.process_time() + 1.0
while time.process_time() < end: pass
"""
    run = watch_run([sys.executable, "-c", code], {}, 1, lines)
    assert [line["n"] for line in run.lines] == [1] and [line["n"] for line in run.first] == [0]
    assert 0.1 < run.peak_gb < 0.2
    assert 0.4 < run.cpu_seconds < 1.0
    assert json.loads(lines.read_text().splitlines()[-1]) == {"n": 1}


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"):
        watch_run(command, {}, 1, tmp_path / "lines")


def test_packages_that_the_peer_lacks_are_named() -> None:
    (found,) = versions_in(Path(sys.executable), "pytest")
    assert found == f"pytest {pytest.__version__}"
    with pytest.raises(SystemExit, match="has no no-such, nor-this: pip install -r"):
        versions_in(Path(sys.executable), "pytest", "no-such", "nor-this")
