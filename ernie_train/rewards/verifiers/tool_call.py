"""Grade tool calls: the right tools with the right arguments, as many as expected, in any order.

The match is that of the Berkeley Function-Calling Leaderboard's AST check: each argument must be
one of its allowed values, "" among them means that it may be left out, the members of an object
have allowed values of their own, an integer may replace a float, but no other type may replace
another. One rule is stricter: texts must be equal except for white space around them.
"""

import json
from typing import Any

from ernie_train.data.completion_format import ToolCall, unique_keys
from ernie_train.rewards.score import Score, read_completion

# One expected call: a name, and for each argument the list of its allowed values.
Expected = tuple[str, dict[str, list[Any]]]


def score(row: dict[str, Any], completion: str) -> Score:
    """Compare the calls of a completion with `expected_calls`, or else with `answer`.

    `expected_calls` is a list of {"name", "arguments": {argument: [allowed values]}}; "" among the
    allowed values means that the argument may be left out. An allowed value that is an object whose
    members are all lists names the allowed values of each member in turn. `answer` is the JSON text
    of one {"name", "arguments"} or of a list of them, taken literally. An empty list expects a
    response without any call.
    """
    expected = _expected_calls(row)
    if isinstance(expected, Score):
        return expected
    parsed = read_completion(row, completion)
    if isinstance(parsed, Score):
        return parsed
    calls = parsed.tool_calls
    if any(call.arguments is None for call in calls):
        return Score.wrong("a tool call is not valid JSON with a name and arguments")
    if len(calls) != len(expected):
        return Score.wrong(f"{len(calls)} tool calls, expected {len(expected)}")
    if not expected and not (parsed.response and parsed.response.strip()):
        return Score.wrong("no call is expected, but a response")
    if not _all_matched(calls, expected):
        made = "; ".join(call.raw for call in calls)
        return Score.wrong(f"not the expected calls: {made[:200]}")
    return Score.correct()


def reference_calls(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return calls that must score correct, of first allowed values; None for a bad row."""
    expected = _expected_calls(row)
    if isinstance(expected, Score):
        return None
    return [(name, _first_allowed(arguments)) for name, arguments in expected]


def _first_allowed(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        name: _literal(next(value for value in values if value != ""))
        for name, values in arguments.items()
        if any(value != "" for value in values)
    }


def _literal(allowed: Any) -> Any:
    if isinstance(allowed, list):
        return [_literal(item) for item in allowed]
    return _first_allowed(allowed) if _names_members(allowed) else allowed


def _expected_calls(row: dict[str, Any]) -> list[Expected] | Score:
    if "expected_calls" in row:
        listed, single_values = row["expected_calls"], False
    else:
        try:
            answer = json.loads(row["answer"], object_pairs_hook=unique_keys)
            listed, single_values = answer, True
        except (KeyError, TypeError, ValueError, RecursionError):
            return Score.bad_gold("neither expected_calls nor an answer that is JSON")
        listed = listed if isinstance(listed, list) else [listed]
    if not isinstance(listed, list):
        return Score.bad_gold(f"expected_calls must be a list, not {listed!r}")
    expected: list[Expected] = []
    for call in listed:
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return Score.bad_gold(f"an expected call needs a name and arguments: {call!r}")
        if single_values:
            arguments = {key: [_taken_literally(value)] for key, value in arguments.items()}
        if not all(isinstance(values, list) and values for values in arguments.values()):
            return Score.bad_gold(f"each expected argument needs a list of values: {call!r}")
        expected.append((name, arguments))
    return expected


def _all_matched(calls: list[ToolCall], expected: list[Expected]) -> bool:
    """Return True if calls match expected ones one to one (augmenting paths: polynomial)."""
    owner: dict[int, int] = {}

    def place(call: int, tried: set[int]) -> bool:
        for slot, wanted in enumerate(expected):
            if slot in tried or not _matches(calls[call], wanted):
                continue
            tried.add(slot)
            if slot not in owner or place(owner[slot], tried):
                owner[slot] = call
                return True
        return False

    return all(place(call, set()) for call in range(len(calls)))


def _taken_literally(value: Any) -> Any:
    """Return the allowed values that accept exactly this value and its members."""
    if isinstance(value, list):
        return [_taken_literally(item) for item in value]
    if isinstance(value, dict):
        return {key: [_taken_literally(member)] for key, member in value.items()}
    # "" would mean that the argument may be left out; " " equals it after trimming.
    return " " if value == "" else value


def _matches(call: ToolCall, expected: Expected) -> bool:
    name, allowed = expected
    return call.name == name and _members_match(call.arguments or {}, allowed)


def _members_match(given: dict[str, Any], allowed: dict[str, list[Any]]) -> bool:
    if not given.keys() <= allowed.keys():
        return False
    return all(
        any(_is_allowed(given[name], value) for value in values) if name in given else "" in values
        for name, values in allowed.items()
    )


def _names_members(allowed: Any) -> bool:
    return isinstance(allowed, dict) and all(isinstance(v, list) and v for v in allowed.values())


def _is_allowed(given: Any, allowed: Any) -> bool:
    if isinstance(given, str) and isinstance(allowed, str):
        return given.strip() == allowed.strip()
    if isinstance(given, list) and isinstance(allowed, list):
        return len(given) == len(allowed) and all(map(_is_allowed, given, allowed))
    if isinstance(given, dict) and _names_members(allowed):
        return _members_match(given, allowed)
    if isinstance(given, float) and not isinstance(allowed, float):
        return False
    return same_json(given, allowed)


def same_json(one: Any, other: Any) -> bool:
    """Compare JSON values: 1 equals 1.0, but neither equals true or "1"."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    return bool(one == other)
