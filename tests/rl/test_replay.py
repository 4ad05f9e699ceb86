"""Iterations of the same rollout: replayed from a file, in other micro-batches, sharing prompts."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from ernie_train.rl.rollout import RolloutSampler, read_rollout
from tests.rl.upo_stages import (
    GAE,
    ONLINE_PAIRS,
    run,
    run_stage,
    stage,
)
from tests.workspace import metrics_without_time, write_rows


@pytest.fixture(scope="module")
def first(workspace, tmp_path_factory):
    """A run of two iterations with its rollouts."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    assert run_stage(workspace, directory, rollout={"dump": True}, iterations=2) == 0
    return directory


@pytest.fixture
def dumped(first, tmp_path):
    """A copy of its rollouts."""
    return shutil.copytree(first / "01-rl/rollouts", tmp_path / "rollouts")


def test_a_replayed_rollout_gives_the_same_update(workspace, tmp_path, first, dumped):
    second = tmp_path / "second"
    assert len(read_rollout(dumped / "000001.jsonl")) == 6
    assert run_stage(workspace, second, iterations=2, rollout={"replay": str(dumped)}) == 0
    one, two = (metrics_without_time(d, "01-rl") for d in (first, second))
    for a, b in zip(one, two, strict=True):
        a.pop("experts_changed", None)  # a file does not hold the experts
        assert a == b
    weights = "01-rl/checkpoints/step_000002/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


def test_a_replay_of_another_policy_is_corrected_and_of_ones_own_is_not(
    workspace, tmp_path, dumped
):
    replay, far = {"replay": str(dumped)}, {"lr": 0.05}
    assert run_stage(workspace, tmp_path / "far", rollout=replay, iterations=2, optim=far) == 0
    own, other = metrics_without_time(tmp_path / "far", "01-rl")
    assert own["logprob_mismatch"] < 1e-4 and "sampler_weight/mean" not in own
    assert other["logprob_mismatch"] > 0.05 and 0 < other["sampler_weight/mean"] <= 2


def test_a_replay_of_groups_of_another_size_is_refused(workspace, tmp_path, dumped, capsys):
    rollout = {"replay": str(dumped), "group_size": 3}
    assert run_stage(workspace, tmp_path / "two", rollout=rollout, iterations=1) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "group of 4 completions, though rollout.group_size=3" in told


def test_a_replay_without_logprobs_is_refused(workspace, tmp_path, dumped, capsys):
    path = dumped / "000001.jsonl"
    found = [json.loads(line) | {"logprobs": None} for line in path.read_text().splitlines()]
    write_rows(path, found)
    assert run_stage(workspace, tmp_path / "two", rollout={"replay": str(path.parent)},
                     iterations=1) == 2  # fmt: skip
    assert "a completion has no logprobs" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("gap, correction, status", [
    (0.1, None, 1), (0.1, {"kind": "truncated"}, 0), (0.1, {"kind": "masked"}, 0),
    (3.0, {"kind": "truncated"}, 1), (np.nan, {"kind": "masked"}, 1),
])  # fmt: skip
def test_an_engine_that_rounds_is_corrected(
    workspace, tmp_path, monkeypatch, capsys, gap, correction, status
):
    """Its logprobs are off by `gap`, up and down in turn, as those of bfloat16 are."""
    sample = RolloutSampler.sample

    def rounded(self, *args):
        def off(c):
            noise = gap * (-1.0) ** np.arange(c.num_sampled)
            return replace(c, sampled_logprobs=(c.sampled_logprobs + noise).astype(np.float32))

        return [[off(c) for c in group] for group in sample(self, *args)]

    monkeypatch.setattr(RolloutSampler, "sample", rounded)
    policy = {"sampler_correction": correction}
    assert run_stage(workspace, tmp_path / "r", iterations=1, policy=policy) == status
    if status:
        assert "policy.sampler_correction" in capsys.readouterr().err.replace("\n", " ") or (
            correction is not None
        )
        return
    (line,) = metrics_without_time(tmp_path / "r", "01-rl")
    assert line["logprob_mismatch"] == pytest.approx(math.expm1(0.1), rel=1e-3)
    weights = np.exp([0.1, -0.1])
    assert weights[1] < line["sampler_weight/mean"] < weights[0]
    assert line["sampler_weight/clipped"] == 0.0


