"""Reward models: their loss and gradient, their stage, what they refuse, and what reads them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from ernie_train.cli.main import main
from ernie_train.core.errors import NonFiniteError, UserError, WeightsError
from ernie_train.data import Record, encode_chat
from ernie_train.io.safetensors import TensorFiles
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring import (
    RewardConfig,
    RewardModelPart,
    RewardPart,
    build_reward,
)
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.config import RolloutConfig
from ernie_train.rl.report import reward_model_metrics
from ernie_train.rl.reward import RewardModelConfig, RewardModelScorer
from ernie_train.rl.reward import stage as reward_stage
from ernie_train.rl.reward.model import (
    RewardModel,
    whole_conversation,
)
from ernie_train.rl.rollout import Rollout
from ernie_train.train.trainer import Trainer
from ernie_train.weights import load_pretrained, save_pretrained
from tests.rl.records import make_scored
from tests.rl.test_reward_model_loss import last_hidden, make_pairs
from tests.small_models import make_model
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows

# ---- the stage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    make_workspace(root)
    made = [
        {"prompt": row["messages"][0]["content"], "margin": 0.1 * (at % 3),
         "chosen": f"<think>\n1 + 1\n</think>\n\n<response>\n{row['answer']}\n</response>",
         "rejected": "<think>\nno idea\n</think>\n\n<response>\nnone\n</response>"}
        for at, row in enumerate(rows(16, 7))
    ]  # fmt: skip
    write_rows(root / "pairs.jsonl", made[:10])
    write_rows(root / "held_out.jsonl", made[10:])
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in made[10:]]
    write_rows(root / "swapped.jsonl", swapped)
    return root


def stage(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "rm", "kind": "reward", "data": str(root / "pairs.jsonl"), "seq_len": 64,
        "steps": 6, "pairs_per_step": 4, "micro_batch_size": 4, "center_coef": 0.01,
        "validation": str(root / "held_out.jsonl"), "validate_every_steps": 3,
        "optim": {"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0},
        "checkpoint": {"every_steps": 100}, **changes,
    }  # fmt: skip


def write_recipe(root: Path, path: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"evaluation": None, "export": None, "stages": list(stages), **changes}
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    path = write_recipe(workspace, workspace / "whole.yaml", stage(workspace))
    assert run("run", path, "--run-dir", workspace / "whole") == 0
    return workspace / "whole"


def files_of(run_dir: Path) -> dict[str, bytes]:
    checkpoint = run_dir / "01-rm/checkpoints/step_000006"
    names = (p for p in checkpoint.rglob("*.safetensors"))
    return {str(p.relative_to(checkpoint)): p.read_bytes() for p in names}


def test_it_learns_to_rank(whole: Path) -> None:
    lines = metrics_without_time(whole, "01-rm")
    margins = [0.1 * (at % 3) for at in range(10)]
    assert lines[0]["loss"] == pytest.approx(np.log1p(np.exp(np.mean(margins))), abs=0.03)
    assert lines[0]["mean_reward"] == 0.0  # the head begins at zeros
    assert lines[-1]["loss"] < 0.5 and lines[-1]["eval/accuracy"] == 1.0
    assert lines[-1]["reward_std"] > 0.3
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    files = set(files_of(whole))
    assert files >= {"model.safetensors", "optimizer.safetensors", "score/model.safetensors"}


@pytest.mark.parametrize("where", ["step", "validation"])
def test_it_continues_to_the_same_bits(
    workspace: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = write_recipe(workspace, tmp_path / "cut.yaml", stage(workspace))
    with monkeypatch.context() as patch:
        owner, name = (
            (Trainer, "train_step") if where == "step" else (reward_stage, "sequence_values")
        )
        original, calls = getattr(owner, name), []

        def stopped(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == (2 if where == "step" else 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        patch.setattr(owner, name, stopped)
        assert run("run", path, "--run-dir", tmp_path / "cut") == 3
    assert len(metrics_without_time(tmp_path / "cut", "01-rm")) == 2
    assert run("run", path, "--run-dir", tmp_path / "cut") == 0
    assert metrics_without_time(tmp_path / "cut", "01-rm") == metrics_without_time(whole, "01-rm")
    assert files_of(tmp_path / "cut") == files_of(whole)


def test_with_lora_the_pairs_and_the_head_alone_are_saved(workspace: Path, tmp_path: Path) -> None:
    lora = stage(workspace, lora={"rank": 4}, optim={"lr": 1e-2, "schedule": "constant"})
    path = write_recipe(workspace, tmp_path / "lora.yaml", lora)
    assert run("run", path, "--run-dir", tmp_path / "lora") == 0
    files = set(files_of(tmp_path / "lora"))
    assert "model.safetensors" not in files
    assert files >= {"adapter_model.safetensors", "score/model.safetensors"}
    lines = metrics_without_time(tmp_path / "lora", "01-rm")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


@pytest.mark.parametrize(("at_least", "status"), [(0.9, 0), (1.0, 0), (0.9, 5)])
def test_a_gate_asks_for_the_accuracy_on_held_out_pairs(
    workspace: Path, tmp_path: Path, at_least: float, status: int, capsys: Any
) -> None:
    gated = stage(workspace, gate={"metric": "eval/accuracy", "at_least": at_least})
    if status:
        gated["validation"] = str(workspace / "swapped.jsonl")
    path = write_recipe(workspace, tmp_path / "gated.yaml", gated)
    for _ in range(2):  # a run that is done says the same
        assert run("run", path, "--run-dir", tmp_path / "gated") == status
    if status:
        assert "eval/accuracy is 0.000, the gate asks for 0.9" in " ".join(
            capsys.readouterr().err.split()
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"micro_batch_size": 1}, "micro_batch_size must be at least 2"),
        ({"validation": None}, "validate_every_steps needs validation pairs"),
        ({"validation": None, "validate_every_steps": None,
          "gate": {"metric": "eval/accuracy", "at_least": 0.5}}, "gate needs validation pairs"),
        ({"gate": {"metric": "eval/math", "at_least": 0.5}}, "gate.metric must be eval/accuracy"),
        ({"gate": {"metric": "eval/accuracy", "at_least": 0.5, "max_regression": 0.1}},
         "max_regression has no effect"),
        ({"checkpoint": {"best_metric": "reward"}}, "'reward' is not measured"),
        ({"checkpoint": {"every_steps": 4, "best_metric": "eval/loss"}}, "must be a multiple of"),
        ({"center_coef": -1.0}, "center_coef"),
        ({"beta": 0.1}, "beta"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RewardModelConfig(**stage(Path("x"), **changes))


def test_a_recipe_of_a_reward_model_has_no_other_stage(
    workspace: Path, tmp_path: Path, capsys: Any
) -> None:
    two = stage(workspace), stage(workspace, name="again")
    assert run("check", write_recipe(workspace, tmp_path / "two.yaml", *two)) == 2
    assert "a reward model is no policy" in " ".join(capsys.readouterr().err.split())
    problems = {"path": str(workspace / "test.jsonl"), "max_new_tokens": 4}
    path = write_recipe(workspace, tmp_path / "e.yaml", two[0], evaluation=problems)
    assert run("check", path) == 2
    assert "scores and solves no problems" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("layers", ["moe", "dense"])
def test_an_export_has_the_scores_in_transformers_too(
    workspace: Path,
    tmp_path: Path,
    referee: Any,
    layers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)  # the scores prove the weights too
    path = write_recipe(
        workspace, tmp_path / "recipe.yaml", stage(workspace, steps=3), export={"dtype": "float32"}
    )
    dense = ["model.moe_num_experts=0"] if layers == "dense" else []
    assert run("run", path, "--run-dir", tmp_path / "run", *dense) == 0
    assert run("export", tmp_path / "run/01-rm", tmp_path / "out", "--dtype", "float32") == 0
    by_run, by_verb = tmp_path / "run/export", tmp_path / "out"
    head = "score/model.safetensors"
    assert (by_run / head).read_bytes() == (by_verb / head).read_bytes()
    conversations = [side.prompt_ids + side.completion_ids
                     for pair in make_pairs(3) for side in pair.completions]  # fmt: skip
    (tmp_path / "ids.json").write_text(json.dumps(conversations))
    referee("reward_scores.py", by_verb, tmp_path / "ids.json", tmp_path / "scores.json")
    model = RewardModel(load_pretrained(by_verb))
    model.load_head(TensorFiles(by_verb / "score", "model"))
    sides = [whole_conversation(TokenizedCompletion(ids, [])) for ids in conversations]
    own = np.concatenate(reward_stage.sequence_values(model, sides, batch_size=4))
    assert np.ptp(own) > 0.01
    theirs = json.loads((tmp_path / "scores.json").read_text())
    np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-5)


def test_the_head_is_stored_as_sequence_classifiers_have_it(whole: Path) -> None:
    stored = TensorFiles(whole / "01-rm/checkpoints/step_000006/score", "model")
    assert {name: stored[name].shape for name in stored} == {
        "score.weight": (1, 32), "score.mean": (1,), "score.std": (1,)
    }  # fmt: skip


# ---- as a reward ---------------------------------------------------------------------------------


ANSWER = "let me see\n</think>\n\n<response>\n{}\n</response>"


def asked(text: str = "What is 2 + 3?", role: str = "user") -> Record:
    return Record("prompt", [{"role": role, "content": text}])


def scorer_of(run_dir: Path, **settings: Any) -> RewardModelScorer:
    part = RewardModelPart(path=run_dir.name, **settings)
    return RewardModelScorer(part, run_dir.parent, "float32")


def scores_of(scorer: RewardModelScorer, *completions: str, **prompt: Any) -> list[Score]:
    count = len(completions)
    return scorer.score(
        [asked(**prompt)] * count, [{}] * count, completions, stop_requested=lambda: False
    )


def test_a_completion_scores_as_the_conversation_that_it_makes(whole: Path) -> None:
    """Rendered by the reward model's own template, whoever wrote it; raw, normalized, clipped."""
    raw = scorer_of(whole, normalize=False, clip=1e6)
    found = scores_of(raw, ANSWER.format(5), ANSWER.format("none"))
    head = raw.model.value_head.weight.numpy()[:, 0]
    for score, answer in zip(found, ("5", "none"), strict=True):
        turn = {"role": "assistant", "content": answer, "reasoning_content": "let me see"}
        ids, _ = encode_chat(raw.tokenizer, [*asked().messages, turn])
        hidden = last_hidden(raw.model, TokenizedCompletion(ids, []))
        assert score.value == pytest.approx(hidden @ head, rel=1e-4)
        assert score.status == ("correct" if score.value > 0 else "wrong")
    assert found[0].value > found[1].value
    normal = scorer_of(whole)
    for before, after in zip(found, scores_of(normal, ANSWER.format(5), ANSWER.format("none")),
                             strict=True):  # fmt: skip
        assert after.value == pytest.approx((before.value - normal.mean) / normal.std, rel=1e-4)
    clipped = scores_of(scorer_of(whole, clip=1e-3), ANSWER.format(5), ANSWER.format("none"))
    assert [score.value for score in clipped] == [1e-3, -1e-3]


