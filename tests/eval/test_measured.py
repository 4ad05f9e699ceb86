"""Where no completion could be scored, no accuracy is shown, and `eval` says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_train.cli.main import main
from ernie_train.core.errors import DataError, ErnieTrainError
from ernie_train.eval.measured import measured, require_scores
from tests.workspace import make_workspace, rows, save_model, write_rows

LOST = {"source": "a.jsonl:1", "status": "bad_gold", "detail": "no answer"}


def task(domain: str, name: str, excluded: int) -> dict[str, Any]:
    return {"domain": domain, "task": name, "accuracy": 0.5, "completions": 4,
            "excluded": {"timeout": excluded}, "estimates": {"pass@1": {}}}  # fmt: skip


def test_a_task_that_none_could_score_has_no_accuracy() -> None:
    tasks = [task("a", "x", 4), task("b", "y", 3)]
    domains = {name: {"accuracy": 0.5, "baseline": 0.1} for name in "ab"}
    found = measured({"tasks": tasks, "domains": domains, "mean_accuracy": 0.25})
    assert [(one["accuracy"], one["estimates"]) for one in found["tasks"]] == [
        (None, {}), (0.5, {"pass@1": {}}),
    ]  # fmt: skip
    assert found["domains"] == {"a": {"accuracy": None, "baseline": 0.1}, "b": domains["b"]}
    assert found["mean_accuracy"] == 0.25
    alone = measured({"tasks": tasks[:1], "domains": {"a": domains["a"]}, "mean_accuracy": 0.5})
    assert alone["mean_accuracy"] is None


def test_rows_without_a_usable_answer_are_a_mistake_in_the_data_and_other_losses_are_none() -> None:
    require_scores([LOST, {**LOST, "status": "wrong"}])
    with pytest.raises(DataError, match=r"2 completions .*2 bad_gold.*a\.jsonl:1: no answer"):
        require_scores([LOST, LOST])
    with pytest.raises(ErnieTrainError, match="1 timeout") as failed:
        require_scores([LOST, {**LOST, "status": "timeout"}])
    assert failed.value.exit_status == 1


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_eval_of_rows_that_cannot_be_scored(tmp_path: Path, capsys: Any, form: Any) -> None:
    make_workspace(tmp_path)
    made = [{"messages": row["messages"], "answer": "three"} for row in rows(2, 3)]
    write_rows(tmp_path / "calls.jsonl", made)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(save_model(tmp_path)), "--data", str(tmp_path / "calls.jsonl"), *form,
              "--columns", "{reward: {value: tool_call}}", "--max-new-tokens", "2"])  # fmt: skip
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert "none of the 2 completions could be scored (2 bad_gold); the first, of" in shown.err
    assert "calls.jsonl:1: neither expected_calls nor an answer that is JSON" in shown.err
    if form:
        found = json.loads(shown.out)["trained"]
        assert found["mean_accuracy"] is None and found["tasks"][0]["accuracy"] is None
        return
    words = [line.split() for line in shown.out.splitlines()]
    assert ["calls", "calls", "2", "-", "100.0", "-", "100.0"] in words
    assert ["mean", "over", "tasks:", "-"] in words
