"""RL stages as a whole: they learn, continue to the same bits, and refuse what cannot work."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

from ernie_train.rl.learner import Learner
from ernie_train.rl.rollout import RolloutSampler, read_rollout
from ernie_train.train.trainer import Trainer
from tests.kills import Begin, finish, kill_often, kill_until_through
from tests.rl.upo_stages import (
    GAE,
    OFFLINE_ONLY,
    merged,
    rl_files,
    run,
    run_stage,
    stage,
)
from tests.workspace import metrics_without_time, start

METRICS = "01-rl/metrics.jsonl"

# ---- it learns -----------------------------------------------------------------------------------


def test_a_reward_that_can_be_reached_is_reached(workspace, tmp_path):
    """Group-relative, without a critic: from a few plus signs to many."""
    larger = {"prompts_per_iteration": 8, "group_size": 8}
    assert run_stage(workspace, tmp_path / "learns", iterations=12, rollout=larger,
                     policy={"kl": {"coef": 0.001}}) == 0  # fmt: skip
    lines = metrics_without_time(tmp_path / "learns", "01-rl")
    accuracy = [line["accuracy"] for line in lines]
    assert np.mean(accuracy[-3:]) > np.mean(accuracy[:3]) + 0.3
    assert max(line["logprob_mismatch"] for line in lines) < 1e-5
    assert max(line.get("experts_changed", 0.0) for line in lines) < 0.01
    assert lines[-1]["kl"] > 0
    samples = [json.loads(line) for line in
               (tmp_path / "learns/01-rl/samples.jsonl").read_text().splitlines()]  # fmt: skip
    assert {s["step"] for s in samples} == set(range(1, 13))
    assert all(set(s["parts"]) == {"score"} for s in samples)


@pytest.fixture(scope="module")
def whole(workspace) -> Path:
    """A stage with everything on: critic, both kinds of pairs, curriculum, refills."""
    directory = workspace / "whole"
    assert run_stage(workspace, directory, **GAE) == 0
    return directory


def test_everything_on_leaves_a_critic_pairs_and_metrics(whole):
    saved = whole / "01-rl/checkpoints/step_000004"
    for name in ("critic/model.safetensors", "critic/optimizer.safetensors", "state.json"):
        assert (saved / name).exists(), name
    assert (whole / "01-rl/offline_pairs.jsonl").exists()
    last = metrics_without_time(whole, "01-rl")[-1]
    assert "pairs/hint" in last and "pairs/shorter" in last
    for name in (
        "reward", "accuracy", "frac_reward_zero_std", "kl", "entropy", "clip_ratio", "pairs",
        "completions/mean_length", "completions/truncated", "rewards/accuracies",
        "rewards/margins", "critic/value_loss", "value/explained_variance", "curriculum/level",
        "prompts_per_trained_group", "policy", "preference", "grad_norm", "moe/load_cv",
    ):  # fmt: skip
        assert name in last, name
    first = metrics_without_time(whole, "01-rl")[0]
    assert first["preference/norm_ratio"] > 0 and -1 < first["preference/cosine"] < 1


@pytest.mark.parametrize("moment", ["sample", "score", "update", "between"])
def test_a_stage_cut_off_anywhere_continues_to_the_same_bits(
    workspace, whole, tmp_path, monkeypatch, moment
):
    """A signal in the third iteration, while it samples, scores, updates, or has just ended."""
    iteration, sent = 0, False

    def interrupt_the_third() -> None:
        nonlocal sent
        if iteration == 3 and not sent:
            sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupting(original):
        def patched(self, *arguments, **options):
            interrupt_the_third()
            return original(self, *arguments, **options)

        return patched

    original_rollout = RolloutSampler.rollout

    def rollout(self, number):
        nonlocal iteration
        iteration = number
        if moment == "between":
            interrupt_the_third()
        return original_rollout(self, number)

    monkeypatch.setattr(RolloutSampler, "rollout", rollout)
    patched_at = {
        "sample": (RolloutSampler, "sample"),
        "score": (RolloutSampler, "_scored"),
        "update": (Learner, "_policy_step"),
    }
    if moment in patched_at:
        owner, name = patched_at[moment]
        monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    directory = tmp_path / f"cut-{moment}"
    assert run_stage(workspace, directory, **GAE) == 3
    assert sent
    assert run_stage(workspace, directory, **GAE) == 0
    assert metrics_without_time(directory, "01-rl") == metrics_without_time(whole, "01-rl")
    assert rl_files(directory) == rl_files(whole)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(workspace, whole, tmp_path):
    """SIGKILL in rollouts, scoring, updates or saving, again and again until the stage is done."""
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    often = {**GAE, "checkpoint": {"every_steps": 1, "keep_last": 2}}
    recipe["stages"] = [stage(workspace, **often)]
    (workspace / "killed.yaml").write_text(yaml.safe_dump(recipe))
    uninterrupted = tmp_path / "uninterrupted"

    def begin(directory: Path) -> Begin:
        return lambda: start("run", workspace / "killed.yaml", "--run-dir", directory)

    pace, rng = finish(begin(uninterrupted), uninterrupted / METRICS), random.Random(5)

    def killed_run(number: int) -> int:
        directory = tmp_path / f"killed-{number}"
        kills = kill_until_through(begin(directory), directory / METRICS, pace, rng)
        assert metrics_without_time(directory, "01-rl") == metrics_without_time(
            uninterrupted, "01-rl"
        )
        assert rl_files(directory) == rl_files(uninterrupted)
        return kills

    kill_often(20, killed_run)


def test_dpo_raises_its_margin_and_continues_to_the_same_bits(workspace, tmp_path, monkeypatch):
    dpo = {
        "name": "rl", "kind": "dpo", "data": str(workspace / "preferences.jsonl"), "seq_len": 64,
        "steps": 6, "pairs_per_step": 4, "micro_batch_size": 4,
        "optim": {"lr": 1e-3, "schedule": "constant", "weight_decay": 0.0},
        "checkpoint": {"every_steps": 100},
    }  # fmt: skip
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    path = workspace / "dpo.yaml"
    path.write_text(yaml.safe_dump({**recipe, "stages": [dpo]}))
    assert run("run", path, "--run-dir", tmp_path / "dpo") == 0
    lines = metrics_without_time(tmp_path / "dpo", "01-rl")
    assert lines[0]["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[-1]["rewards/margins"] > 0.05
    original = Trainer.train_step

    def step_with_signal(self, *arguments):
        result = original(self, *arguments)
        if result.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_with_signal)
        assert run("run", path, "--run-dir", tmp_path / "cut") == 3
    assert run("run", path, "--run-dir", tmp_path / "cut") == 0
    assert metrics_without_time(tmp_path / "cut", "01-rl") == lines
    for name in ("model", "optimizer"):
        file = f"01-rl/checkpoints/step_000006/{name}.safetensors"
        assert (tmp_path / "dpo" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_offline_pairs_alone_train_without_rollouts(workspace, tmp_path):
    offline = merged(OFFLINE_ONLY, {"preference": {"offline": {"prompts": 20}}})
    assert run_stage(workspace, tmp_path / "offline", iterations=24, **offline) == 0
    lines = metrics_without_time(tmp_path / "offline", "01-rl")
    assert lines[0]["preference"] == pytest.approx(np.log(2), abs=1e-5)
    assert "reward" not in lines[0] and "policy" not in lines[0]
    assert np.mean([line["rewards/margins"] for line in lines[-8:]]) > 0


# ---- prompts -------------------------------------------------------------------------------------


def test_the_curriculum_rises_and_stays_within_its_levels(workspace, tmp_path):
    (workspace / "easy.py").write_text("def score(row, completion):\n    return 1.0\n")
    assert run_stage(workspace, tmp_path / "easy", curriculum={"raise_at": 0.9}, iterations=4,
                     reward={"python": f"{workspace}/easy.py:score"}) == 0  # fmt: skip
    lines = metrics_without_time(tmp_path / "easy", "01-rl")
    assert [line["curriculum/level"] for line in lines] == [1, 2, 3, 3]
    assert all(line["frac_reward_zero_std"] == 1.0 for line in lines)
    assert not any("policy" in line for line in lines), "equal rewards teach nothing"


def test_masked_truncation_keeps_cut_completions_out(workspace, tmp_path):
    assert run_stage(workspace, tmp_path / "masked", iterations=1,
                     rollout={"truncated": "mask", "max_new_tokens": 3}) == 0  # fmt: skip
    line = metrics_without_time(tmp_path / "masked", "01-rl")[0]
    assert line["completions/truncated"] > 0.9
    assert "policy" not in line


def test_a_key_one_section_too_high_is_refused_with_its_place(workspace, capsys):
    keys = {"group_size": "rollout", "clip_ratio": "policy", "gamma": "critic"}
    wrong = [f"stages.rl.{key}=1" for key in keys]
    assert run("check", workspace / "recipe.yaml", *wrong) == 2
    said = " ".join(capsys.readouterr().err.split())
    for key, section in keys.items():
        assert f"{key}: unknown key; did you mean 'stages.rl.{section}.{key}'?" in said


def test_a_critic_of_another_size_is_refused(workspace, tmp_path, capsys):
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    assert run_stage(workspace, tmp_path / "small", **{**GAE, "iterations": 1}) == 0
    saved = tmp_path / "small/01-rl/checkpoints/step_000001/critic"
    critic = {**GAE["critic"], "path": str(saved)}
    assert (
        run_stage(workspace, tmp_path / "same", **{**GAE, "critic": critic, "iterations": 1}) == 0
    )
    recipe["model"]["moe_intermediate_size"] = 24
    recipe["stages"] = [stage(workspace, **{**GAE, "critic": critic})]
    (workspace / "other.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    assert run("run", workspace / "other.yaml", "--run-dir", tmp_path / "other") == 2
    assert str(saved) in " ".join(capsys.readouterr().err.split()).replace(" ", "")


def test_sampling_and_update_that_disagree_stop_the_stage(workspace, tmp_path, capsys):
    assert run_stage(workspace, tmp_path / "off", rollout={"max_logprob_mismatch": 1e-12}) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "the logprobs of sampling and of the update differ" in err


def test_check_describes_the_stage(workspace, capsys):
    assert run("check", workspace / "recipe.yaml") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "an iteration samples 6 prompts x 4 completions of at most 10 tokens" in out
    assert "2 optimizer steps an iteration; iterations: 4" in out


def test_cut_off_completions_are_settled_before_pairs_are_made(workspace, tmp_path):
    """The starting policy's pairs obey `truncated` as the iterations' do."""
    cut = {"rollout": {"truncated": "mask", "max_new_tokens": 3}, "iterations": 1,
           "preference": {"pairs": "both", "hint": None}}  # fmt: skip
    everything_is_cut = merged(GAE, cut)
    assert run_stage(workspace, tmp_path / "cut", **everything_is_cut) in (0, 2)
    kept = tmp_path / "cut/01-rl/offline_pairs.jsonl"
    pairs = read_rollout(kept) if kept.exists() else []
    assert all(completion.finished for pair in pairs for completion in pair)