def test_what_cannot_be_shown_has_the_lowest_score_and_what_is_no_fault_none(whole: Path) -> None:
    scorer = scorer_of(whole, clip=3.0)
    call = 'x\n</think>\n\n<tool_call>\n{"name": "f", "arguments": [}\n</tool_call>'
    found = scores_of(scorer, "never ends", "x\n</think>\n\nno tags", call, ANSWER.format(5))
    assert [(score.value, score.status) for score in found[:3]] == [(-3.0, "wrong")] * 3
    assert abs(found[3].value) < 3.0
    long = ANSWER.format("1 2 3 " * 300)
    (score,) = scores_of(scorer, long)
    assert score.status == "infrastructure" and "more than the 256" in score.detail
    (score,) = scores_of(scorer, ANSWER.format(5), role="narrator")
    assert score.status == "bad_gold" and "template" in score.detail


def test_a_score_that_is_not_finite_is_refused(whole: Path) -> None:
    scorer = scorer_of(whole)
    scorer.model.value_head.weight.set_value(np.full((32, 1), np.nan, np.float32))
    with pytest.raises(NonFiniteError, match="gave a score of nan"):
        scores_of(scorer, ANSWER.format(5))
    with pytest.raises(WeightsError, match="must hold finite numbers"):
        scorer.model.load_head({"score.weight": np.full((1, 32), np.inf, np.float32)})


