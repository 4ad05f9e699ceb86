"""Map the names that rows and recipes give to verifiers, and to the form of an answer in each."""

from collections.abc import Callable
from typing import Any

from ernie_train.core.errors import UserError, did_you_mean
from ernie_train.rewards.score import Score, read_response
from ernie_train.rewards.verifiers import code, exact, format, logic, math_answer, tool_call

RewardFn = Callable[[dict[str, Any], str], Score]

REWARDS: dict[str, RewardFn] = {
    "exact": exact.score,
    "math": math_answer.score,
    "logic": logic.score,
    "code": code.score,
    "tool_call": tool_call.score,
    "format": format.score,
}
# Verifiers without a form of their own (programs, tool calls, formats) have no majority to count.
ANSWER_FORMS: dict[str, Callable[[dict[str, Any], str], str | None]] = {
    "exact": exact.answer_form,
    "math": math_answer.answer_form,
    "logic": logic.answer_form,
}


def reward_named(name: str) -> RewardFn:
    """Return the verifier of that name; raises UserError with the nearest name if unknown."""
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}{did_you_mean(name, REWARDS)}")
    return REWARDS[name]


def answer_form(name: str, row: dict[str, Any], completion: str) -> str | None:
    """Return the answer that a completion gives, in the form of the verifier `name`.

    Texts are equal for answers that the verifier takes for the same. None if there is no answer.
    Raises KeyError for a verifier that is not in ANSWER_FORMS.
    """
    response = read_response(row, completion)
    return ANSWER_FORMS[name](row, response) if isinstance(response, str) else None
