"""Read values out of rows; RowError says why a row cannot be used."""

import json
import math
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

SHOWN_CHARACTERS = 60
# Keys under which rows have an answer, a text in all but the JSON or the table that holds them.
ANSWER_KEYS = ("answer", "response", "solution", "output", "completion", "ground_truth")
# Keys of verifiers whose values are lists and objects, which CSV has as JSON text and Parquet where
# their members are of several types.
JSON_KEYS = ("assignment", "choices", "expected_calls", "rg_entry", "rubric")


class RowError(ValueError):
    """Report that a row cannot be used; the text is the reason."""


class BlankAnswer(RowError):
    """Report a row that is sound but for an answer of white space alone."""


def without_nulls(value: Any) -> Any:
    """Return a JSON value without the keys whose value is null, at every depth.

    Arrow and Parquet write every key into every row, absent ones as null. They put no null into
    lists, so one in a list was meant.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def json_value(value: Any) -> Any:
    """Return what the JSON text of a list or an object holds; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def answer_text(value: Any, choices: Any) -> Any:
    """Return a number that is an answer as text; any other value, also NaN, as it is.

    An integer beside a list of choices is the place of one of them, from 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    texts = choices if isinstance(choices, list) else []
    if isinstance(value, int) and 0 <= value < len(texts) and isinstance(texts[value], str):
        return texts[value]
    return str(value)


def shown(value: Any) -> str:
    """Return a value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


_KINDS: dict[type, str] = {
    str: "a text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null",
}  # fmt: skip


def kind_of(value: Any) -> str:
    """Return what a value is, in JSON's words, for a message that rows of a file share."""
    return _KINDS.get(type(value), "a number")


def parse_json(text: str, what: str) -> Any:
    """Return the JSON value of a text.

    Raises:
        RowError: it is none; the message names it as `what`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON: {error}") from error


def as_json(value: Any) -> str:
    """Return a value as JSON text."""
    return json.dumps(value, ensure_ascii=False)


def list_of(row: Row, key: str) -> list[Any]:
    """Return the list at `key`, also where the file holds it as JSON text, as CSV does.

    Raises:
        RowError: it is no list, or empty.
    """
    value = row.get(key)
    if isinstance(value, str):
        value = parse_json(value, key) if value.lstrip()[:1] == "[" else value
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} must be a list of messages that is not empty")
    return value


def text_at(row: Row, key: str) -> str:
    """Return the text at `key`.

    Raises:
        RowError: it is no text, or empty.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{key} must be text, not {kind_of(value)}")
    if not value.strip():
        raise RowError(f"{key} is empty")
    return value
