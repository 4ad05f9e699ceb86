"""Bring the answers of completions into a form in which equal answers are equal texts."""

from collections.abc import Callable
from typing import Any

from ernie_train.rewards.score import read_response
from ernie_train.rewards.verifiers import exact, logic, math_answer

# Verifiers without a form of their own (programs, tool calls, formats) have no majority to count.
ANSWER_FORMS: dict[str, Callable[[dict[str, Any], str], str | None]] = {
    "exact": exact.answer_form,
    "math": math_answer.answer_form,
    "logic": logic.answer_form,
}


def answer_form(name: str, row: dict[str, Any], completion: str) -> str | None:
    """Return the answer that a completion gives, in the form of the verifier `name`.

    Texts are equal for answers that the verifier takes for the same. None if there is no answer.
    Raises KeyError for a verifier that is not in ANSWER_FORMS.
    """
    response = read_response(row, completion)
    return ANSWER_FORMS[name](row, response) if isinstance(response, str) else None
