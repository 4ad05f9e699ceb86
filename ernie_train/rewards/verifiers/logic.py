"""Grade logic problems by assignment, choices, reasoning-gym entry or text, as the row has them."""

import functools
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ernie_train.rewards.score import Score, grade_response, mismatch, read_response
from ernie_train.rewards.verifiers.answer_text import boxes, fold, named_answers, tagged
from ernie_train.rewards.verifiers.labels import (
    assignment_said,
    chosen_label,
    grade_assignment,
    grade_choice,
    grade_truth,
    parse_assignment,
    truth_label,
)

# Scorers of reasoning-gym that are not asked; their tasks compare words and numbers instead.
NOT_ASKED = {
    # They run the answer through `eval` or sympy's parser: a completion is hostile input.
    "string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "polynomial_multiplication",
    "simple_integration", "intermediate_integration", "countdown", "puzzle24",
    # They give the full mark to any text, to more than the answer, or to numbers near it.
    "game_of_life_halting", "word_sorting", "letter_jumble", "polynomial_equations",
    "decimal_arithmetic", "number_format", "pool_matrix",
}  # fmt: skip
_DECIMAL = r"[+-]?\d+(?:\.\d+)?"
# Scorers that look for an answer within the text, or take what is no number: an answer to one of
# them must have this form and nothing besides.
_FORMS = {
    "advanced_geometry": rf"{_DECIMAL}°?|\({_DECIMAL}, ?{_DECIMAL}\)",
    "complex_arithmetic": rf"{_DECIMAL} ?[+-] ?\d+(?:\.\d+)?i|{_DECIMAL}i?",
    "fraction_simplification": r"\$?\\[dt]?frac\{-?\d+\}\{\d+\}\$?|-?\d+ ?/ ?\d+|-?\d+",
    "kakurasu": r"[01\s]+",
    "knights_knaves": r"[\w ,.\n]+",
    "quantum_lock": r"[A-C](?: ?(?:→|->|,)? ?[A-C])*",
    "sokoban": r"[UDLR]+",
    "survo": r"[\d\s]+",
    "time_intervals": r"\d+(?: days?)?|(?:\d+ days?, )?\d{1,2}:\d\d(?::\d\d(?:\.\d+)?)?",
    "tower_of_hanoi": r"(?:Move disk \d+ from Peg \d+ to Peg \d+\s*)+",
}
_NUMBER = re.compile(r"[+-]?\$?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d{1,3}|/0*[1-9]\d*)?", re.ASCII)
# Tasks that ask for fewer digits than their answers have ask for three.
_LEAST_DIGITS = 3
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
    which only the full mark counts: many scorers give part of it for junk. Some are not asked, or
    see answers of the task's form alone.
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
    if entry is not None:
        return _gym_score(str(task), entry, gold, answer)
    if truth_label(gold) is not None:
        return grade_truth(gold, response)
    if people := parse_assignment(gold, ("knight", "knave")):
        return grade_assignment(people, response)
    said = {_key(text) for text in named_answers(response) or [response]}
    return Score.correct() if said == {_key(gold)} else mismatch(gold, answer)


def answer_form(row: dict[str, Any], response: str) -> str | None:
    """Return the roles, the label, the choice or the words that a response gives; None for none."""
    gold, choices = str(row.get("answer")), row.get("choices")
    people = _people(row["assignment"]) if "assignment" in row else None
    if people or (people := parse_assignment(gold, ("knight", "knave"))):
        said = assignment_said(people, response)
        return str(sorted(said.items())) if isinstance(said, dict) else None
    if isinstance(choices, list) and choices and all(isinstance(text, str) for text in choices):
        labels = all(truth_label(text) is not None for text in choices)
        return chosen_label(response, () if labels else choices)
    if truth_label(gold) is not None:
        return chosen_label(response)
    named = boxes(response) or tagged(response) or named_answers(response)
    return " ; ".join(sorted({_key(text) for text in named or [response]})) or None


