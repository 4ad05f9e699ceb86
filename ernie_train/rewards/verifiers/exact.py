"""Grade exact answers: texts that are equal except for white space."""

from typing import Any

from ernie_train.rewards.score import Score, grade_response, mismatch
from ernie_train.rewards.verifiers.answer_text import squeeze


def score(row: dict[str, Any], completion: str) -> Score:
    """Compare the response with `answer`, case included: mV is not MV."""
    return grade_response(row, completion, _compare)


def _compare(gold: str, response: str) -> Score:
    equal = squeeze(response) == squeeze(gold)
    return Score.correct() if equal else mismatch(gold, response)


def answer_form(row: dict[str, Any], response: str) -> str | None:
    """Return the response without needless white space; None if it is empty."""
    return squeeze(response) or None
