"""Gates between stages: they stop with exit status 5 and keep what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.core.errors import GateError
from ernie_train.eval.gates import check_gate
from ernie_train.train.stage import Gate
from tests.workspace import make_workspace, rows, write_rows


def evaluation(**accuracies: float) -> dict:
    return {
        "mean_accuracy": sum(accuracies.values()) / len(accuracies),
        "domains": {d: {"accuracy": a, "baseline": 0.0} for d, a in accuracies.items()},
        "tasks": [{"task": f"{d}_task", "accuracy": a} for d, a in accuracies.items()],
    }


def test_a_gate_looks_at_its_metric_alone():
    gate = Gate(metric="eval/logic", at_least=0.6)
    check_gate(gate, "rl", evaluation(logic=0.6, math=0.1), None)
    with pytest.raises(GateError, match=r"eval/logic is 0\.590, the gate asks for 0\.6"):
        check_gate(gate, "rl", evaluation(logic=0.59, math=0.9), None)
    check_gate(Gate(metric="eval/mean", at_least=0.5), "rl", evaluation(a=0.4, b=0.6), None)
    check_gate(Gate(metric="eval/a_task", at_least=0.4), "rl", evaluation(a=0.4, b=0.0), None)


def test_a_domain_must_not_fall_by_more_than_the_bound():
    gate = Gate(metric="eval/logic", at_least=0.0, max_regression=0.05)
    before = evaluation(logic=0.5, math=0.8)
    check_gate(gate, "rl", evaluation(logic=0.9, math=0.76), before)
    with pytest.raises(GateError, match=r"eval/math fell from 0\.800 to 0\.740"):
        check_gate(gate, "rl", evaluation(logic=0.9, math=0.74), before)


def test_domains_that_came_or_went_with_the_problems():
    """A new domain has not fallen; one that is gone may have, and nobody can tell."""
    gate = Gate(metric="eval/logic", at_least=0.0, max_regression=0.05)
    before = evaluation(logic=0.5, math=0.8)
    check_gate(gate, "rl", evaluation(logic=0.9, math=0.8, code=0.0), before)
    with pytest.raises(GateError, match="eval/math was measured before the stage alone"):
        check_gate(gate, "rl", evaluation(logic=0.9, code=0.0), before)
    check_gate(Gate(metric="eval/logic", at_least=0.0), "rl", evaluation(logic=0.9), before)


@pytest.fixture(autouse=True)
def _own_reader(monkeypatch):
    """Exports are read back by this toolkit alone: test_export lets transformers do it."""
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gates")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    first = {**recipe["stages"][0], "steps": 2, "validate_every_steps": None, "validation": []}
    first["checkpoint"] = {"every_steps": 100}
    recipe["stages"] = [first, {**first, "name": "more"}]
    recipe["evaluation"] |= {"after_each_stage": True, "untrained_examples": 0, "max_examples": 5}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def test_a_stage_that_misses_its_gate_stops_the_pipeline_until_the_gate_changes(
    workspace, tmp_path, capsys
):
    recipe = workspace / "recipe.yaml"
    directory = tmp_path / "run"
    gate = "stages.0.gate={metric: eval/math, at_least: 0.9}"
    for _ in range(2):  # asking again changes nothing
        assert run("run", recipe, "--run-dir", directory, gate) == 5
        err = " ".join(capsys.readouterr().err.split())
        assert "stage sft does not pass its gate: eval/math is 0.000" in err
    assert (directory / "01-sft/DONE").exists()
    assert not (directory / "02-more").exists()
    kept = (directory / "01-sft/evaluation.json").read_bytes()
    assert run("run", recipe, "--run-dir", directory) == 0
    assert (directory / "01-sft/evaluation.json").read_bytes() == kept, "it is not solved again"
    out = " ".join(capsys.readouterr().out.split())
    assert "sft more last stage" in out
    last = json.loads((directory / "02-more/evaluation.json").read_text())
    final = json.loads((directory / "evaluation.json").read_text())
    assert final["trained"] == last["trained"], "the last stage's problems are not solved twice"


def test_new_problems_under_the_same_path_are_solved_and_moved_ones_are_not(workspace, tmp_path):
    recipe, directory = workspace / "recipe.yaml", tmp_path / "run"
    problems = tmp_path / "problems.jsonl"
    write_rows(problems, rows(6, seed=8))
    at = f"evaluation.path={problems}"
    gated = "stages.1.gate={metric: eval/product, at_least: 0.0}"
    assert run("run", recipe, "--run-dir", directory, at) == 0
    files = ["01-sft/evaluation.json", "02-more/evaluation.json", "evaluation.json"]
    before = [(directory / name).read_bytes() for name in files]
    moved = problems.rename(tmp_path / "moved.jsonl")
    assert run("run", recipe, "--run-dir", directory, f"evaluation.path={moved}") == 0
    assert [(directory / name).read_bytes() for name in files] == before
    write_rows(problems, [{**row, "task": "product"} for row in rows(9, seed=9)])
    assert run("run", recipe, "--run-dir", directory, at, gated) == 0
    for name in files:
        (task,) = json.loads((directory / name).read_text())["trained"]["tasks"]
        assert (task["task"], task["problems"]) == ("product", 5), name
    assert "| math | product | 5 |" in (directory / "export/README.md").read_text()
    samples = (directory / "evaluation_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in samples] == ["product"] * 5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.0.gate={metric: eval/maths, at_least: 0.9}",
         "stages.0.gate.metric=eval/maths: never produced; there are eval/math, eval/mean"),
        ("stages.0.gate={metric: loss, at_least: 0.9}", "stages.0.gate.metric"),
        ("stages.0.gate={metric: eval/math, at_least: 0.1, max_regression: 0.1}",
         "no stage comes before the first"),
        ("stages.1.gate={metric: eval/math, at_least: 1.1}", "stages.1.gate.at_least"),
    ],
)  # fmt: skip
def test_gates_that_cannot_work_are_refused(workspace, capsys, override, says):
    assert run("check", workspace / "recipe.yaml", override) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_gate_needs_an_evaluation_after_each_stage(workspace, capsys):
    arguments = ("stages.1.gate={metric: eval/math, at_least: 0.1}",
                 "evaluation.after_each_stage=false")  # fmt: skip
    assert run("check", workspace / "recipe.yaml", *arguments) == 2
    assert "set evaluation.after_each_stage: true" in " ".join(capsys.readouterr().err.split())