def test_a_reward_model_beside_the_tokenizer_of_another_is_refused(
    whole: Path, monkeypatch: Any
) -> None:
    """Its own may differ from the policy's, but the ids must be those of its model."""
    large = SimpleNamespace(vocab_size=99_999)
    monkeypatch.setattr("ernie_train.rl.reward.scoring.load_tokenizer", lambda path: large)
    with pytest.raises(UserError, match="tokenizer of 99999 tokens beside a model of"):
        scorer_of(whole)


def upo(root: Path, reward: Any) -> dict[str, Any]:
    return {
        "name": "rl", "kind": "upo", "data": [{"path": str(root / "test.jsonl")}],
        "reward": reward, "canaries": 0, "iterations": 2, "micro_batch_size": 8,
        "rollout": {"prompts_per_iteration": 4, "group_size": 4, "max_new_tokens": 8,
                    "max_prompt_tokens": 64},
        "optim": {"lr": 1e-2, "schedule": "constant"}, "checkpoint": {"every_steps": 100},
    }  # fmt: skip


def test_a_stage_composes_it_with_a_verifier(workspace: Path, whole: Path, tmp_path: Path) -> None:
    """Completions of an untrained policy never answer: all get the lowest score, the same."""
    model = {"model": {"path": str(whole / "01-rm"), "clip": 2.0}, "weight": 0.5}
    path = write_recipe(workspace, tmp_path / "rl.yaml", upo(workspace, [{"name": "exact"}, model]))
    assert run("run", path, "--run-dir", tmp_path / "rl") == 0
    lines = metrics_without_time(tmp_path / "rl", "01-rl")
    assert [line["reward_part/reward_model"] for line in lines] == [-2.0, -2.0]
    assert [(line["reward"], line["accuracy"]) for line in lines] == [(-1.0, 0.0)] * 2
    assert lines[0]["reward_model/saturated"] == 1.0


