"""Map the names that rows and recipes give to verifiers, and to the form of an answer in each."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ernie_train.core.errors import UserError, did_you_mean
from ernie_train.rewards.score import Score, read_response
from ernie_train.rewards.verifiers import (
    answer_text,
    code,
    exact,
    format,
    labels,
    logic,
    math_answer,
    tool_call,
)

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


# The keys by which a row shows what grades it, before its answer does.
_SHOWN_BY = {
    "code": {"tests", "hidden_tests"},
    "tool_call": {"expected_calls"},
    "logic": {"assignment", "choices", "rg_entry"},
}
# A longer answer is prose, which no verifier compares. Commands of LaTeX are no words.
_MOST_WORDS, _MOST_LETTERS = 8, 60
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")


def fitting_verifier(row: Mapping[str, Any]) -> str | None:
    """Return the name of the verifier that grades a row by what it carries; None if none does."""
    for name, keys in _SHOWN_BY.items():
        if row.keys() & keys:
            return name
    answer = row.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        return None
    if labels.truth_label(answer) or labels.parse_assignment(answer, ("knight", "knave")):
        return "logic"
    words = _WORD.findall((answer_text.named_answers(answer) or [answer])[-1])
    short = len(words) <= _MOST_WORDS and sum(map(len, words)) <= _MOST_LETTERS
    return "math" if short else None


def answer_form(name: str, row: dict[str, Any], completion: str) -> str | None:
    """Return the answer that a completion gives, in the form of the verifier `name`.

    Texts are equal for answers that the verifier takes for the same. None if there is no answer.
    Raises KeyError for a verifier that is not in ANSWER_FORMS.
    """
    response = read_response(row, completion)
    return ANSWER_FORMS[name](row, response) if isinstance(response, str) else None
