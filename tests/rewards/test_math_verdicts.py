"""Verdicts on mathematical answers: the table of styles, copied questions, hostile expressions."""

import json
import re
import time
from pathlib import Path

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import REWARDS
from tests.rewards.right_math_answers import RIGHT
from tests.rewards.wrong_math_answers import WRONG

DATA = Path(__file__).parents[2] / "data"


def status(gold, response, **row):
    return REWARDS["math"]({"answer": gold, **row}, format_completion("r", response)).status


@pytest.mark.parametrize(("gold", "response"), RIGHT)
def test_right_answers_of_every_style_are_correct(gold, response):
    assert status(gold, response) == "correct"


@pytest.mark.parametrize(("gold", "response"), WRONG)
def test_what_is_no_answer_or_another_one_is_wrong(gold, response):
    assert status(gold, response) == "wrong"


@pytest.mark.parametrize("gold", sorted({g for g, _ in RIGHT + WRONG if "boxed" not in g}))
def test_every_gold_answer_equals_itself(gold):
    assert status(gold, gold) == "correct"
    assert status(gold, f"Thus the answer is \\boxed{{{gold}}}.") == "correct"


def problems():
    """Return some rows of every generated task, with their fields for verifiers."""
    tasks = {}
    for name in ("math", "logic", "science"):
        for folder in ("test", "hard"):
            for line in (DATA / folder / f"{name}.jsonl").read_text().splitlines():
                row = json.loads(line)
                tasks.setdefault(row["task"], []).append(row)
    return [(task, rows[:40]) for task, rows in sorted(tasks.items())]


def copied(question):
    """Return what may be copied from a question that is more than one number."""
    parts = [
        question,
        *re.split(r"[:?.]\s", question),
        *re.findall(r"[\d(a-z][-+*/\d() a-z=]*", question),
    ]
    texts = {part.strip(" =.?") for part in parts}
    return sorted(text for text in texts if re.search(r"[-+*/=]", text[1:]) or len(text) > 40)


@pytest.mark.parametrize(("task", "rows"), problems(), ids=lambda value: str(value)[:20])
def test_a_copied_question_is_no_answer(task, rows):
    for row in rows:
        for text in copied(row["messages"][0]["content"]):
            for said in (text, f"\\boxed{{{text}}}", f"The answer is {text}.", f"x = {text}"):
                for question in (row, {**row, "messages": []}):
                    score = REWARDS[row["reward"]](question, format_completion("r", said))
                    assert score.status != "correct", (row["answer"], said)


@pytest.mark.parametrize(("task", "rows"), problems(), ids=lambda value: str(value)[:20])
def test_golds_are_correct_and_other_answers_wrong(task, rows):
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        grade = REWARDS[row["reward"]]
        assert grade(row, format_completion("r", row["answer"])).status == "correct"
        same = other["answer"] == row["answer"]
        verdict = grade(row, format_completion("r", other["answer"]))
        assert verdict.status == ("correct" if same else "wrong")


@pytest.mark.parametrize(
    ("question", "gold", "response", "verdict"),
    [
        ("Simplify $\\sqrt{8}$.", r"2\sqrt{2}", r"\boxed{\sqrt{8}}", "wrong"),
        ("Factor $x^2 - 1$.", "(x-1)(x+1)", "x^2-1", "wrong"),
        ("Expand (x+1)^2.", "x^2+2x+1", "(x + 1)^2", "wrong"),
        ("Reduce 12/18.", "2/3", "12/18", "wrong"),
        ("What is $2^{-10}$?", r"\frac{1}{1024}", "2^{-10}", "wrong"),
        ("Factor $x^2 - 1$.", "(x-1)(x+1)", "(x+1)(x-1)", "correct"),
        ("Which is larger, 3/4 or 2/3?", "3/4", "3/4", "correct"),
        ("What percent of 40 is 10?", "25", "25%", "correct"),
        ("What percent of 40 is 10?", r"25\%", "25", "correct"),
        ("What percent of 40 is 10?", "25", "0.25", "wrong"),
        ("How much is it?", "25", "25%", "wrong"),
    ],
)
def test_the_question_says_what_is_copied_and_what_is_asked(question, gold, response, verdict):
    messages = [{"role": "user", "content": question}]
    assert status(gold, response, messages=messages) == verdict
    assert status(gold, response, question=question) == verdict


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        (r"\sqrt{2}", "9^{9^{9^{9^9}}}"),
        ("x + 1", "(x+1)^{1000000}"),
        (r"\sqrt{2}", "1000000!"),
        ("5", r"\binom{10^9}{10^8}"),
        ("5", "2" * 900),
        ("5", "1e999999999"),
        (r"\sqrt{2}", "(" * 400 + "1" + ")" * 400),
        (r"\pi", r"\frac{1}{" * 100 + "1" + "}" * 100),
        ("5", "0." + "9" * 900),
        (r"\sqrt{2}", "1e400"),
    ],
)
def test_large_expressions_are_wrong_before_they_are_computed(gold, response):
    started = time.monotonic()
    assert status(gold, response) == "wrong"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "unit", ["\\boxed", "\\boxed{", "answer is ", "\\[", "$$", "1,", "x<", "(", "10^"]
)
def test_hostile_repetition_takes_little_time(unit):
    started = time.process_time()
    status("5", unit * (90_000 // len(unit)))
    assert time.process_time() - started < 5
