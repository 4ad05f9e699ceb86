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


# Right answers that are another form of the gold one: where the question has it, it is a copy.
REWRITTEN = {
    "1 1/2", "1.5\u00d710\u207b\u2074", "10^6", r"\frac{4}{6}", "2^{-10}", r"\frac{1}{2^{10}}",
    r"2\sqrt{2}", r"\frac{1}{\sqrt{2}}", "4^{50}", r"1\times 10^{-15}", "(x-1)(x+1)", "3^0.5",
    "3^(1/2)", r"\exp(2)", r"\frac{1}{2} hour", "y - 2x = 1", "2x - y + 1 = 0", "(R - r)(R + r)",
}  # fmt: skip


@pytest.mark.parametrize(("gold", "response"), RIGHT)
def test_right_answers_that_the_question_has_too_are_correct(gold, response):
    question = f"Here is one of them: {response} Which is the other?"
    expected = "wrong" if response in REWRITTEN else "correct"
    assert status(gold, response, question=question) == expected


@pytest.mark.parametrize(
    ("question", "gold", "response", "verdict"),
    [
        ("It rains with probability 1/2.", r"\frac{1}{2}", "1/2", "correct"),
        (r"It rains with probability $\frac{1}{2}$.", "1/2", r"\boxed{\frac12}", "correct"),
        ("He has 11/25 of it.", r"\frac{1}{2}", "1/2", "correct"),
        ("He has 11/25 of it.", "0.5", "1/2", "correct"),
        ("He has 13/26 and 3/264.", "1/88", "3/264", "wrong"),
        ("Write 1/2 as a decimal.", "0.5", r"\frac{1}{2}", "wrong"),
        (r"Reduce $\frac{12}{18}$.", "2/3", "12/18", "wrong"),
        (r"Reduce $\frac{12}{18}$.", "2/3", "2/3", "correct"),
        (r"Write $1\frac{1}{2}$ as one fraction.", "3/2", "1 1/2", "wrong"),
        (r"Write $1\frac{1}{2}$ again.", r"1\frac{1}{2}", "1 1/2", "correct"),
        ("A right angle has 90\u00b0.", "90", r"90^\circ", "correct"),
        (r"One has 12 cm$^2$.", "12", r"12\text{ cm}^2", "correct"),
        (r"One has $12\pi$.", r"12\pi", r"12\pi \text{ cm}^2", "correct"),
        ("What is 3 * 10^4?", "30000", r"3 \times 10^4", "wrong"),
    ],
)
def test_a_fraction_that_is_the_answer_is_no_copy(question, gold, response, verdict):
    assert status(gold, response, question=question) == verdict


CHOSEN = r"\boxed{\textbf{(%s)}\ %s}"


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("C", CHOSEN % ("C", 5), "correct"),
        ("C", CHOSEN % ("B", 5), "wrong"),
        ("5", CHOSEN % ("C", 5), "correct"),
        ("5", CHOSEN % ("C", 6), "wrong"),
        ("5", CHOSEN % ("C", "25/5"), "wrong"),
        (r"\textbf{(C)}\ 5", CHOSEN % ("C", 5), "correct"),
        (r"\textbf{(C)}\ 5", CHOSEN % ("B", 5), "wrong"),
        (r"\textbf{(C)}\ 5", CHOSEN % ("C", 6), "wrong"),
        (r"\textbf{(C)}\ 5", "C", "correct"),
        (r"\textbf{(C)}\ 5", "5", "correct"),
        (r"\textbf{(C)}\ 5", "B", "wrong"),
        (r"2\sqrt{3}", r"The answer is $\textbf{(D) } 2\sqrt{3}$.", "correct"),
        ("C", "(C) Tuesday", "correct"),
        ("C", "(C) B", "wrong"),
        ("C", "(C) (B)", "wrong"),
        ("C", "(C) 5 or 6", "wrong"),
        ("C", "(C) 5, (D) 6", "wrong"),
        ("C", "(C) is wrong", "wrong"),
        ("C", "(C) 5?", "wrong"),
        ("5", r"\boxed{(A)\ 4\ (B)\ 5}", "wrong"),
        ("7", "(5) 7", "wrong"),
    ],
)
def test_the_letter_of_a_choice_may_stand_before_its_value(gold, response, verdict):
    assert status(gold, response) == verdict
    value = response.partition("\\ ")[2] if response.startswith("\\boxed{\\textbf") else ""
    if gold == "C" and value:
        row = {"answer": gold, "choices": [r"\textbf{(A)}\ 3", "4", "5"]}
        graded = REWARDS["logic"](row, format_completion("r", response))
        assert graded.status == verdict


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("What percent of 40 is 10?", True),
        ("By what percent did it grow?", True),
        ("What is the percent increase from 40 to 50?", True),
        ("Find the percentage of red marbles.", True),
        ("What share is left? Write it as a percentage.", True),
        (r"If $x\%$ of 40 is 10, what is $x$?", True),
        ("How large is it, to the nearest percent?", True),
        ("What is the annual interest rate?", True),
        ("10\u662f40\u7684\u767e\u5206\u4e4b\u51e0?", True),
        ("\u51fa\u52e4\u7387\u662f\u591a\u5c11?", True),
        ("A $30 shirt is 20% off; what is the price?", False),
        ("A $30 shirt is 20 percent off. What is the price?", False),
        (r"What is $20\%$ of 50?", False),
        ("What is twenty percent of 50?", False),
        ("The price falls by half a percent. What is it?", False),
        ("The percentage of boys is 40. How many of 60 are boys?", False),
        ("\u964d\u4ef7\u767e\u5206\u4e4b\u4e8c\u5341\u540e\u662f\u591a\u5c11?", False),
    ],
)
def test_a_percent_sign_may_be_added_where_the_question_asks_for_a_percentage(question, asks):
    expected = "correct" if asks else "wrong"
    assert status("24", r"24\%", question=question) == expected
    assert status("24%", "24", question=question) == expected
    assert status("24", "24", question=question) == "correct"


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
