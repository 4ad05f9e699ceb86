"""reasoning-gym's scorers, every one: hedged, denied and changed answers are wrong."""

import re
from contextlib import suppress
from fractions import Fraction

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.verifiers import logic

# `composite` is made of others; the answers of the rest are None or not known beforehand.
LEFT_OUT = {"composite", "boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# Seconds to find a puzzle that can be solved.
CHEAPER = {"knight_swap": {"impossible_ratio": 1.0}}


def graded(item, response):
    row = {
        "answer": item["answer"],
        "rg_task": item["metadata"]["source_dataset"],
        "rg_entry": item,
    }
    return logic.score(row, format_completion("because", response)).status


def changed(gold, other):
    """Texts that say something else than `gold`, or more; `other` answers another problem."""
    texts = {
        f"{gold} or {other}", f"{other} or {gold}", f"{gold}, not {other}", f"not {gold}, {other}",
        f"{gold}\n{other}", f"{other}\n{gold}", f"{gold} {other}", f"{other} {gold}", f"not {gold}",
        f"It is not {gold}", f"maybe {gold}", f"{gold}?", f"{gold} is wrong", f"{gold} or 0",
        f"0 or {gold}", f"0 {gold}", f"{gold} 0", f"1{gold}", f"{gold}1", f"-{gold}", "0", "1", "-",
        "nan", "inf", "1e999", "nan+nanj", "None", "[]", "{}", "zq vexing", "yes no", other,
    }  # fmt: skip
    with suppress(ValueError):
        texts |= {repr(float(gold) * by) for by in (1.01, 0.99, -1)}
        texts |= {repr(float(gold) + by) for by in (0.001, 0.1, 1)}
    return {text for text in texts if not same(text, gold)}


def same(text, gold):
    if "".join(text.split()).casefold() == "".join(gold.split()).casefold():
        return True
    if text.startswith("-0 "):  # a row of a matrix that begins with nought
        return True
    with suppress(ValueError):
        return abs(Fraction(text) - Fraction(gold)) <= abs(Fraction(gold)) / 10**9
    return False


def test_every_scorer_takes_its_answer_and_nothing_that_says_more_or_less():
    from reasoning_gym.factory import DATASETS, create_dataset

    taken = {}
    for name in sorted(DATASETS.keys() - LEFT_OUT):
        item, other = create_dataset(name, seed=5, size=2, **CHEAPER.get(name, {}))
        item["metadata"]["source_dataset"] = name
        assert graded(item, item["answer"]) == "correct", name
        wrong = changed(item["answer"], other["answer"])
        if hits := [text for text in wrong if graded(item, text) != "wrong"]:
            taken[name] = (item["answer"], hits[:4])
    assert taken == {}


@pytest.mark.parametrize(("task", "gold", "right", "wrong"), [
    ("decimal_arithmetic", "2.980", ["2.98"], ["2.981", "2.97"]),
    ("word_sorting", "a, b, c", ["a,b, c"], ["a, b, c, d", "a, c, b"]),
    ("polynomial_equations", "-3.625, 0.0", ["0, -3.625"], ["-3.625", "0, -3.62", "0"]),
    ("pool_matrix", "4.5 4.5\n4.75 5.0", ["4.50 4.5\n4.75 5"], ["4.5 4.5\n4.75 5.01"]),
    ("number_format", "5,692.88", ["5692.88", "5692.880"], ["5692.87", "5692.9"]),
])  # fmt: skip
def test_words_and_numbers_are_compared_where_no_scorer_is_asked(task, gold, right, wrong):
    item = {"question": "?", "answer": gold, "metadata": {"source_dataset": task}}
    assert {graded(item, text) for text in right} == {"correct"}
    assert {graded(item, text) for text in wrong} == {"wrong"}


def test_numbers_may_be_rounded_to_three_digits_where_the_scorer_says_so():
    item = {"question": "?", "answer": "0.0013674811612376526",
            "metadata": {"source_dataset": "power_function"}}  # fmt: skip
    for text in ("1.37e-3", "0.00137", "0.001367"):
        assert graded(item, text) == "correct", text
    for text in ("1.4e-3", "0.001", "1.38e-3", "-1.37e-3", "0.0013674811612376999", "0"):
        assert graded(item, text) == "wrong", text
    assert re.fullmatch(logic._FORMS["complex_arithmetic"], "-15.0 + 3.0i")
