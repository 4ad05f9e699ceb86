"""Grade logic problems by assignment, choices, reasoning-gym entry or text, as the row has them."""

import functools
from collections.abc import Callable
from typing import Any

from ernie_train.rewards.score import Score, grade_response, mismatch, read_response
from ernie_train.rewards.verifiers.answer_text import boxes, fold, named_answers, tagged
from ernie_train.rewards.verifiers.assignments import grade_assignment, parse_assignment
from ernie_train.rewards.verifiers.choices import grade_choice, grade_truth, truth_label

# These scorers run the answer through `eval` or sympy's parser: a completion is hostile input.
_EXECUTES_ANSWERS = {
    "string_insertion",
    "spiral_matrix",
    "binary_matrix",
    "n_queens",
    "polynomial_multiplication",
    "simple_integration",
    "intermediate_integration",
    "countdown",
    "puzzle24",
}
# This scorer gives any text the full mark.
_ACCEPTS_ANYTHING = {"game_of_life_halting"}
_MAX_CHARACTERS = 20_000

# Errors of reasoning-gym's scorers on answers of an unexpected form.
_SCORER_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError,
    RecursionError, AssertionError,
)  # fmt: skip


def score(row: dict[str, Any], completion: str) -> Score:
    """Grade by the first of these fields that a row has, else by `answer` alone.

    `assignment`: {person: role} (or true/false for knight/knave), each person exactly once.
    `choices`: a list of texts; `answer` is the letter or the text of the right one. With
    ["True", "False", "Unknown"] (or Uncertain) the labels of `answer` and response are compared.
    `rg_task` and `rg_entry` {question, answer, metadata}: reasoning-gym's scorer of that task, of
    which only the full mark counts: many scorers give part of it for junk.
    With `answer` alone, truth labels are compared as such, lists of knights and knaves as
    assignments, and anything else as texts, without regard to case and a final full stop.
    """
    if "assignment" in row:
        return _assignment_score(row, completion)
    return grade_response(row, completion, functools.partial(_compare, row))


def _compare(row: dict[str, Any], gold: str, response: str) -> Score:
    choices = row.get("choices")
    if choices is not None:
        return _choice_score(choices, gold, response)
    named = boxes(response) or tagged(response)
    answer = named[0].strip() if len(named) == 1 else response
    if fold(answer) == fold(gold):
        return Score.correct()
    entry, task = row.get("rg_entry"), row.get("rg_task")
    if entry is not None and task not in _EXECUTES_ANSWERS | _ACCEPTS_ANYTHING:
        return _gym_score(str(task), entry, gold, answer)
    if entry is None and truth_label(gold) is not None:
        return grade_truth(gold, response)
    if entry is None and (people := parse_assignment(gold, ("knight", "knave"))):
        return grade_assignment(people, response)
    if entry is None and {_key(text) for text in named_answers(response) or [response]} == {
        _key(gold)
    }:
        return Score.correct()
    return mismatch(gold, answer)


def _key(text: str) -> str:
    return fold(text).removesuffix(".")


def _assignment_score(row: dict[str, Any], completion: str) -> Score:
    people = row["assignment"]
    values = list(people.values()) if isinstance(people, dict) else []
    if values and all(isinstance(value, bool) for value in values):
        people = {name: "knight" if value else "knave" for name, value in people.items()}
    elif not values or not all(isinstance(value, str) and value for value in values):
        return Score.bad_gold(f"assignment must be {{person: role}}, not {str(people)[:80]}")
    response = read_response(row, completion)
    if isinstance(response, Score):
        return response
    return grade_assignment(people, response)


def _choice_score(choices: Any, gold: str, response: str) -> Score:
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        return Score.bad_gold(f"choices must be a list of texts, not {str(choices)[:80]}")
    if choices and all(truth_label(text) is not None for text in choices):
        return grade_truth(gold, response)
    return grade_choice(gold, choices, response)


def _gym_score(task: str, entry: dict[str, Any], gold: str, response: str) -> Score:
    if len(response) > _MAX_CHARACTERS:
        return Score.wrong(f"a response of {len(response)} characters")
    try:
        scorer = _gym_scorer(task)
    except ImportError as error:
        return Score.infrastructure(f"reasoning-gym cannot be imported: {error}")
    except ValueError as error:
        return Score.bad_gold(f"rg_task {task!r}: {error}")
    try:
        gold_mark = scorer(gold, entry)
    except _SCORER_ERRORS as error:
        return Score.bad_gold(f"{task}: its scorer fails on the answer: {error!r}")
    if gold_mark != 1.0:
        return Score.bad_gold(f"{task}: its scorer gives the answer {gold_mark}")
    try:
        mark = scorer(response, entry)
    except _SCORER_ERRORS as error:
        return Score.wrong(f"{task}: {error!r}")
    return Score.correct() if mark == 1.0 else Score.wrong(f"{task}: mark {mark}")


@functools.cache
def _gym_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the scorer of a reasoning-gym data set; raises ValueError for an unknown name."""
    import reasoning_gym

    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    return scorer