def _key(text: str) -> str:
    return fold(text).removesuffix(".")


def _assignment_score(row: dict[str, Any], completion: str) -> Score:
    people = _people(row["assignment"])
    if people is None:
        shown = str(row["assignment"])[:80]
        return Score.bad_gold(f"assignment must be {{person: role}}, not {shown}")
    response = read_response(row, completion)
    if isinstance(response, Score):
        return response
    return grade_assignment(people, response)


def _people(assignment: Any) -> dict[str, str] | None:
    """Return {person: role}; truth values are those of knights. None if it is no assignment."""
    values = list(assignment.values()) if isinstance(assignment, dict) else []
    if values and all(isinstance(value, bool) for value in values):
        return {name: "knight" if value else "knave" for name, value in assignment.items()}
    if not values or not all(isinstance(value, str) and value for value in values):
        return None
    return dict(assignment)


def _choice_score(choices: Any, gold: str, response: str) -> Score:
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        return Score.bad_gold(f"choices must be a list of texts, not {str(choices)[:80]}")
    if choices and all(truth_label(text) is not None for text in choices):
        return grade_truth(gold, response)
    return grade_choice(gold, choices, response)


def _gym_score(task: str, entry: dict[str, Any], gold: str, response: str) -> Score:
    if len(response) > _MAX_CHARACTERS:
        return Score.wrong(f"a response of {len(response)} characters")
    if task in NOT_ASKED:
        return Score.correct() if _same_words(gold, response) else mismatch(gold, response)
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
    if not _has_form(task, gold, response):
        return mismatch(gold, response)
    try:
        mark = scorer(response, entry)
    except _SCORER_ERRORS as error:
        return Score.wrong(f"{task}: {error!r}")
    return Score.correct() if mark == 1.0 else Score.wrong(f"{task}: mark {mark}")


def _has_form(task: str, gold: str, response: str) -> bool:
    """Return True if a response may be shown to the task's scorer.

    Where the answer is a number, that number or its rounding; in tasks of `_FORMS` an answer and
    nothing else.
    """
    if task in _FORMS and not re.fullmatch(_FORMS[task], response, re.ASCII):
        return False
    if task == "knights_knaves":
        return sorted(_words(response)) == sorted(_words(gold))
    return _number(gold) is None or _rounds(gold, response)


def _rounds(gold: str, response: str) -> bool:
    """Return True if one number is the other, or the other rounded to three digits or more."""
    number, given = _number(gold), _number(response)
    if number is None or given is None or "/" in gold + response:
        return given == number
    decimals = [Decimal(re.sub(r"[$,]", "", text)) for text in (gold, response)]
    coarser = max(decimals, key=lambda decimal: int(decimal.as_tuple().exponent))
    unit = Fraction(10) ** int(coarser.as_tuple().exponent)
    close = len(coarser.as_tuple().digits) >= _LEAST_DIGITS and 2 * abs(given - number) <= unit
    return given == number or close


def _words(text: str) -> list[str]:
    # A comma before three digits may stand within a number.
    return re.sub(r",(?!\d{3}(?!\d))", " ", fold(text)).removesuffix(".").split()


def _same_words(gold: str, response: str) -> bool:
    """Return True for the same words and numbers, by value; a list of numbers in any order."""
    sides: list[list[Any]] = []
    for text in (gold, response):
        values = [(_number(word), word) for word in _words(text)]
        sides.append([word if number is None else number for number, word in values])
    if ", " in gold and all(isinstance(item, Fraction) for side in sides for item in side):
        sides = [sorted(side) for side in sides]
    return sides[0] == sides[1]


def _number(text: str) -> Fraction | None:
    """Return the value of a text that is one finite number."""
    if len(text) > 100 or not _NUMBER.fullmatch(text):
        return None
    return Fraction(re.sub(r"[$,]", "", text))


@functools.cache
def _gym_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the scorer of a reasoning-gym data set; raises ValueError for an unknown name."""
    import reasoning_gym

    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    return scorer
