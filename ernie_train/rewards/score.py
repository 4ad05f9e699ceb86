"""Define the result of grading a completion, and read rows and completions for verifiers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ernie_train.data.completion_format import ParsedCompletion, parse_completion

# The key of a row that says which parts its completions have. It is none that a data set has, as
# `thinking` would be: columns of that name hold somebody's reasoning.
FORMAT_KEY = "completion_format"

Status = Literal["correct", "wrong", "bad_gold", "timeout", "infrastructure"]


@dataclass(frozen=True)
class Score:
    """Hold a verifier's grade of one completion.

    Only "correct" and "wrong" say something about the completion. "bad_gold" is a row whose own
    answer cannot be used; "timeout" and "infrastructure" are failures of the verifier that the
    completion did not cause. A failure that the completion causes, such as an endless loop, is
    "wrong". A verifier that gives marks (format, a judge, a user's function) calls the full mark
    "correct" and all below it "wrong"; `value` is the mark.
    """

    value: float
    status: Status
    detail: str = ""

    @property
    def trains(self) -> bool:
        """Return True if the value may enter accuracies and advantages."""
        return self.status in ("correct", "wrong")

    @classmethod
    def correct(cls, detail: str = "") -> "Score":
        return cls(1.0, "correct", detail)

    @classmethod
    def wrong(cls, detail: str) -> "Score":
        return cls(0.0, "wrong", detail)

    @classmethod
    def marked(cls, value: float, detail: str = "") -> "Score":
        """Return the score of a mark from 0 to 1; raises ValueError for another number or NaN."""
        if not math.isfinite(value) or not 0 <= value <= 1:
            raise ValueError(f"a reward must be a number from 0 to 1, not {value!r}")
        return cls(float(value), "correct" if value == 1 else "wrong", detail)

    @classmethod
    def bad_gold(cls, detail: str) -> "Score":
        return cls(0.0, "bad_gold", detail)

    @classmethod
    def timeout(cls, detail: str) -> "Score":
        return cls(0.0, "timeout", detail)

    @classmethod
    def infrastructure(cls, detail: str) -> "Score":
        return cls(0.0, "infrastructure", detail)


def completion_parts(row: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether the row's completions have a thinking part, and `<response>` tags.

    `row["completion_format"]` says so as {"thinking": .., "response_tags": ..}: false for models
    that are not asked to think, and for those that write their answer without tags. Without it they
    have the Thinking format.
    """
    told = row.get(FORMAT_KEY, {})
    thinking = told.get("thinking", True)
    return thinking, told.get("response_tags", thinking)


def read_completion(row: dict[str, Any], completion: str) -> ParsedCompletion | Score:
    """Return the parts of a completion; Score.wrong if its thinking part never ends."""
    thinking, tagged = completion_parts(row)
    parsed = parse_completion(completion, thinking=thinking, tagged=tagged)
    if parsed.thinking is not None and not parsed.finished_thinking:
        return Score.wrong("the thinking part is not finished")
    return parsed


def read_response(row: dict[str, Any], completion: str) -> str | Score:
    """Return the text of the response part, stripped; Score.wrong if there is none."""
    parsed = read_completion(row, completion)
    if isinstance(parsed, Score):
        return parsed
    if parsed.response is None:
        return Score.wrong("no response part")
    return parsed.response.strip()


def question_of(row: dict[str, Any]) -> str:
    """Return the row's `question`, or else the last message of its user, or an empty text.

    A row as it stands in a file may have `prompt`, a text or messages, or `problem` instead.
    """
    question = row.get("question")
    if isinstance(question, str):
        return question
    messages = row.get("messages") or row.get("prompt") or row.get("problem")
    if isinstance(messages, str):
        return messages
    told = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    asked = [str(m.get("content")) for m in told if m.get("role") == "user"]
    return asked[-1] if asked else ""


def grade_response(
    row: dict[str, Any], completion: str, compare: Callable[[str, str], Score]
) -> Score:
    """Return `compare(answer, response)`; Score.bad_gold or Score.wrong if one is missing."""
    answer = row.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        return Score.bad_gold(f"answer must be a non-empty text, not {answer!r}")
    response = read_response(row, completion)
    return response if isinstance(response, Score) else compare(answer.strip(), response)


def mismatch(gold: str, answer: str) -> Score:
    """Return Score.wrong that shows the wrong answer and the right one, both cut for a table."""
    return Score.wrong(f"{answer[:80]!r} is not {gold[:80]!r}")
