"""Forms of answers: equal texts for answers that the verifier takes for the same."""

import pytest

from ernie_train.rewards import REWARDS
from ernie_train.rewards.registry import answer_form

PLAIN = {"completion_format": {"thinking": False}}
SAME = {
    "math": [
        ("72", "The answer is 72.", "\\boxed{72}", "144 / 2 = 72\n#### 72", "so x = 72", "$72"),
        ("\\frac{1}{2}", "0.5", "The answer is 2/4", "\\boxed{\\frac12}"),
        ("(1, 2)", "\\boxed{(1,2)}"),
    ],
    "exact": [("a  b", " a b\n")],
    "logic": [
        ({"assignment": {"Zoey": True, "Ethan": False}},
         "Zoey is a knight, and Ethan is a knave.", "Knights: Zoey. Knaves: Ethan.",
         "The answer is: Ethan is a knave and Zoey is a knight."),
        ({"choices": ["red", "blue"], "answer": "B"}, "B", "blue", "So option B is right."),
        ({"choices": ["True", "False", "Unknown"], "answer": "False"}, "false",
         "The statement is false."),
        ({"answer": "tree"}, "Tree.", "\\boxed{tree}", "The answer is tree."),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "answers"), [(name, answers) for name, cases in SAME.items() for answers in cases]
)
def test_one_answer_has_one_form(name, answers):
    row = dict(PLAIN)
    if isinstance(answers[0], dict):
        row |= answers[0]
        answers = answers[1:]
    row.setdefault("answer", answers[0])
    assert {answer_form(name, row, text) for text in answers} != {None}
    assert len({answer_form(name, row, text) for text in answers}) == 1
    for text in answers:
        assert REWARDS[name](row, text).status == "correct", text


@pytest.mark.parametrize(
    ("name", "row", "texts"),
    [
        ("math", {}, ["72", "73", "-72", "72%", "x = 3 or x = 72", "(72, 1)", "7, 2"]),
        ("exact", {}, ["mV", "MV", "m V"]),
        ("logic", {"choices": ["red", "blue"], "answer": "B"}, ["A", "B"]),
        ("logic", {"answer": "true"}, ["true", "false", "unknown"]),
    ],
)
def test_other_answers_have_other_forms(name, row, texts):
    forms = [answer_form(name, PLAIN | row, text) for text in texts]
    assert len(set(forms)) == len(texts) and None not in forms


def test_a_response_without_an_answer_has_no_vote():
    thinking = {"answer": "72"}
    assert answer_form("math", thinking, "<think>\n72") is None
    for text in ("I do not know what it is", "", "It may be 72 or 73."):
        assert answer_form("math", PLAIN | thinking, text) is None
    assert answer_form("logic", PLAIN | {"answer": "true"}, "It is true or false.") is None
