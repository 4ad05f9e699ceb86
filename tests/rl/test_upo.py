"""RL stages as a whole: they learn, continue to the same bits, and refuse what cannot work."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.rl.config import (
    MOVED_KEYS,
    CriticConfig,
    PolicyConfig,
    PreferenceConfig,
    RolloutConfig,
)
from ernie_train.rl.learner import Learner
from ernie_train.rl.rollout import RolloutSampler, read_rollout
from ernie_train.train.trainer import Trainer
from tests.workspace import make_workspace, metrics_without_time, rows, start, write_rows

REWARD = '''
def score(row, completion):
    """Wants plus signs, which an untrained model writes now and then."""
    return 1.0 if "+" in completion else 0.0
'''


def write_prompts(root: Path) -> list[dict[str, Any]]:
    """Write problems of three difficulties with their solutions to prompts.jsonl; return them."""
    made = rows(40, 7)
    for number, row in enumerate(made):
        solution = f"<think>\n+\n</think>\n\n<response>\n{row['answer']}\n</response>"
        row["messages"][1]["content"] = solution
        row["difficulty"] = 1 + number % 3
    write_rows(root / "prompts.jsonl", made)
    return made


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("upo")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    made = write_prompts(root)
    preferences = [
        {"prompt": row["messages"][0]["content"],
         "chosen": f"<think>\n1 + 1\n</think>\n\n<response>\n{row['answer']}\n</response>",
         "rejected": "<think>\nno idea\n</think>\n\n<response>\nnone\n</response>"}
        for row in made[:10]
    ]  # fmt: skip
    write_rows(root / "preferences.jsonl", preferences)
    (root / "reward.py").write_text(REWARD)
    recipe |= {"evaluation": None, "export": None, "stages": [stage(root)]}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in them, section by section; None takes a key out."""
    result = dict(values)
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(result.get(key), dict):
            change = merged(result[key], change)
        result[key] = change
    return {key: value for key, value in result.items() if value is not None}


def stage(root: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "name": "rl", "kind": "upo", "data": [{"path": str(root / "prompts.jsonl")}],
        "reward": {"python": str(root / "reward.py") + ":score"}, "canaries": 0, "iterations": 4,
        "rollout": {
            "prompts_per_iteration": 6, "group_size": 4, "max_new_tokens": 10,
            "max_prompt_tokens": 64,
        },
        "policy": {"minibatches": 2},
        "micro_batch_size": 8, "optim": {"lr": 3e-3, "schedule": "constant", "weight_decay": 0.0},
        "checkpoint": {"every_steps": 100},
    }  # fmt: skip
    return merged(values, changes)


GAE = {
    "critic": {
        "optim": {"lr": 1e-3, "schedule": "constant"}, "lam": 0.95, "warmup_iterations": 0,
    },
    "policy": {"kl": {"coef": 0.01, "place": "reward"}, "update_epochs": 2},
    "preference": {
        "coef": 0.2, "pairs": ["online", "offline", "hint", "shorter"], "rpo_alpha": 0.1,
        "reference": "last_iteration", "pair_reward": {"name": "format", "share": 0.5},
        "margin": 0.1, "hint": {"samples": 2}, "offline": {"prompts": 20, "per_iteration": 2},
    },
    "audit_reward": {"name": "exact", "share": 0.25},
    "balance": {"bias_update_rate": 0.001}, "curriculum": {"start": 1, "raise_at": 0.3},
    "rollout": {
        "refill_rounds": 1, "max_new_tokens": 24, "skip_solved": {"rate": 0.5, "after": 1}
    },
}  # fmt: skip


ONLINE_PAIRS = {"coef": 0.2, "pairs": "online"}
OFFLINE_ONLY = {
    "rollout": {"prompts_per_iteration": None}, "policy": {"coef": 0.0, "minibatches": 1},
    "preference": {
        "coef": 1.0, "pairs": "offline", "offline": {"prompts": 4, "per_iteration": 1}
    },
}  # fmt: skip


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def run_stage(workspace: Path, directory: Path, **changes) -> int:
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["stages"] = [stage(workspace, **changes)]
    path = workspace / f"{directory.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return run("run", path, "--run-dir", directory)


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
    uninterrupted, began = tmp_path / "uninterrupted", time.monotonic()
    process = start("run", workspace / "killed.yaml", "--run-dir", uninterrupted)
    process.communicate()
    assert process.returncode == 0
    whole_s = time.monotonic() - began
    rng, kills = random.Random(5), 0
    for attempt in range(40):  # how many kills hit a stage depends on the machine
        directory = tmp_path / f"killed-{attempt}"
        while True:
            process = start("run", workspace / "killed.yaml", "--run-dir", directory)
            try:
                process.communicate(timeout=rng.uniform(0.3, 1.2) * whole_s)
                assert process.returncode == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        assert metrics_without_time(directory, "01-rl") == metrics_without_time(
            uninterrupted, "01-rl"
        )
        assert rl_files(directory) == rl_files(uninterrupted)
        if kills >= 20:
            return
    raise AssertionError(f"only {kills} kills hit a running stage")


def rl_files(directory: Path) -> dict[str, bytes]:
    saved = directory / "01-rl/checkpoints/step_000004"
    files = [p for p in saved.rglob("*") if p.is_file() and p.name != "MANIFEST.json"]
    found = {str(path.relative_to(saved)): path.read_bytes() for path in files}
    found["samples"] = (directory / "01-rl/samples.jsonl").read_bytes()
    return found


