"""Tests of programs as public sets have them: in columns, and as JSON text."""

import json

import pytest

from tests.rewards.code_rows import ASSERTS, CALLS, LINES, RIGHT, ROW, SCRIPTS, graded


@pytest.mark.parametrize(
    "row",
    [
        {"tests": json.dumps(SCRIPTS["tests"])},
        {"tests": json.dumps(ASSERTS["tests"])},
        {"tests": json.dumps(ROW["tests"]), "entry_point": "f"},
        {"tests": [json.dumps(test) for test in ROW["tests"]], "entry_point": "f"},
        {"tests": LINES},
        {"tests": json.dumps(LINES)},
        {"tests": {"input": LINES["inputs"], "output": LINES["outputs"]}},
        {"tests": {"inputs": [["1", ""], ["40"]], "outputs": [["2"], 41]}},
        {"tests": CALLS},
        {"tests": json.dumps(CALLS)},
        {"tests": {**CALLS, "outputs": [2, 41]}},
        {"hidden_tests": CALLS},
    ],
)
def test_tests_in_columns_or_as_json_text_are_run(row):
    main = "\nif __name__ == '__main__':\n    print(f(int(input())))"
    assert graded(RIGHT + main, row).status == "correct"
    wrong = graded(RIGHT.replace("x + 1", "[2]") + main, row)
    assert wrong.status == "wrong" and "of 2 tests passed" in wrong.detail


def test_a_value_in_a_list_of_one_is_that_list_or_the_value():
    row = {"tests": {"fn_name": "f", "inputs": [[1]], "outputs": [[[2, 3]]]}}
    for value, right in (("[2, 3]", True), ("[[2, 3]]", True), ("2", False), ("[2]", False)):
        score = graded(f"def f(x):\n    return {value}", row)
        assert score.status == ("correct" if right else "wrong"), value
