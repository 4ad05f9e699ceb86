"""The tasks of the real model: right solutions, verifiers that tell, splits without overlap."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ernie_train.rewards import REWARDS
from tools.evidence import real_tasks
from tools.evidence.real_tasks import (
    LEVELS,
    TASKS,
    UNSEEN,
    UNSEEN_LEVELS,
    make_rows,
    write_all_levels,
    write_split,
)

ALL_LEVELS = LEVELS | {task: (level,) for task, level in UNSEEN_LEVELS.items()}
LEVEL = {task: levels[1] for task, levels in LEVELS.items()} | UNSEEN_LEVELS


@pytest.mark.parametrize("task", [*TASKS, *UNSEEN])
def test_demonstrations_are_right_and_a_changed_answer_is_wrong(task: str) -> None:
    rows = [row for level in ALL_LEVELS[task] for row in make_rows(task, 12, 4, level)]
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows)
    for row in rows:
        graded = {**row, "completion_format": {"thinking": False}}
        completion = row["messages"][2]["content"]
        assert REWARDS[row["reward"]](graded, completion).status == "correct", row
        other = rows[0]["answer"] if row["answer"] != rows[0]["answer"] else "1000003"
        assert REWARDS[row["reward"]]({**graded, "answer": other}, completion).status == "wrong"


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("sum", "What is {} + {}?", lambda a, b: a + b),
        ("product", "What is {} * {}?", lambda a, b: a * b),
        ("double", "What is twice {}?", lambda a: 2 * a),
    ],
)
def test_answers_are_those_of_the_questions(task, question, answer) -> None:  # type: ignore[no-untyped-def]
    for row in make_rows(task, 20, 7, LEVEL[task]):
        words = row["messages"][1]["content"].removesuffix("?").split()
        numbers = [int(word) for word in words if word.isdigit()]
        assert row["messages"][1]["content"] == question.format(*numbers)
        assert int(row["answer"]) == answer(*numbers)


def test_the_clock_goes_on_over_midnight() -> None:
    class Late(random.Random):
        def randrange(self, *bounds: int) -> int:  # type: ignore[override]
            return range(*bounds)[-1]

    problem = real_tasks.clock(Late(), 60)
    assert problem.question.startswith("It is 23:55. What time is it 55 minutes later?")
    assert problem.answer == "0:50"


def test_splits_share_no_problem_and_depend_on_their_seed(tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "other"))
    taken = write_split(one, 20, 1, LEVEL, ())
    more = write_split(two, 20, 1, LEVEL, taken)
    assert len(taken) == len(more) == 20 * len(LEVEL) and not taken & more
    text = one.read_bytes()
    write_split(one, 20, 1, LEVEL, ())
    assert one.read_bytes() == text
    write_split(other, 20, 2, LEVEL, ())
    assert other.read_bytes() != text
    row = json.loads(one.read_text().splitlines()[0])
    assert (row["task"], row["difficulty"]) == ("sum", LEVEL["sum"])
    with pytest.raises(ValueError, match="product at level 20 has fewer than 200"):
        make_rows("product", 200, 0, 20)


def test_demonstrations_are_of_all_levels(tmp_path: Path) -> None:
    real_tasks.main([str(tmp_path), "--count", "12"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    seen = {(row["task"], row["difficulty"]) for row in rows}
    assert seen == {(task, level) for task, levels in LEVELS.items() for level in levels}
    questions = {row["messages"][1]["content"] for row in rows}
    assert not questions & write_all_levels(tmp_path / "more.jsonl", 12, 0, questions)