def test_a_replayed_rollout_gives_the_same_update(workspace, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_stage(workspace, first, rollout={"dump": True}, iterations=2) == 0
    dumped = first / "01-rl/rollouts"
    assert len(read_rollout(dumped / "000001.jsonl")) == 6
    assert run_stage(workspace, second, iterations=2, rollout={"replay": str(dumped)}) == 0
    one, two = (metrics_without_time(d, "01-rl") for d in (first, second))
    for a, b in zip(one, two, strict=True):
        a.pop("experts_changed", None)  # a file does not hold the experts
        assert a == b
    weights = "01-rl/checkpoints/step_000002/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


def test_a_replay_of_another_policy_is_corrected_and_of_ones_own_is_not(workspace, tmp_path):
    assert run_stage(workspace, tmp_path / "one", rollout={"dump": True}, iterations=2) == 0
    replay = {"replay": str(tmp_path / "one/01-rl/rollouts")}
    far = {"lr": 0.05}
    assert run_stage(workspace, tmp_path / "far", rollout=replay, iterations=2, optim=far) == 0
    own, other = metrics_without_time(tmp_path / "far", "01-rl")
    assert own["logprob_mismatch"] < 1e-4 and "sampler_weight/mean" not in own
    assert other["logprob_mismatch"] > 0.05 and 0 < other["sampler_weight/mean"] <= 2


def test_a_replay_without_logprobs_is_refused(workspace, tmp_path, capsys):
    assert run_stage(workspace, tmp_path / "one", rollout={"dump": True}, iterations=1) == 0
    path = tmp_path / "one/01-rl/rollouts/000001.jsonl"
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


def test_recorded_experts_are_taken_again_also_from_a_file(workspace, tmp_path, capsys):
    replays = {"policy": {"router_replay": True, "update_epochs": 2}, "iterations": 2}
    assert run_stage(workspace, tmp_path / "one", rollout={"dump": True}, **replays) == 0
    dumped = str(tmp_path / "one/01-rl/rollouts")
    assert run_stage(workspace, tmp_path / "two", rollout={"replay": dumped}, **replays) == 0
    one, two = (metrics_without_time(tmp_path / d, "01-rl") for d in ("one", "two"))
    assert one == two
    assert [line["experts_changed"] for line in one] == [0.0, 0.0]
    weights = "01-rl/checkpoints/step_000002/model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert run_stage(workspace, tmp_path / "bare", rollout={"dump": True}, iterations=2) == 0
    bare = {"replay": str(tmp_path / "bare/01-rl/rollouts")}
    capsys.readouterr()
    assert run_stage(workspace, tmp_path / "no", rollout=bare, **replays) == 2
    told = "".join(capsys.readouterr().err.split())
    assert "givesnoexpertsforpolicy.router_replay" in told and "000001.jsonl" in told


@pytest.mark.parametrize("number", [1, 999])
def test_a_replay_of_other_prompts_is_refused(workspace, tmp_path, capsys, number):
    assert run_stage(workspace, tmp_path / "one", rollout={"dump": True}, iterations=1) == 0
    dumped = tmp_path / "one/01-rl/rollouts"
    file = dumped / "000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    first = lines[0]["prompt"]
    for line in lines:
        if line["prompt"] == first:
            line["prompt"] = first + number
    write_rows(file, lines)
    capsys.readouterr()
    replay = {"replay": str(dumped)}
    assert run_stage(workspace, tmp_path / "two", rollout=replay, iterations=1) == 2
    assert "isnotthatofthisstage" in "".join(capsys.readouterr().err.split())


def test_micro_batches_of_any_size_train_the_same_rollout(workspace, tmp_path):
    """Sums over the step are divided by counts over the step: sizes differ by rounding alone."""
    assert run_stage(workspace, tmp_path / "dumped", rollout={"dump": True}, iterations=1) == 0
    replay = {"replay": str(tmp_path / "dumped/01-rl/rollouts")}
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


def test_shared_prompts_are_refused_beside_a_capacity_limit(workspace, tmp_path, capsys):
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["stages"] = [stage(workspace, share_prompts=True)]
    recipe["model"]["moe_capacity_factor"] = 1.5
    path = tmp_path / "capacity.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run("check", path) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "stages.0.share_prompts: moe_capacity_factor=1.5 counts" in told


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


# ---- what is refused -----------------------------------------------------------------------------


ONLINE = {"coef": 0.1, "pairs": "online"}


def test_keys_of_earlier_recipes_are_refused_with_their_new_place(workspace, capsys):
    """All at once; every old key has a new one that exists."""
    old = {"group_size": 4, "clip_ratio": 0.2, "pair_margin": 0.5, "advantage": "gae"}
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["stages"] = [{**stage(workspace), **old}]
    path = workspace / "old.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run("check", path) == 2
    said = " ".join(capsys.readouterr().err.split())
    for words in (
        "group_size is now rollout.group_size", "clip_ratio is now policy.clip_ratio",
        "pair_margin is now preference.margin", "a `critic` makes advantages generalized",
    ):  # fmt: skip
        assert words in said
    assert run("check", workspace / "recipe.yaml", "stages.rl.top_p=0.9") == 2
    assert "top_p is now rollout.top_p" in " ".join(capsys.readouterr().err.split())
    sections = {
        "rollout": RolloutConfig, "policy": PolicyConfig, "preference": PreferenceConfig,
        "critic": CriticConfig,
    }  # fmt: skip
    for place in MOVED_KEYS.values():
        section, key = place.split(".")
        assert key in sections[section].model_fields, place


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


def test_a_replay_that_is_not_there_is_told_before_the_stage_begins(workspace, tmp_path, capsys):
    directory = tmp_path / "nothing"
    directory.mkdir()
    assert run_stage(workspace, tmp_path / "replay", rollout={"replay": str(directory)}) == 2
    assert "000001.jsonl is missing" in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "replay/01-rl/metrics.jsonl").exists()
