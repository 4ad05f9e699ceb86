"""Reward models: their loss and gradient, their stage, what they refuse, and what reads them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import yaml
from pydantic import ValidationError

from ernie_train.cli.main import main
from ernie_train.io.safetensors import TensorFiles
from ernie_train.rl import reward_stage
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.preference_data import TokenizedPair
from ernie_train.rl.reward_model import (
    PairBatch,
    RewardLoss,
    RewardModel,
    ScoreSpread,
    whole_conversation,
)
from ernie_train.rl.reward_stage import RewardModelConfig
from ernie_train.train.trainer import Trainer
from ernie_train.weights import load_pretrained
from tests.small_models import make_model
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows


def make_pairs(count: int = 4, seed: int = 0) -> tuple[TokenizedPair, ...]:
    rng = np.random.default_rng(seed)

    def side() -> TokenizedCompletion:
        prompt, completion = (rng.integers(3, 90, rng.integers(1, 9)).tolist() for _ in range(2))
        return TokenizedCompletion(prompt, completion)

    return tuple(TokenizedPair(side(), side(), float(rng.random())) for _ in range(count))


def make_reward_model(**keys: Any) -> RewardModel:
    model = RewardModel(make_model(**keys))
    values = np.random.default_rng(3).normal(0, 0.3, model.value_head.weight.shape)
    model.value_head.weight.set_value(values.astype(np.float32))
    model.train()
    return model


def last_hidden(model: RewardModel, side: TokenizedCompletion) -> np.ndarray:
    """The hidden state of a conversation's last token, in a pass of its own."""
    ids = paddle.to_tensor([side.prompt_ids + side.completion_ids])
    return model.model(ids).hidden[-1].numpy().astype(np.float64)


def test_the_loss_and_the_heads_gradient_have_their_closed_form() -> None:
    """Scores of the last tokens, whatever shares the micro-batch, in float64."""
    model, pairs, coef = make_reward_model(), make_pairs(), 0.3
    output = RewardLoss(coef)(model, PairBatch(pairs))
    head = model.value_head.weight.numpy().astype(np.float64)[:, 0]
    chosen = np.stack([last_hidden(model, pair.chosen) for pair in pairs])
    rejected = np.stack([last_hidden(model, pair.rejected) for pair in pairs])
    gap = (chosen - rejected) @ head - np.array([pair.margin for pair in pairs])
    centre = (chosen + rejected) @ head
    terms = {term.name: term for term in output.terms}
    assert float(terms["loss"].sum) == pytest.approx(np.log1p(np.exp(-gap)).sum(), rel=1e-5)
    assert float(terms["centering"].sum) == pytest.approx((centre**2).sum(), rel=1e-4)
    assert {name: (t.count, t.coef) for name, t in terms.items()} == {
        "loss": (4.0, 1.0), "centering": (4.0, coef)
    }  # fmt: skip
    accuracy = ((chosen - rejected) @ head > 0).mean()
    assert output.metrics["accuracy"].value == pytest.approx(accuracy)
    sum(term.sum * term.coef for term in output.terms).backward()
    pull = -1 / (1 + np.exp(gap))
    expected = pull @ (chosen - rejected) + coef * 2 * centre @ (chosen + rejected)
    np.testing.assert_allclose(
        model.value_head.weight.grad.numpy()[:, 0], expected, rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("keys", [{}, {"moe_num_experts": 0}], ids=["moe", "dense"])
def test_the_gradient_is_the_slope_of_the_loss(keys: dict[str, Any]) -> None:
    """Central differences along the gradient itself, where they are largest."""
    model, batch, loss = make_reward_model(**keys), PairBatch(make_pairs()), RewardLoss(0.1)

    def value() -> float:
        return sum(float(term.sum) * term.coef for term in loss(model, batch).terms)

    sum(term.sum * term.coef for term in loss(model, batch).terms).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    slopes = [p.grad.numpy() for p in trained]
    norm = np.sqrt(sum((slope.astype(np.float64) ** 2).sum() for slope in slopes))
    before, found = [p.numpy() for p in trained], []
    for step in (1e-3, -1e-3):
        for parameter, old, slope in zip(trained, before, slopes, strict=True):
            parameter.set_value(old + (step / norm) * slope)
        found.append(value())
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(norm, rel=2e-2)


def test_padding_and_company_change_no_score() -> None:
    model = make_reward_model()
    sides = [side for pair in make_pairs(5) for side in pair.completions]
    together = reward_stage.sequence_values(
        model, [whole_conversation(side) for side in sides], batch_size=4
    )
    head = model.value_head.weight.numpy()[:, 0]
    alone = [last_hidden(model, side) @ head for side in sides]
    np.testing.assert_allclose(np.concatenate(together), alone, rtol=1e-4, atol=1e-5)


def test_the_spread_is_that_of_the_latest_steps() -> None:
    spread = ScoreSpread()
    assert (spread.mean, spread.std) == (0.0, 0.0)
    for _ in range(3):
        spread.add(2.0, 2.0**2 + 0.5**2)
    assert (spread.mean, spread.std) == (pytest.approx(2.0), pytest.approx(0.5))
    for _ in range(200):
        spread.add(-1.0, 1.0)
    assert (spread.mean, spread.std) == (
        pytest.approx(-1.0, abs=1e-3),
        pytest.approx(0.0, abs=0.02),
    )


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
        ({"checkpoint": {"best_metric": "reward"}}, "best_metric=reward is none of"),
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
