"""Turns pydantic's errors into one line each, in words that a recipe's author knows."""

import difflib
from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic_core import ErrorDetails

from ernie_train.core.config_schema import Place, is_schema, iterate_leaves, locate


def list_problems(cls: type[pydantic.BaseModel], errors: list[ErrorDetails]) -> list[str]:
    """A line for each problem, in the order of pydantic's errors: `path: message`."""
    lines: dict[str, list[str]] = {}
    for error, place in _without_other_members([(e, locate(cls, e["loc"])) for e in errors]):
        path, message = _phrase(error, place)
        said = lines.setdefault(path, [])
        if message not in said:
            said.append(message)
    return [
        f"{path}: {line}" if path else line
        for path, messages in lines.items()
        for line in _merge(messages)
    ]


def _without_other_members(
    found: list[tuple[ErrorDetails, Place]],
) -> list[tuple[ErrorDetails, Place]]:
    """Of a union such as `int | Schema` keeps the errors inside the member that was meant."""
    deep = {
        place.path[: place.union_depth]
        for _, place in found
        if 0 <= place.union_depth < len(place.path)
    }
    return [
        (error, place)
        for error, place in found
        if place.union_depth != len(place.path) or place.path not in deep
    ]


def _merge(messages: list[str]) -> list[str]:
    """Joins `expected a, got x` and `expected b, got x` of a union's members into one line."""
    expected = [m for m in messages if m.startswith("expected ") and ", got " in m]
    if len(expected) < 2:
        return messages
    got = expected[0].rpartition(", got ")[2]
    kinds = [m.removeprefix("expected ").rpartition(", got ")[0] for m in expected]
    joined = f"expected {' or '.join(kinds)}, got {got}"
    return [joined, *(m for m in messages if m not in expected)]


_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}


def _phrase(error: ErrorDetails, place: Place) -> tuple[str, str]:
    """The path and the message of one error."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    path = ".".join(str(element) for element in place.path)
    if kind == "missing":
        return path, "missing; this key is required"
    if kind == "extra_forbidden":
        return path, "unknown key" + _unknown_key_hint(str(place.path[-1]), place.holder)
    if kind in ("literal_error", "enum"):
        return path, _choice_message(context["expected"], value)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = context["discriminator"].strip("'")
        path = f"{path}.{key}" if path else key
        if kind == "union_tag_not_found":
            return path, "missing; this key is required"
        return path, _choice_message(context["expected_tags"], context["tag"])
    if kind in _EXPECTED:
        return path, f"expected {_EXPECTED[kind]}, got {describe(value)}"
    if kind in _BOUNDS:
        name, sign = _BOUNDS[kind]
        return path, f"must be {sign} {context[name]}, got {describe(value)}"
    if kind in ("value_error", "assertion_error"):
        return path, str(context["error"])
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        side = "at least" if kind == "too_short" else "at most"
        return path, f"needs {side} {bound} items, got {context['actual_length']}"
    return path, f"{error['msg']}, got {describe(value)}"


def _choice_message(expected: str, value: Any) -> str:
    # pydantic gives the choices as "'a', 'b' or 'c'".
    choices = [word.strip(" '") for word in expected.replace(" or ", ", ").split(", ")]
    hint = nearest_hint(value, choices) if isinstance(value, str) else ""
    return f"expected one of {', '.join(choices)}, got {describe(value)}{hint}"


def describe(value: Any) -> str:
    """What a value is, for a message: `the text 'x'`, `a list of 3`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a section with the keys {', '.join(value)}" if value else "an empty section"
    return repr(value)


def _similarity(word: str, key: str) -> float:
    """1 for equal; initials (`larning_rate` and `lr`) and shared words count as near."""
    word, key = word.lower().replace("-", "_"), key.lower().replace("-", "_")
    ratio = difflib.SequenceMatcher(None, word, key).ratio()
    short, long = sorted((word, key), key=len)
    parts = [part for part in long.split("_") if part]
    if len(parts) > 1 and short == "".join(part[0] for part in parts):
        ratio = max(ratio, 0.9)
    if short in parts or (len(short) >= 3 and long.startswith(short)):
        ratio = max(ratio, 0.8)
    return ratio


def nearest_hint(word: str, known: Sequence[str]) -> str:
    """Names the nearest of the known words, and all of them where none is near."""
    nearest = max(known, key=lambda key: _similarity(word, key))
    if _similarity(word, nearest) >= 0.5:
        return f"; did you mean '{nearest}'?"
    return f"; the nearest is '{nearest}', known are {', '.join(known)}"


def _unknown_key_hint(word: str, holder: Any) -> str:
    if not is_schema(holder) or not holder.model_fields:
        return ""
    # The right key one section too high: `lr` for `optim.lr`.
    inside = [leaf.path for leaf in iterate_leaves(holder) if leaf.path.split(".")[-1] == word]
    if inside:
        return f"; did you mean '{inside[0]}'?"
    return nearest_hint(word, list(holder.model_fields))
