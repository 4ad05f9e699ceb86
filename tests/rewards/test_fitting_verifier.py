"""The verifier that fits what a row carries."""

import pytest

from ernie_train.rewards import REWARDS, fitting_verifier


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"answer": "72"}, "math"),
        ({"answer": "She sold 48/2 = 24 clips in May, and so on.\n#### 72"}, "math"),
        ({"answer": r"It is half of three halves, so that we get \boxed{\frac{3}{4}}."}, "math"),
        (
            {"answer": r"x \in (-\infty, 2) \cup (3, \infty) \cap \mathbb{R}"},
            "math",
        ),
        ({"answer": "(C)"}, "math"),
        ({"answer": "Paris"}, "math"),
        ({"answer": "False"}, "logic"),
        ({"answer": "Zoey is a knight, and Ethan is a knave."}, "logic"),
        ({"answer": "1", "choices": ["one", "two"]}, "logic"),
        ({"assignment": {"Zoey": True}}, "logic"),
        ({"answer": "def f(): ...", "tests": ["assert f() == 1"]}, "code"),
        ({"expected_calls": []}, "tool_call"),
        ({"answer": "Cut the onions, heat some oil in a pan, then fry them until golden."}, None),
        ({"answer": "先把洋葱切成小块,然后在锅里放一点油,用小火慢慢地炒到金黄色," * 3}, None),
        ({"answer": " "}, None),
        ({"answer": 72}, None),
        ({"solution_text": "72"}, None),
    ],
)
def test_by_what_a_row_carries(row: dict[str, object], name: str | None) -> None:
    assert fitting_verifier(row) == name
    assert name is None or name in REWARDS
