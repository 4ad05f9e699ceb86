"""What an RL or DPO stage leaves out of its data for its length is told loudly, with the fix."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ernie_train.cli.score import read_rows
from ernie_train.core.errors import DataError
from ernie_train.data import Tokenizer, load_tokenizer
from ernie_train.io.run_dir import read_done
from ernie_train.rl import data as rl_data
from ernie_train.rl import loop, pair_stage
from ernie_train.rl.config import RolloutConfig, UpoConfig
from ernie_train.rl.dpo import DpoConfig
from ernie_train.rl.report import HealthWarnings
from ernie_train.run.recipe import recorded_recipe
from ernie_train.train.stage import StageData
from ernie_train.weights.model_directory import find_model
from tests.rl.upo_stages import run_stage
from tests.rl.upo_stages import stage as upo_stage
from tests.workspace import make_workspace, rows, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lengths")
    make_workspace(root)
    pairs = [
        {"prompt": f"What is {a} + 1?", "chosen": f"{a + 1}. " * words, "rejected": "none"}
        for a, words in enumerate([1, 1, 30, 40, 50])
    ]
    write_rows(root / "pairs.jsonl", pairs)
    prompts = rows(6, 1)
    for number, row in enumerate(prompts):
        question = row["messages"][0]["content"]
        row["messages"] = [{"role": "user", "content": question * (40 if number < 2 else 1)}]
    write_rows(root / "prompts.jsonl", prompts)
    (root / "reward.py").write_text("def score(row, completion):\n    return 1.0\n")
    return root


def stage_data(root: Path) -> StageData:
    tokenizer: Tokenizer = load_tokenizer(root / "tokenizer")
    return StageData(root, tokenizer, 0)


def printed(report: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=500, force_terminal=True, color_system="standard").print(
        report.as_table()
    )
    return text.getvalue()


def dpo_config(**changes: Any) -> DpoConfig:
    values = {
        "name": "d", "kind": "dpo", "data": "pairs.jsonl", "seq_len": 60, "steps": 1,
        "pairs_per_step": 1, "micro_batch_size": 2, "optim": {"lr": 1e-3},
    } | changes  # fmt: skip
    return DpoConfig(**values)


def test_pairs_that_are_too_long_are_told_with_the_fix(root):
    data = stage_data(root)
    found = printed(pair_stage.prepare(dpo_config(), data).report)
    assert (
        "3 of 5 pairs of pairs.jsonl are longer than seq_len=60 and left out; the longest" in found
    )
    assert "tokens: raise it, or shorten them" in found
    assert "\x1b[1;33m3 of 5 pairs" in found, "it stands out"
    assert "left out" not in printed(pair_stage.prepare(dpo_config(seq_len=256), data).report)
    with pytest.raises(DataError, match=r"none of 5 pairs fits .* the shortest pair needs \d+\)"):
        pair_stage.prepare(dpo_config(seq_len=4), data)


def test_prompts_and_pairs_of_an_rl_stage_too(root):
    offline = {"path": "pairs.jsonl", "per_iteration": 1}
    changes = {"preference": {"coef": 0.1, "pairs": "offline", "offline": offline}}
    config = UpoConfig(**upo_stage(root, rollout={"max_new_tokens": 30}, **changes))
    found = printed(rl_data.prepare(config, stage_data(root)).report)
    assert "2 of 6 prompts of" in found and "longer than rollout.max_prompt_tokens=64" in found
    assert "3 of 5 pairs of pairs.jsonl are longer than rollout.max_prompt_tokens=64 or" in found


def test_problems_that_are_held_out_are_not_asked_in_training(root, caplog):
    asked = [row["messages"][0]["content"] for row in read_rows(root / "prompts.jsonl")]
    held = [{"prompt": f" {q}", "system": "Be brief.", "answer": "other"} for q in asked[3:5]]
    write_rows(root / "held.jsonl", held)

    def questions(**entry: Any) -> list[str]:
        source = {"path": "prompts.jsonl", **entry}
        config = UpoConfig(**upo_stage(root, data=[source], rollout={"max_prompt_tokens": 2000}))
        assert set(config.paths()) >= {"prompts.jsonl", *filter(None, [entry.get("without")])}
        prompts = rl_data.prepare(config, stage_data(root)).prompts
        return [prompt.record.messages[0]["content"] for prompt in prompts]

    assert questions() == asked and "held out" not in caplog.text
    assert questions(without="held.jsonl") == [*asked[:3], asked[5]]
    assert f"prompts.jsonl: 2 held out in {root / 'held.jsonl'}" in caplog.text
    with pytest.raises(DataError, match=r"prompts\.jsonl: no problem is left: every row is held"):
        questions(without="prompts.jsonl")
    with pytest.raises(DataError, match="lacks instruction"):
        questions(format="alpaca")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "or punish truncation (rollout.truncated: punish with a truncation_penalty)"),
        ({"truncated": "punish", "truncation_penalty": 0.5}, "or rollout.truncation_penalty"),
        ({"truncated": "mask"}, "they are left out (rollout.truncated: mask)"),
        (
            {"truncated": "ramp", "truncation_penalty": 0.5, "overlong_tokens": 2},
            ", rollout.overlong_tokens or rollout.truncation_penalty",
        ),
    ],
)
def test_the_remedy_for_cut_completions_fits_the_setting(settings, remedy):
    told: list[str] = []
    warnings = HealthWarnings(RolloutConfig(max_new_tokens=4, **settings), told.append)
    warnings.check({"completions/truncated": 0.5})
    (line,) = told
    assert line.startswith(
        "warning: 50% of the completions are cut off: raise rollout.max_new_tokens"
    )
    assert remedy in line


def test_recipes_that_an_earlier_version_resolved_still_open(root, tmp_path):
    import yaml

    policy = {"clip_ratio": 0.2, "minibatches": 1}  # its default, which had no effect
    rollout = {"truncated": "punish", "truncation_penalty": 0.0}
    stage = upo_stage(root, rollout=rollout, policy=policy)
    recipe = yaml.safe_load((root / "recipe.yaml").read_text()) | {"stages": [stage]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = recorded_recipe(tmp_path)
    assert found is not None and isinstance(found.stages[0], UpoConfig)
    assert found.stages[0].rollout.truncated == "keep"


HELD_OUT = {"path": "test.jsonl", "every_iterations": 2}


@pytest.mark.parametrize(
    ("checkpoint", "samples", "says"),
    [
        (
            {"best_metric": "eval/maths"},
            1,
            "'eval/maths' is not measured in stage rl, only",
        ),
        ({"best_metric": "eval/sum/pass@4"}, 1, "not measured"),
        ({"best_metric": "eval/sum/pass@4", "every_steps": 3}, 4, "a multiple of evaluation.every"),
        ({"best_metric": "eval/sum/pass@4"}, 4, None),
        ({"best_metric": "eval/math"}, 1, None),
    ],
)
def test_a_best_metric_must_be_measured_at_checkpoints(root, checkpoint, samples, says):
    evaluation = {**HELD_OUT, "samples": samples, "temperature": float(samples > 1)}
    settings = {"every_steps": 2, **checkpoint}
    found = nullcontext() if says is None else pytest.raises(Exception, match=says)
    with found:
        config = UpoConfig(**upo_stage(root, checkpoint=settings, evaluation=evaluation))
        rl_data.prepare(config, stage_data(root))


@pytest.mark.parametrize(
    ("accuracies", "patience", "result"),
    [
        ([0.1, 0.5, 0.3], None, {"steps": 6, "checkpoint": "step_000004"}),
        ([0.5, 0.3], 1, {"steps": 4, "checkpoint": "step_000002"}),
    ],
)
def test_the_best_iteration_is_handed_on(
    root, tmp_path, monkeypatch, capsys, accuracies, patience, result
):
    left = iter(accuracies)
    monkeypatch.setattr(loop, "evaluate_held_out", lambda *given: {"eval/math": next(left)})
    (root / "reward.py").write_text(
        "def score(row, completion):\n    return float(len(completion) % 2)\n"
    )
    best = {"best_metric": "eval/math", "load_best_at_end": True, "every_steps": 2, "keep_last": 1}
    best["early_stopping_patience"] = patience
    evaluation = {**HELD_OUT, "path": str(root / "test.jsonl")}
    changes = {"iterations": 6, "checkpoint": best, "evaluation": evaluation}
    assert run_stage(root, tmp_path / "run", **changes) == 0
    done = read_done(tmp_path / "run/01-rl")
    assert done is not None and done.result == result
    assert find_model(tmp_path / "run").weights.name == result["checkpoint"]
    told = "the stage ends after step 4 of 6" in " ".join(capsys.readouterr().out.split())
    assert told == (patience is not None)


def test_pairs_that_outweigh_the_policy_are_told_with_the_remedy():
    told: list[str] = []
    warnings = HealthWarnings(RolloutConfig(max_new_tokens=4), told.append)
    warnings.check({"preference/norm_ratio": 0.9})
    assert not told
    warnings.check({"preference/norm_ratio": 12.0})
    (line,) = told
    assert "12.0 times that of the policy term" in line and "lower preference.coef" in line


@pytest.mark.parametrize("foreign", [6.5, "EASY", True, [1], float("nan")])
def test_a_difficulty_of_another_kind_is_refused_by_a_curriculum_alone(tmp_path, root, foreign):
    made = [{"prompt": f"{n} + 1?", "difficulty": 2.0 if n else foreign} for n in range(3)]
    write_rows(tmp_path / "prompts.jsonl", made)
    stage = upo_stage(root, data=[{"path": str(tmp_path / "prompts.jsonl")}])
    prepared = rl_data.prepare(UpoConfig(**stage), stage_data(root))
    assert [prompt.difficulty for prompt in prepared.prompts] == [1, 2, 2]
    assert prepared.report.sources[0]["tasks"]["prompts"]["difficulties"] == {"2": 2}
    config = UpoConfig(**{**stage, "curriculum": {"start": 2}})
    with pytest.raises(DataError, match=r"jsonl:1: curriculum .*: {value: 1}} gives all its rows"):
        rl_data.prepare(config, stage_data(root))
