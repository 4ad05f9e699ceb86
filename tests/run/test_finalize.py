"""Results of an evaluation are kept for the problems as they are asked, wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
