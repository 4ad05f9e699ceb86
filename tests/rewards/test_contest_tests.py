"""Tests of programs as public contest sets have them: columns, JSON text, functional tests."""

import json

import pytest

from tests.rewards.test_code import ASSERTS, RIGHT, ROW, SCRIPTS, graded

LINES = {"inputs": ["1\n", "40\n"], "outputs": ["2\n", "41\n"]}
CALLS = {"fn_name": "f", "inputs": [[1], [40]], "outputs": [[2], [41]]}


def test_functional_tests_of_contests_are_calls():
    source = "class Solution:\n    def f(self, xs, k):\n        return [x + k for x in xs]"
    test = {"input": "[3, 4]\n1", "output": "[4, 5]"}
    for row in ({"tests": [test | {"testtype": "functional"}], "entry_point": "f"},
                {"tests": [test], "entry_point": "f"}):  # fmt: skip
        assert graded(source, row).status == "correct"
        assert graded(source.replace("+", "-"), row).status == "wrong"
        assert graded("print([4, 5])", row).status == "wrong"
    script = {"tests": [{"input": "1", "output": "2", "testtype": "stdin"}], "entry_point": "f"}
    assert graded("print(int(input()) + 1)", script).status == "correct"
    functional = test | {"testtype": "functional"}
    assert graded(source, {"tests": [functional]}).status == "bad_gold"
    no_json = {"tests": [functional | {"input": "3 4"}], "entry_point": "f"}
    assert graded(source, no_json).status == "bad_gold"


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


@pytest.mark.parametrize(
    "tests",
    [
        LINES | {"outputs": ["2"]},
        {"inputs": 1, "outputs": 2},
        CALLS | {"inputs": ["1", "2"]},
    ],
)
def test_columns_that_do_not_fit_are_bad_gold(tests):
    assert graded(RIGHT, {"tests": tests}).status == "bad_gold"