def test_another_model_is_no_reward_model(workspace: Path, tmp_path: Path, capsys: Any) -> None:
    save_pretrained(make_model(), tmp_path / "other")
    reward = {"model": {"path": str(tmp_path / "other")}}
    path = write_recipe(workspace, tmp_path / "rl.yaml", upo(workspace, reward))
    assert run("check", path) == 2
    assert "is no reward model: it lacks score/" in " ".join(capsys.readouterr().err.split())


def test_experts_that_ranks_cannot_share_are_refused_before_anything_is_trained(
    workspace: Path, whole: Path, tmp_path: Path, capsys: Any
) -> None:
    """The policy has 4 experts; a dense reward model goes with any degree (test_expert)."""
    made = {name: make_model(moe_num_experts=count) for name, count in (("6", 6), ("0", 0))}
    for name, model in made.items():
        save_pretrained(model, tmp_path / name)
        shutil.copytree(whole / "01-rm/checkpoints/step_000006/score", tmp_path / name / "score")
        shutil.copytree(whole / "tokenizer", tmp_path / name, dirs_exist_ok=True)
    layout = {"parallel": {"expert": 4}}
    for name, status in (("6", 2), ("0", 0)):
        reward = {"model": {"path": str(tmp_path / name)}}
        path = write_recipe(workspace, tmp_path / "rl.yaml", upo(workspace, reward), **layout)
        assert run("check", path) == status
    told = " ".join(capsys.readouterr().err.split())
    assert "stages.0: the reward model" in told
    assert "parallel.expert=4 must divide moe_num_experts=6" in told


def test_metrics_show_spread_saturation_and_the_length_that_scores_go_with() -> None:
    part = RewardPart.model_validate({"model": {"path": "x", "clip": 2.0}})
    values, tokens = [-2.0, -1.0, 1.0, 2.0], [1, 2, 4, 5]
    groups = [[
        make_scored(completion_ids=[3] * n, reward_parts={"reward_model": v}, raw_reward=v)
        for v, n in zip(values, tokens, strict=True)
    ]]  # fmt: skip
    groups.append([make_scored(reward_parts={"audit/exact": 1.0})] * 4)  # judged by another reward
    rollout = Rollout.of(groups, RolloutConfig(max_new_tokens=8))
    assert reward_model_metrics(rollout, [RewardPart(name="exact"), part]) == {
        "reward_model/std": pytest.approx(np.std(values)), "reward_model/saturated": 0.5,
        "reward_model/length_correlation": pytest.approx(1.0),
    }  # fmt: skip
    assert reward_model_metrics(rollout, [RewardPart(name="exact")]) == {}


def test_it_scores_in_stages_alone() -> None:
    reward = build_reward(RewardConfig.model_validate({"model": {"path": "x"}}), Path())
    with pytest.raises(UserError, match="in stages of kind upo alone"):
        reward.score_batch([{}], ["x"])
    given = {"reward_model": [Score(0.5, "correct")]}
    (found,) = reward.score_batch([{}], ["x"], of_models=given).scores
    assert (found.value, found.score.status) == (0.5, "correct")
    reward.close()
