"""Results of an evaluation are kept for the problems as they are asked, wherever they lie."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from ernie_train.eval.evaluation import EvalConfig, Evaluation
from ernie_train.run import finalize
from ernie_train.run.finalize import evaluation_identity
from ernie_train.run.lineage import Lineage
from ernie_train.run.recipe import EvaluationConfig
from tests.workspace import rows, write_rows

LINEAGE = Lineage(seed="1", model="m", tokenizer="t")


def identity(path: Path, lineage: Lineage = LINEAGE, **settings: Any) -> str:
    return evaluation_identity(EvaluationConfig(path=str(path), **settings), lineage)


def test_the_problems_count_and_not_their_place(tmp_path: Path) -> None:
    problems = tmp_path / "a.jsonl"
    write_rows(problems, rows(3, 1))
    before = identity(problems)
    assert identity(tmp_path / "*.jsonl") == identity(tmp_path) == before
    assert identity(problems.rename(tmp_path / "b.jsonl")) == before
    assert identity(tmp_path, max_new_tokens=7) != before
    assert identity(tmp_path, LINEAGE.after("sft", {"steps": 2})) != before
    for changed in ("answer", "task", "domain"):
        write_rows(tmp_path / "b.jsonl", [{**row, changed: "7"} for row in rows(3, 1)])
        assert identity(tmp_path) != before, changed
    write_rows(tmp_path / "b.jsonl", rows(4, 1))
    assert identity(tmp_path) != before


def test_a_task_that_is_the_files_name_moves_with_it(tmp_path: Path) -> None:
    problems = tmp_path / "a.jsonl"
    unnamed = [{k: v for k, v in row.items() if k != "task"} for row in rows(3, 1)]
    write_rows(problems, unnamed)
    before = identity(problems)
    assert identity(problems.rename(tmp_path / "b.jsonl")) != before


def test_columns_count_by_what_they_make_of_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{**row, "other": "9"} for row in rows(3, 1)])
    before = identity(tmp_path)
    assert identity(tmp_path, columns={"answer": "other"}) != before
    assert identity(tmp_path, columns={"answer": "answer"}) == before


def test_what_the_files_of_tools_hold_counts(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(3, 1))
    file = tmp_path / "tools.py"
    file.write_text("# one")
    tools = {"tools": ["calculator", {"python": str(file)}]}
    before = identity(tmp_path / "a.jsonl", environment=tools)
    assert identity(tmp_path / "a.jsonl", environment=tools) == before
    file.write_text("# another")
    assert identity(tmp_path / "a.jsonl", environment=tools) != before


def test_samples_and_examples_count_and_their_defaults_do_not(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", rows(3, 1))
    write_rows(tmp_path / "b.jsonl", rows(3, 2))
    data, before = tmp_path / "a.jsonl", identity(tmp_path / "a.jsonl")
    assert identity(data, samples=1, temperature=0.0, k=[]) == before
    sampled = identity(data, samples=4, temperature=1.0)
    shown = identity(data, few_shot=str(tmp_path / "b.jsonl"), shots=2)
    more = identity(data, few_shot=str(tmp_path / "b.jsonl"), shots=3)
    with_k = identity(data, samples=4, temperature=1.0, k=[2])
    assert len({before, sampled, with_k, shown, more}) == 5
    write_rows(tmp_path / "b.jsonl", rows(3, 4))
    assert identity(data, few_shot=str(tmp_path / "b.jsonl"), shots=2) != shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "samples above 1 need a temperature"),
        ({"k": [2]}, r"k=2: pass@k needs 1 to samples=1"),
        ({"shots": 2}, "shots needs few_shot"),
    ],
)
def test_settings_of_samples_and_examples_that_do_not_fit(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig(path="a.jsonl", **changes)


def test_the_recipes_evaluation_samples_behind_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "a.jsonl", rows(3, 1))
    write_rows(tmp_path / "b.jsonl", rows(9, 2))
    asked: dict[str, Any] = {}

    def evaluate(
        model: Any, tokenizer: Any, problems: Any, config: EvalConfig, **options: Any
    ) -> Evaluation:
        asked.update(options, config=config)
        return Evaluation([], [])

    monkeypatch.setattr(finalize, "evaluate", evaluate)
    settings = EvaluationConfig(
        path=str(tmp_path / "a.jsonl"), samples=8, temperature=0.7, k=[2, 4],
        few_shot=str(tmp_path / "b.jsonl"), shots=3,
    )  # fmt: skip
    nothing: Any = None
    recipe: Any = SimpleNamespace(seed=5)
    finalizer = finalize.Finalizer(recipe, tmp_path, nothing, nothing, nothing, nothing)
    finalizer._solve(settings, nothing, None, "problems")
    assert asked["config"] == EvalConfig(None, 256, 8, 0.7, 5, (2, 4))
    assert asked["few_shot"].shots == 3 and len(asked["few_shot"].examples) == 9
    finalizer._solve(EvaluationConfig(path=settings.path), nothing, None, "problems")
    assert asked["config"] == EvalConfig(seed=5) and asked["few_shot"] is None
