"""A launch whose rank was killed, continued by one rank alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.launch.launched import left_behind, ranks_of, wait_for
from tests.parallel.test_runs import apart, run_here
from tests.workspace import make_workspace, metrics_without_time, start

STEPS, KILLED_AFTER = 10, 3


def last(run_dir: Path) -> Path:
    return run_dir / f"01-sft/checkpoints/step_{STEPS:06d}"


def test_one_rank_goes_on_where_one_of_two_was_killed(tmp_path):
    recipe = yaml.safe_load(make_workspace(tmp_path).read_text())
    recipe |= {"evaluation": None, "export": None, "parallel": {"expert": 2}}
    recipe["stages"][0] |= {"steps": STEPS, "balance": {"bias_update_rate": 0.001}}
    recipe["stages"][0]["checkpoint"] = {"every_steps": 1, "keep_last": STEPS}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    on_one = ["run", str(path), "parallel.expert=1", "--run-dir"]

    killed = tmp_path / "killed"
    process = start("run", path, "--run-dir", killed, "--nproc", 2)
    try:
        written = killed / f"01-sft/checkpoints/step_{KILLED_AFTER:06d}"
        wait_for(lambda: written.exists() or process.poll() is not None, "no checkpoint", 300)
        os.kill(ranks_of(killed)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, out + err
    assert "rank 1: was killed (SIGKILL)" in " ".join(err.split())
    assert not left_behind(killed)
    assert not last(killed).exists(), "it was killed too late to show anything"
    before = len(metrics_without_time(killed))
    assert KILLED_AFTER <= before < STEPS

    assert run_here([*on_one, str(killed)]) == 0
    assert run_here([*on_one, str(tmp_path / "one")]) == 0
    # The same sums in another order: what rounding alone makes of them.
    order = ["stages.sft.micro_batch_size=1", "stages.sft.grad_accum_steps=4"]
    assert run_here([*on_one, str(tmp_path / "other"), *order]) == 0

    bound = apart(last(tmp_path / "one"), last(tmp_path / "other"))
    assert apart(last(tmp_path / "one"), last(killed)) <= 3 * max(bound, 1e-6)
    lines = [metrics_without_time(tmp_path / name) for name in ("one", "killed")]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(*lines, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
