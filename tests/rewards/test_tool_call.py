import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.verifiers import tool_call

ROW = {"expected_calls": [{"name": "weather", "arguments": {"city": ["Paris"], "days": [3]}}]}


def graded(row, *calls):
    return tool_call.score(row, format_completion("because", tool_calls=calls))


def test_the_expected_call_in_any_order_of_arguments():
    assert graded(ROW, ("weather", {"city": "Paris", "days": 3})).status == "correct"
    assert graded(ROW, ("weather", {"days": 3, "city": "Paris"})).status == "correct"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("forecast", {"city": "Paris", "days": 3}),
        ("weather", {"city": "London", "days": 3}),
        ("weather", {"city": "Paris", "days": "3"}),
        ("weather", {"city": "Paris", "days": True}),
        ("weather", {"city": "Paris"}),
        ("weather", {"city": "Paris", "days": 3, "unit": "C"}),
        ("weather", {"town": "Paris", "days": 3}),
        ("weather", "[1]"),
        ("weather", "{broken"),
    ],
)
def test_any_other_call_is_wrong(name, arguments):
    assert graded(ROW, (name, arguments)).status == "wrong"


def test_where_no_call_is_right_a_response_is_and_nothing_at_all_is_not():
    row = {"expected_calls": []}
    said = format_completion("because", "None of the tools fits.")
    assert tool_call.score(row, said).status == "correct"
    assert graded(row, ("weather", {})).status == "wrong"
    assert graded(row).status == "wrong"
    assert tool_call.score(row, format_completion("because", " ")).status == "wrong"


def test_the_number_of_calls_must_match():
    call = ("weather", {"city": "Paris", "days": 3})
    assert graded(ROW).status == "wrong"
    assert graded(ROW, call, call).status == "wrong"
    assert graded({"expected_calls": []}, call).status == "wrong"


def test_parallel_calls_are_paired_whatever_their_order():
    # The first call fits both slots; only giving it the second lets the other one fit.
    row = {"expected_calls": [
        {"name": "f", "arguments": {"x": [1, 2]}},
        {"name": "f", "arguments": {"x": [1]}},
    ]}  # fmt: skip
    assert graded(row, ("f", {"x": 1}), ("f", {"x": 2})).status == "correct"
    assert graded(row, ("f", {"x": 2}), ("f", {"x": 1})).status == "correct"
    assert graded(row, ("f", {"x": 2}), ("f", {"x": 2})).status == "wrong"


def test_an_argument_that_may_be_left_out():
    row = {"expected_calls": [{"name": "f", "arguments": {"x": [1], "unit": ["C", ""]}}]}
    assert graded(row, ("f", {"x": 1})).status == "correct"
    assert graded(row, ("f", {"x": 1, "unit": "C"})).status == "correct"
    assert graded(row, ("f", {"x": 1, "unit": "F"})).status == "wrong"


def test_types_match_as_json_knows_them_but_an_integer_stands_for_a_float():
    row = {"expected_calls": [{"name": "f", "arguments": {"i": [5], "x": [2.0], "b": [True]}}]}
    assert graded(row, ("f", {"i": 5, "x": 2.0, "b": True})).status == "correct"
    assert graded(row, ("f", {"i": 5, "x": 2, "b": True})).status == "correct"
    for other in ({"i": 5.0}, {"i": "5"}, {"i": True}, {"x": "2.0"}, {"b": 1}, {"b": "true"}):
        assert graded(row, ("f", {"i": 5, "x": 2.0, "b": True} | other)).status == "wrong", other


def test_texts_are_equal_but_for_white_space_around_them():
    row = {"expected_calls": [{"name": "f", "arguments": {"x": ["New York", "NYC"]}}]}
    for value in ("New York", " NYC\n"):
        assert graded(row, ("f", {"x": value})).status == "correct"
    for value in ("new york", "New  York", "NewYork", "NY", ""):
        assert graded(row, ("f", {"x": value})).status == "wrong", value


def test_members_of_an_object_have_allowed_values_of_their_own():
    where = {"field": ["age"], "operation": [">", "over"], "note": ["old", ""]}
    row = {"expected_calls": [{"name": "f", "arguments": {"where": [[where, where]], "k": [""]}}]}
    full = {"field": "age", "operation": ">", "note": "old"}
    short = {"field": "age", "operation": "over"}
    assert graded(row, ("f", {"where": [full, short]})).status == "correct"
    for value in ([full], [full, full, full], [full, {"field": "age"}], [full, short | {"x": 1}],
                  [full, short | {"operation": "<"}], [full, short | {"operation": ["over"]}],
                  full):  # fmt: skip
        assert graded(row, ("f", {"where": value})).status == "wrong", value


def test_an_answer_is_taken_literally():
    answer = json.dumps({"name": "f", "arguments": {"x": {"a": [1, 2], "b": ""}, "y": ""}})
    right = {"x": {"a": [1, 2], "b": ""}, "y": ""}
    assert graded({"answer": answer}, ("f", right)).status == "correct"
    for value in ({"x": {"a": 1, "b": ""}, "y": ""}, {"x": {"a": [1, 2]}, "y": ""},
                  {"x": {"a": [1, 2], "b": ""}}):  # fmt: skip
        assert graded({"answer": answer}, ("f", value)).status == "wrong", value


def test_the_gold_calls_of_a_row_are_correct_and_none_for_a_bad_one():
    row = {"expected_calls": [
        {"name": "f", "arguments": {"x": ["", 0], "y": [""], "z": [{"a": [[1], [2]], "b": [""]}]}},
        {"name": "g", "arguments": {}},
    ]}  # fmt: skip
    calls = tool_call.reference_calls(row)
    assert calls == [("f", {"x": 0, "z": {"a": [1]}}), ("g", {})]
    assert graded(row, *calls).status == "correct"
    assert tool_call.reference_calls({"expected_calls": []}) == []
    assert tool_call.reference_calls({"expected_calls": [{"name": "f"}]}) is None


def test_calls_are_wrong_where_none_is_expected_and_where_one_of_several_is_not_right():
    row = {"expected_calls": [{"name": n, "arguments": {"x": [n]}} for n in "abc"]}
    calls = [(n, {"x": n}) for n in "abc"]
    assert graded(row, *calls[::-1]).status == "correct"
    assert graded(row, *calls[:2], ("c", {"x": "d"})).status == "wrong"
    assert graded(row, *calls[:2]).status == "wrong"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"answer": "no json"},
        {"answer": "[" * 100_000},
        {"expected_calls": None},
        {"expected_calls": [{"name": "f"}]},
        {"expected_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"expected_calls": ["f"]},
    ],
)
def test_unusable_expectations_are_bad_gold(row):
    assert graded(row, ("f", {"x": 1})).status == "bad_gold"
    assert tool_call.reference_calls(row) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4))
def test_a_call_equals_the_answer_that_it_was_written_from(arguments):
    answer = json.dumps({"name": "f", "arguments": arguments})
    assert graded({"answer": answer}, ("f", answer_arguments(answer))).status == "correct"
    other = {**arguments, "one more": 1}
    if "one more" not in arguments:
        assert graded({"answer": answer}, ("f", other)).status == "wrong"


def answer_arguments(answer):
    return json.loads(answer)["arguments"]
