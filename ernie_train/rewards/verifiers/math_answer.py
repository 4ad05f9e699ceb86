r"""Grade mathematical answers: structure and numbers here, other expressions by `math-verify`.

The answer of a response is split into lists, sets, tuples, matrices and intervals; their members
are compared as exact quantities. Where the gold answer is a number, an answer must be in final
form: it may be made of what the gold answer is made of (a fraction, a root, a multiple of pi), so
that an expression copied from the question is not its value. Only the rest (roots, polynomials,
equations) goes to `math-verify`, in a process of its own, if it is small enough.

Five errors of `math-verify` are prevented: it takes 3=5 for 5, 10 for 10%, a product of letters for
any word with the same letters, tiny numbers for each other, and R for r.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ernie_train.rewards.score import Score, grade_response, mismatch, question_of
from ernie_train.rewards.verifiers.answer_text import (
    MAX_RESPONSE_CHARACTERS,
    fold,
    named_answers,
    squeeze,
)
from ernie_train.rewards.verifiers.expressions import (
    MAX_ANSWER_CHARACTERS,
    TooLargeError,
    answer_of,
    bracketed,
    compact,
    elements_of,
    is_final,
    matrix_rows,
    members_of,
    name_and_value,
    normalize,
    read_expression,
    read_real_set,
    read_small,
    spellings,
    split_choice,
    symbols,
    tuple_members,
    turned_alike,
)
from ernie_train.rewards.verifiers.math_process import TOO_MUCH, MathProcess
from ernie_train.rewards.verifiers.quantities import (
    Quantity,
    asks_percentage,
    is_fraction,
    is_percent,
    is_power_of_ten,
    parse_quantity,
    split_unit,
)

_MAX_MEMBERS = 16

_WORD_ANSWER = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+|(?i:no)")
_NOTHING = {"\\emptyset", "\\{\\}", "no solution", "no solutions", "no real solution", "empty set",
            "no real solutions", "the empty set", "\u65e0\u89e3", "\u7a7a\u96c6"}  # fmt: skip
_LETTER = re.compile(r"(?:(?:选择?|[Oo]ption|[Cc]hoice)[:\s]*)?\(?([A-Z])\)?[.)]?")
_CLOCK = re.compile(r"(\d{1,2})(?:(?::|\{:\})(\d\d))? ?([AaPp])(?:\. ?)?[Mm]\.?", re.ASCII)
_BASE = re.compile(r"\(?([\dA-F]+)\)?(?:_\{?|\s*\(?(?:in )?base )(\d+)[})]?")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|neq|in|subset|approx|sim|equiv|lt|gt)(?![A-Za-z])")
# Adjacent numbers, alternatives, several lines, words among symbols.
_NO_VALUE = re.compile(
    r"\d\s+\d|\\(?:pm|mp|vee|lor|wedge|land|mid|cup|cap|[lcv]?dots|&|\\)|[|&;:?']"
    r"|(?<![\\A-Za-z])(?:[A-Za-z]{3,}\s|[a-z]{4,})",
    re.ASCII,
)
_LETTER_OR_TWO_NUMBERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])|\d\s+\d")


def score(row: dict[str, Any], completion: str) -> Score:
    r"""Compare the answer that the response names with `answer`.

    Boxes count (`\boxed{..}`), else the text after "the answer is", "####" and the like, else the
    whole response, else the only number of its last sentence. A response that names different
    answers is read as their list, so that it equals no single one. `answer` may be a whole
    solution that names its answer in the same ways (`.. #### 42`). An answer that is an expression
    may not be copied from the question of the row.
    """
    return grade_response(row, completion, functools.partial(_compare, question_of(row)))


def _compare(question: str, gold: str, response: str) -> Score:
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return Score.wrong(f"a response of {len(response)} characters")
    # A solution does not take its answer back, whatever stands around it.
    wanted = normalize((named_answers(gold) or [gold])[-1].removeprefix("not "))
    if not wanted:
        return Score.bad_gold(f"no answer in {gold[:80]!r}")
    if _same_text(gold, response) or _same_text(wanted, normalize(response)):
        return Score.correct()
    given = answer_of(response)
    if given is None:
        return Score.wrong("the response names no single answer")
    if len(given) > MAX_ANSWER_CHARACTERS:
        return Score.wrong(f"an answer of {len(given)} characters")
    try:
        with _PROCESS.session() as verify:
            comparison = _Comparison(verify, question)
            equal = any(comparison.agrees(wanted, form) for form in spellings(wanted, given))
    except _ScoreSettled as verdict:
        return verdict.score
    return Score.correct() if equal else mismatch(wanted, given)


def answer_form(row: dict[str, Any], response: str) -> str | None:
    """Return the value of the answer that a response names, or else its normalized text."""
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return None
    answer = answer_of(response)
    if answer is None or len(answer) > MAX_ANSWER_CHARACTERS:
        return None
    # The side of "8 + 9 = 17" or "x = 17" that is the answer; lists keep their equations.
    single = len(members_of(answer)) == 1
    value = _exact(answer.rpartition("=")[2].strip() if single else answer)
    return compact(answer) if value is None else str(value)


def _same_text(gold: str, text: str) -> bool:
    """Compare texts without regard to spaces, and to case unless it tells symbols or units apart.

    P - p is not p - P, and 5 mV not 5 MV.
    """
    if fold(gold) != fold(text):
        return False
    quantity = parse_quantity(normalize(gold))
    both_cases = any(letter.islower() and letter.upper() in gold for letter in gold)
    return squeeze(gold) == squeeze(text) or not (both_cases or (quantity and quantity.unit))


class _ScoreSettled(Exception):
    """Signal that one of several members decides the score of all."""

    def __init__(self, score: Score) -> None:
        super().__init__(score.detail)
        self.score = score


@dataclass(frozen=True)
class _Comparison:
    """Compare normalized texts: lists and brackets first, then single members.

    verify: asks math-verify; question: what an expression may not be copied from, or "".
    """

    verify: Callable[[str, str], Score]
    question: str

    def agrees(self, gold: str, answer: str) -> bool:
        """Compare answers that may be choices of a contest: C, 5 or (C) 5.

        What both sides have must agree. Where the gold answer is a value, a letter before it says
        nothing: the order of the choices is not known.
        """
        (gold_letter, gold_value), (letter, value) = split_choice(gold), split_choice(answer)
        if not gold_letter and not letter:
            return self.equal(gold, answer)
        if bare := _LETTER.fullmatch(gold):
            gold_letter, gold_value = bare[1], ""
        if bare := _LETTER.fullmatch(answer):
            letter, value = bare[1], ""
        if gold_letter and letter and gold_letter != letter:
            return False
        if gold_value and value:
            return self.equal(gold_value, value) or (not gold_letter and self.equal(gold, answer))
        return bool(gold_letter and letter)

    def equal(self, gold: str, answer: str) -> bool:
        if compact(gold) == compact(answer) or _same_clock(gold, answer):
            return True
        gold_set, answer_set = read_real_set(gold), read_real_set(answer)
        if gold_set and (gold_set.certain or (answer_set and answer_set.certain)):
            return answer_set is not None and gold_set.equals(answer_set, self.equal)
        if gold_rows := matrix_rows(gold):
            return self._same_rows(gold_rows, matrix_rows(answer))
        return self._same_structure(gold, answer)

    def _same_structure(self, gold: str, answer: str) -> bool:
        """Compare lists, tuples and finite sets; texts of one member as such."""
        golds, answers = members_of(gold), members_of(answer)
        if max(len(golds), len(answers)) > _MAX_MEMBERS:
            return False
        if len(golds) > 1 or len(answers) > 1:
            golds, answers = elements_of(golds), elements_of(answers)
            if len(pairs := tuple_members(golds, answers)) == 2:
                return self._same_in_order(*pairs)
            return self._same_members(golds, answers)
        gold, answer = turned_alike(gold, answer)
        gold_name, gold_value = name_and_value(gold)
        name, answer = name_and_value(answer)
        if gold_name and name and gold_name != name:
            return False
        # An equation such as y = 2x + 1, unlike x = 5, may be written in another form.
        formula = read_small(gold_value) if gold_name and "=" in answer and not name else None
        if formula and not formula.is_number:
            return self._same(gold, answer)
        gold = gold_value
        shape, answer_shape = bracketed(gold), bracketed(answer)
        if shape is None or answer_shape is None:
            return self._same(gold, answer)
        if shape[0] != answer_shape[0]:
            return False
        inner, answer_inner = members_of(shape[1]), members_of(answer_shape[1])
        if shape[0] == "\\{\\}":
            return self._same_members(inner, answer_inner)
        return self._same_in_order(inner, answer_inner)

    def _same_rows(self, golds: list[list[str]], answers: list[list[str]]) -> bool:
        return list(map(len, golds)) == list(map(len, answers)) and all(
            map(self._same_in_order, golds, answers)
        )

    def _same_in_order(self, golds: list[str], answers: list[str]) -> bool:
        return len(golds) == len(answers) and all(map(self.equal, golds, answers))

    def _same_members(self, golds: list[str], answers: list[str]) -> bool:
        """Return True if the members match one to one, in any order."""
        if len(golds) != len(answers):
            return False
        left = list(answers)
        for gold in golds:
            found = next((a for a in left if self.equal(gold, a)), None)
            if found is None:
                return False
            left.remove(found)
        return True

    def _same(self, gold: str, answer: str) -> bool:
        """Compare two single expressions."""
        if compact(gold) == compact(answer):
            return True
        gold_quantity = parse_quantity(gold)
        quantity = parse_quantity(answer) or _unspaced_quantity(answer, gold_quantity)
        if gold_quantity is not None and quantity is not None:
            return self._same_quantity(gold, answer, gold_quantity, quantity)
        if fold(gold) in _NOTHING and fold(answer) in _NOTHING:
            return True
        letters = _LETTER.fullmatch(gold), _LETTER.fullmatch(answer)
        if letters[0] and letters[1]:
            return letters[0][1] == letters[1][1]
        if _WORD_ANSWER.fullmatch(gold) or _WORD_ANSWER.fullmatch(answer):
            return fold(gold) == fold(answer)
        bases = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
        if bases[0] or bases[1]:
            # A gold answer may have a base that the response leaves out, not the other way round.
            if bases[0] is None:
                return False
            digits, base = bases[1].groups() if bases[1] else (compact(answer), bases[0][2])
            return bases[0].groups() == (digits, base)
        sides = [squeeze(side) for side in answer.split("=")]
        if len(sides) > 1 and "=" not in gold:  # 8 + 9 = 17: each side must be the answer
            if name_and_value(f"{sides[0]} = 0")[0]:
                sides = sides[1:]
            final = [side for side in sides if side and self._same(gold, side)]
            told = [side for side in sides if not _is_unknown(side)]
            return bool(final) and all(side and self._same_value(gold, side) for side in told)
        (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
        if gold_unit and unit and unit != gold_unit:
            return False
        return self._is_answer(gold, answer) and self._same_value(gold, answer)

    def _same_quantity(self, gold: str, answer: str, wanted: Quantity, given: Quantity) -> bool:
        fraction = is_fraction(answer)
        if fraction and given.value.denominator == 1:
            return False
        if (fraction or is_power_of_ten(answer)) and self._copied(gold, answer):
            return False
        if is_percent(gold) != is_percent(answer) and asks_percentage(self.question):
            percent, bare = (wanted, given) if is_percent(gold) else (given, wanted)
            if percent.value * 100 == bare.value:
                return True
        return given.equals(wanted)

    def _is_answer(self, gold: str, answer: str) -> bool:
        """Return True for an answer in final form that is not copied from the question."""
        try:
            read = read_expression(answer)
        except TooLargeError:
            if not _is_too_large(gold):
                raise _ScoreSettled(TOO_MUCH) from None
            return True
        if self._copied(gold, answer):
            return False
        quantity = parse_quantity(gold)
        try:
            wanted = read_expression(f"{quantity.value}") if quantity else read_expression(gold)
        except TooLargeError:
            return True
        if wanted is None or not wanted.is_number:
            return True
        return read is not None and is_final(read, wanted)

    def _copied(self, gold: str, answer: str) -> bool:
        """Return True for an answer that the question has, in a form that the gold one has not."""
        made_of = tuple(symbols(answer))
        if not (self.question and made_of) or sorted(made_of) == sorted(symbols(gold)):
            return False
        asked = _symbols_of(self.question)
        runs = (asked[at : at + len(made_of)] for at, one in enumerate(asked) if one == made_of[0])
        return any(run == made_of for run in runs)

    def _same_value(self, gold: str, answer: str) -> bool:
        """Compare values, in whatever form they are."""
        if compact(gold) == compact(answer):
            return True
        one, two = _exact(gold), _exact(answer)
        if one is not None and two is not None:
            return one == two
        if _incomparable(gold, answer):
            return False
        verdict = self.verify(*_cases_apart(gold, answer))
        if verdict is TOO_MUCH or not verdict.trains:
            raise _ScoreSettled(verdict)
        return verdict.status == "correct"


@functools.lru_cache(maxsize=4)  # several expressions of one response ask for them
def _symbols_of(question: str) -> tuple[str, ...]:
    return tuple(symbols(normalize(question)))


def _exact(text: str) -> Fraction | None:
    quantity = parse_quantity(text)
    if quantity is not None:
        return quantity.value
    expression = read_small(text)
    return expression.value if expression else None


def _same_clock(gold: str, answer: str) -> bool:
    """Return True for one time of the day in two spellings: 5:30 PM and 5:30 p.m."""
    read = [_CLOCK.fullmatch(text) for text in (gold, answer)]
    times = [(int(m[1]), int(m[2] or 0), m[3].lower()) for m in read if m is not None]
    return len(times) == 2 and times[0] == times[1]


def _is_unknown(side: str) -> bool:
    r"""Return True for a number that only its equation says: \log_2 8, \binom{5}{2}, |-5|."""
    try:
        expression = read_expression(side)
    except TooLargeError:
        return False
    if expression is None:
        return bool(side) and _LETTER_OR_TWO_NUMBERS.search(side) is None
    return expression.is_number and expression.number is None


def _is_too_large(text: str) -> bool:
    try:
        read_expression(text)
    except TooLargeError:
        return True
    return False


def _incomparable(gold: str, answer: str) -> bool:
    """Return True for pairs that math-verify would misread."""
    if gold.count("=") != answer.count("=") or ("%" in gold) != ("%" in answer):
        return True
    if _RELATION.search(answer) and not (_RELATION.search(gold) or gold[:1] in ("(", "[")):
        return True
    if ":" in gold or not answer.isascii():
        return True
    return _NO_VALUE.search(answer) is not None and not _NO_VALUE.search(gold)


def _unspaced_quantity(answer: str, gold: Quantity | None) -> Quantity | None:
    """Return the quantity in 5m where the gold answer has a unit; beside 5 it is a product."""
    if gold is None or gold.unit is None:
        return None
    return parse_quantity(re.sub(r"(?<=[\d}])(?=[A-Za-z]+$)", " ", answer))


def _cases_apart(*texts: str) -> list[str]:
    """Return the texts with an unused letter for each capital that meets its small one in a text.

    math-verify would make all letters small; N for n alone is still the same.
    """
    letters = [set(re.sub(r"\\[A-Za-z]+", "", text)) for text in texts]
    met = {c for own in letters for c in own if c.isupper() and c.lower() in own}
    used = {c.lower() for own in letters for c in own}
    free = [c for c in "zyxwvutsrqponmlkjhgfcba" if c not in used]  # e and i are numbers
    new = dict(zip(sorted(met), free, strict=False))
    return [re.sub(r"\\[A-Za-z]+|[A-Z]", lambda m: new.get(m[0], m[0]), text) for text in texts]


_PROCESS = MathProcess()
