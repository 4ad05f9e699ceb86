"""Gold completions: what a row's own answer amounts to, for every kind of row."""

import pytest

from ernie_train.rewards import REWARDS
from ernie_train.rewards.scoring.reference_completion import build_reference_completion

CALLS = [{"name": "f", "arguments": {"x": [1, 2], "y": ["", "a"], "z": [[]]}}]
PROGRAM = "def f(x):\n    return x + 1"
TESTS = {"entry_point": "f", "tests": [[[1], 2]]}


@pytest.mark.parametrize(
    ("reward", "row"),
    [
        ("exact", {"answer": "5 mV"}),
        *(
            ("exact", {"answer": "5 mV", "completion_format": {"thinking": a, "response_tags": b}})
            for a in (True, False)
            for b in (True, False)
        ),
        ("math", {"answer": "She has 2.\n#### 1,080"}),
        ("logic", {"assignment": {"Zoey": True, "Ethan": False}}),
        ("logic", {"assignment": {"Zoey": "pilot", "Ethan": "sailor"}}),
        ("logic", {"answer": "Uncertain", "choices": ["True", "False", "Unknown"]}),
        ("tool_call", {"expected_calls": CALLS}),
        ("tool_call", {"answer": '[{"name": "f", "arguments": {"x": 1}}]'}),
        ("code", {**TESTS, "solution": PROGRAM}),
        ("code", {**TESTS, "answer": PROGRAM}),
        ("code", {**TESTS, "messages": [{"role": "assistant", "content": PROGRAM}]}),
        ("format", {"answer": "x"}),
    ],
)
def test_the_gold_completion_of_a_row_scores_correct(reward, row):
    assert REWARDS[reward](row, build_reference_completion(reward, row)).status == "correct"


@pytest.mark.parametrize(
    ("reward", "row"),
    [
        ("math", {}),
        ("math", {"answer": 12}),
        ("tool_call", {"answer": "no json"}),
        ("tool_call", {"expected_calls": [{"name": "f"}]}),
        ("code", {**TESTS, "messages": [{"role": "user", "content": "Write f."}]}),
    ],
)
def test_a_row_without_an_answer_has_none(reward, row):
    assert build_reference_completion(reward, row) is None