def test_recorded_experts_are_taken_again_also_from_a_file(workspace, tmp_path, dumped, capsys):
    replays = {"policy": {"router_replay": True, "update_epochs": 2}, "iterations": 2}
    assert run_stage(workspace, tmp_path / "one", rollout={"dump": True}, **replays) == 0
    own = {"replay": str(tmp_path / "one/01-rl/rollouts")}
    assert run_stage(workspace, tmp_path / "two", rollout=own, **replays) == 0
    one, two = (metrics_without_time(tmp_path / d, "01-rl") for d in ("one", "two"))
    assert one == two
    assert [line["experts_changed"] for line in one] == [0.0, 0.0]
    weights = "01-rl/checkpoints/step_000002/model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    bare = {"replay": str(dumped)}
    capsys.readouterr()
    assert run_stage(workspace, tmp_path / "no", rollout=bare, **replays) == 2
    told = "".join(capsys.readouterr().err.split())
    assert "givesnoexpertsforpolicy.router_replay" in told and "000001.jsonl" in told


@pytest.mark.parametrize("number", [1, 999])
def test_a_replay_of_other_prompts_is_refused(workspace, tmp_path, dumped, capsys, number):
    file = dumped / "000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    first = lines[0]["prompt"]
    for line in lines:
        if line["prompt"] == first:
            line["prompt"] = first + number
    write_rows(file, lines)
    replay = {"replay": str(dumped)}
    assert run_stage(workspace, tmp_path / "two", rollout=replay, iterations=1) == 2
    assert "isnotthatofthisstage" in "".join(capsys.readouterr().err.split())


def test_micro_batches_of_any_size_train_the_same_rollout(workspace, tmp_path, dumped):
    """Sums over the step are divided by counts over the step: sizes differ by rounding alone."""
    replay = {"replay": str(dumped)}
    lines = []
    for size in (2, 8, 32):
        run_dir = tmp_path / f"of-{size}"
        changes = {"iterations": 1, "rollout": replay, "micro_batch_size": size}
        assert run_stage(workspace, run_dir, **changes) == 0
        (line,) = metrics_without_time(run_dir, "01-rl")
        lines.append({k: v for k, v in line.items() if "moe/" not in k and "experts" not in k})
    assert lines[0]["grad_norm"] > 0 and len(lines[0]) > 10
    for other in lines[1:]:
        assert other == pytest.approx(lines[0], rel=1e-4, abs=1e-6)
        assert other["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5)


def test_shared_prompts_change_no_number_of_an_iteration(workspace, tmp_path):
    lines = []
    for share in (False, True):
        changes = {"iterations": 1, "critic": GAE["critic"], "preference": ONLINE_PAIRS,
                   "policy": {"kl": {"coef": 0.01}}, "share_prompts": share}  # fmt: skip
        assert run_stage(workspace, tmp_path / str(share), **changes) == 0
        (line,) = metrics_without_time(tmp_path / str(share), "01-rl")
        lines.append({k: v for k, v in line.items() if "moe/" not in k and "experts" not in k})
    assert lines[0].keys() == lines[1].keys() and lines[0]["grad_norm"] > 0
    assert lines[1] == pytest.approx(lines[0], rel=1e-3, abs=1e-5)


def test_a_capacity_limit_is_refused(workspace, tmp_path, capsys):
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["stages"] = [stage(workspace)]
    recipe["model"]["moe_capacity_factor"] = 1.5
    path = tmp_path / "capacity.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run("check", path) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "stages.0: moe_capacity_factor=1.5 drops tokens in updates" in told


def test_a_replay_that_is_not_there_is_told_before_the_stage_begins(workspace, tmp_path, capsys):
    directory = tmp_path / "nothing"
    directory.mkdir()
    assert run_stage(workspace, tmp_path / "replay", rollout={"replay": str(directory)}) == 2
    assert "000001.jsonl is missing" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "replay/01-rl/metrics.jsonl").exists()
