r"""Grade mathematical answers: structure and numbers here, other expressions by `math-verify`.

The answer of a response is split into lists, sets, tuples, matrices and intervals; their members
are compared as exact quantities. Where the gold answer is a number, an answer must be in final
form: it may be made of what the gold answer is made of (a fraction, a root, a multiple of pi), so
that an expression copied from the question is not its value. Only the rest (roots, polynomials,
equations) goes to `math-verify`, in a process of its own, if it is small enough.

Four errors of `math-verify` are prevented: it takes 3=5 for 5, 10 for 10%, a product of letters for
any word with the same letters, and tiny numbers for each other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

from ernie_train.rewards.score import Score, grade_response, mismatch, question_of
from ernie_train.rewards.verifiers.answer_text import (
    MAX_RESPONSE_CHARACTERS,
    announced_behind_boxes,
    denies,
    fold,
    hedges,
    named_answers,
    squeeze,
    talks,
    without_reason,
)
from ernie_train.rewards.verifiers.expressions import (
    TooLargeError,
    compact,
    is_final,
    normalize,
    read_expression,
    read_real_set,
)
from ernie_train.rewards.verifiers.math_process import TOO_MUCH, MathProcess
from ernie_train.rewards.verifiers.quantities import (
    Quantity,
    is_fraction,
    is_percent,
    parse_quantity,
    split_unit,
)

_MAX_CHARACTERS = 1000
_MAX_MEMBERS = 16

# What may have a value: x, x_1, f(2), (x, y), \angle ABC, AB, |AB|, P(A), m + n, Area, \cos x.
_NAMED = re.compile(
    r"(\([a-z](?:,\s?[a-z])+\)|[A-Za-z](?:_\{?\w+\}?)?'*(?:\([\w, +-]{1,12}\))?"
    r"|(?:m\s?)?\\(?:angle|triangle|overline|overrightarrow|vec|hat|widehat|bar)\s*\{?\s?[A-Z]{1,4}\}?"
    r"|\|?[A-Z]{2,4}\|?|[A-Z][a-z]{2,}(?:\s[a-z]{2,}){0,2}|[a-z]{4,}(?:\s[a-z]{2,}){0,2}"
    r"|[a-z](?:\s?\+\s?[a-z]){1,3}|\\(?:sin|cos|tan|cot)\s?\\?[A-Za-z]+|\\[a-z]+(?:_\{?\w+\}?)?)"
    r"\s*(=|\\in\b)\s*"
)
_LIST = re.compile(r",(?!\d{3}(?!\d))|,(?=\s)|;|\b(?:or|and)\b|或者?|和|与|以?及")
_BRACKETS = {("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}"),
             ("\\langle", "\\rangle")}  # fmt: skip
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}\s*[)\]]?"
)
_WORD_ANSWER = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+|(?i:no)")
_LETTER = re.compile(r"\(?([A-Z])\)?[.)]?")
_BASE = re.compile(r"([\dA-F]+)_\{?(\d+)\}?")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|neq|in|subset|approx|sim|equiv|lt|gt)(?![A-Za-z])")
# Adjacent numbers, alternatives, several lines, words among symbols.
_NO_VALUE = re.compile(
    r"\d\s+\d|\\(?:pm|mp|vee|lor|wedge|land|mid|cup|cap|[lcv]?dots|&|\\)|[|&;:?']"
    r"|(?<![\\A-Za-z])(?:[A-Za-z]{3,}\s|[a-z]{4,})",
    re.ASCII,
)
_MATH_SPAN = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\*\*([^*]+)\*\*")
_SPAN_NUMBER = re.compile(
    r"(?<![\w.])[+-]?[$\u00a5\u20ac]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?"
    r"(?: (?:hundred|thousand|million|billion|dozen)\b)?(?![A-Za-z0-9_])",
    re.ASCII,
)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_ARITHMETIC = re.compile(r"\d\s*[-+*/^\u00d7\u00f7\u2212]\s*\(?\d")
_PEOPLE = re.compile(r"[A-Z][\w'-]*(?:(?:, (?:and )?| and )[A-Z][\w'-]*)*")
_SENTENCE_START = re.compile(r"(?<=[.!?])\s+(?=[A-Z\u4e00-\u9fff])|(?<=[。\uff01\uff1f])")
# Words around a number that make a bound or an estimate of it.
_INEXACT = re.compile(
    r"\b(?:at (?:least|most)|up to|about|around|approximately|roughly|nearly|almost|between|minus"
    r"|(?:more|less|fewer|greater|larger|smaller|other|rather) than|exceeds?|over|under)\b"
    r"|至少|至多|最多|最少|以上|以下|左右|超过|多于|少于|大约|不到|约",
    re.IGNORECASE,
)
_APPROXIMATION = re.compile(
    r"^(?P<exact>.*?)[,\s$]*(?:\b(?:or|i\.e\.|which is)\s|或)?\s*\(?\s*"
    r"(?:(?:\\approx|\\simeq|\\doteq)(?![A-Za-z])"
    r"|\b(?:about|approximately|approx\.?|roughly|around)\s|大?约(?:等于|为|是)?)"
    r"\s*\$?(?P<about>[^=$()]+?)\$?\)?\.?$"
)
_ASKS_PERCENT = re.compile(r"percent|\bper cent\b|%|百分", re.IGNORECASE)


def score(row: dict[str, Any], completion: str) -> Score:
    r"""Compare the answer that the response names with `answer`.

    Boxes count (`\boxed{..}`), else the text after "the answer is", "####" and the like, else the
    whole response, else the only number of its last sentence. A response that names different
    answers is read as their list, so that it equals no single one. `answer` may be a whole
    solution that names its answer in the same ways (`.. #### 42`). An answer that is an expression
    may not be copied from the question of the row.
    """
    return grade_response(row, completion, partial(_compare, question_of(row)))


def _compare(question: str, gold: str, response: str) -> Score:
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return Score.wrong(f"a response of {len(response)} characters")
    wanted = normalize((named_answers(gold) or [gold])[-1])
    if not wanted:
        return Score.bad_gold(f"no answer in {gold[:80]!r}")
    if fold(normalize(response)) == fold(wanted):
        return Score.correct()
    given = answer_of(response)
    if given is None:
        return Score.wrong("the response names no single answer")
    if len(given) > _MAX_CHARACTERS:
        return Score.wrong(f"an answer of {len(given)} characters")
    try:
        with _PROCESS.session() as verify:
            comparison = _Comparison(verify, question)
            equal = any(comparison.equal(wanted, form) for form in _spellings(wanted, given))
    except _ScoreSettled as verdict:
        return verdict.score
    return Score.correct() if equal else mismatch(wanted, given)


def answer_of(response: str) -> str | None:
    """Return the answer of a response, normalized; a list if it names several; None for none."""
    named = [normalize(without_reason(text)) for text in named_answers(response)]
    if any(len(text) > _MAX_CHARACTERS for text in named):
        return None
    if named:
        if not named[-1]:
            return None
        different = {_key(text): text for text in named}
        for text in map(normalize, announced_behind_boxes(response)):
            later, told = parse_quantity(text), list(map(parse_quantity, different.values()))
            if later and not any(quantity and quantity.value == later.value for quantity in told):
                different[_key(text)] = text
        only = next(iter(different.values()))
        if len(different) == 1 and _is_chinese_sentence(only):
            return _only_answer_of(only)
        return " ; ".join(different.values())
    last = next((line for line in reversed(response.splitlines()) if line.strip()), "")
    alone = last.strip() == response.strip() and len(last) <= _MAX_CHARACTERS
    if alone and not _is_prose(answer := without_reason(last)):
        return normalize(answer) or None
    sentence = [part for part in _SENTENCE_START.split(last) if part.strip()][-1:]
    return (
        _only_answer_of(sentence[0]) if sentence and len(sentence[0]) <= _MAX_CHARACTERS else None
    )


def _key(text: str) -> object:
    """Return a key that is equal for two spellings of the same quantity or of the same text."""
    quantity = parse_quantity(text)
    return compact(text) if quantity is None or quantity.unit else quantity.value


def _is_prose(line: str) -> bool:
    if parse_quantity(normalize(line)) is not None or _PEOPLE.fullmatch(line.strip(" .")):
        return False
    return len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}", line)) > 2 or _is_chinese_sentence(line)


def _is_chinese_sentence(text: str) -> bool:
    """Return True for Chinese words before a number: a unit stands behind it."""
    first = re.search(r"\d", text)
    return first is not None and _HAN.search(text, 0, first.start()) is not None


def _only_answer_of(sentence: str) -> str | None:
    """Return the only formula of a sentence, or else its only number; None if it hedges."""
    open_ended = sentence.rstrip("*\"' ").endswith(("?", "\uff1f", "="))
    if open_ended or any(test(sentence) for test in (hedges, denies, talks, _INEXACT.search)):
        return None
    spans = {normalize(a or b or c) for a, b, c in _MATH_SPAN.findall(sentence)}
    if not any(re.search(r"\d|\\", span) for span in spans):
        if _ARITHMETIC.search(sentence):
            return None
        spans = {normalize(text.rstrip(",")) for text in _SPAN_NUMBER.findall(sentence)}
    if len({_key(span) for span in spans}) != 1:
        return None
    return next(iter(spans))


def _spellings(gold: str, answer: str) -> list[str]:
    """Return an answer without its approximation; that too if the gold answer is a decimal."""
    match = _APPROXIMATION.match(answer)
    about = parse_quantity(match["about"]) if match else None
    if match is None or about is None:
        return [answer]
    decimal = re.fullmatch(r"[+-]?\d*\.\d+.*", gold) is not None
    exact = match["exact"].strip(" ,$(")
    if not exact:
        return [match["about"]] if decimal else []
    place = _value_of(exact.rpartition("=")[2].strip())
    digits = re.search(r"\.(\d+)", match["about"])
    step = Fraction(1, 10 ** (len(digits[1]) if digits else 0))
    near = place is not None and abs(Fraction(place) - about.value) <= step * Fraction(501, 1000)
    if not near:
        return []
    return [exact, match["about"]] if decimal else [exact]


def _value_of(text: str) -> Fraction | float | None:
    quantity = parse_quantity(text)
    if quantity is not None:
        return quantity.value
    try:
        expression = read_expression(text)
    except TooLargeError:
        return None
    if expression is None:
        return None
    return expression.approximation if expression.value is None else expression.value


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

    def equal(self, gold: str, answer: str) -> bool:
        if compact(gold) == compact(answer):
            return True
        gold_set, answer_set = read_real_set(gold), read_real_set(answer)
        if gold_set and (gold_set.certain or (answer_set and answer_set.certain)):
            return answer_set is not None and gold_set.equals(answer_set, self.equal)
        if gold_rows := _rows(gold):
            return self._same_rows(gold_rows, _rows(answer))
        return self._same_structure(gold, answer)

    def _same_structure(self, gold: str, answer: str) -> bool:
        """Compare lists, tuples and finite sets; texts of one member as such."""
        golds, answers = _members(gold), _members(answer)
        if max(len(golds), len(answers)) > _MAX_MEMBERS:
            return False
        if len(golds) > 1 or len(answers) > 1:
            golds, answers = _elements(golds), _elements(answers)
            names = {_name_and_value(text)[0] for text in golds}
            if len(names) == len(golds) > 1 and not any(_name_and_value(a)[0] for a in answers):
                return self._same_in_order(golds, answers)
            return self._same_members(golds, answers)
        gold_name, gold = _name_and_value(gold)
        name, answer = _name_and_value(answer)
        if gold_name and name and gold_name != name:
            return False
        shape, answer_shape = _bracketed(gold), _bracketed(answer)
        if shape is None or answer_shape is None:
            return self._same(gold, answer)
        if shape[0] != answer_shape[0]:
            return False
        inner, answer_inner = _members(shape[1]), _members(answer_shape[1])
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
        gold_quantity, quantity = parse_quantity(gold), parse_quantity(answer)
        if gold_quantity is not None and quantity is not None:
            return self._same_quantity(gold, answer, gold_quantity, quantity)
        if _WORD_ANSWER.fullmatch(gold) or _WORD_ANSWER.fullmatch(answer):
            return fold(gold) == fold(answer)
        letters = _LETTER.fullmatch(gold), _LETTER.fullmatch(answer)
        if letters[0] and letters[1]:
            return letters[0][1] == letters[1][1]
        bases = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
        if bases[0] or bases[1]:
            # A gold answer may have a base that the response leaves out, not the other way round.
            return bases[0] is not None and compact(answer) in (compact(gold), bases[0][1])
        sides = [squeeze(side) for side in answer.split("=")]
        if len(sides) > 1 and "=" not in gold:  # 8 + 9 = 17: each side must be the answer
            if _name_and_value(f"{sides[0]} = 0")[0]:
                sides = sides[1:]
            final = [side for side in sides if side and self._same(gold, side)]
            return bool(final) and all(side and self._same_value(gold, side) for side in sides)
        (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
        if gold_unit and unit and unit != gold_unit:
            return False
        return self._is_answer(gold, answer) and self._same_value(gold, answer)

    def _same_quantity(self, gold: str, answer: str, wanted: Quantity, given: Quantity) -> bool:
        if is_fraction(answer) and (wanted.value.denominator == 1 or self._copied(gold, answer)):
            return False
        if is_percent(gold) != is_percent(answer) and _ASKS_PERCENT.search(self.question):
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
        return bool(self.question) and compact(answer) in compact(normalize(self.question))

    def _same_value(self, gold: str, answer: str) -> bool:
        """Compare values, in whatever form they are."""
        if compact(gold) == compact(answer):
            return True
        one, two = _exact(gold), _exact(answer)
        if one is not None and two is not None:
            return one == two
        if _incomparable(gold, answer):
            return False
        verdict = self.verify(gold, answer)
        if verdict is TOO_MUCH or not verdict.trains:
            raise _ScoreSettled(verdict)
        return verdict.status == "correct"


def _exact(text: str) -> Fraction | None:
    quantity = parse_quantity(text)
    if quantity is not None:
        return quantity.value
    try:
        expression = read_expression(text)
    except TooLargeError:
        return None
    return expression.value if expression is not None else None


def _is_too_large(text: str) -> bool:
    try:
        read_expression(text)
    except TooLargeError:
        return True
    return False


def _rows(text: str) -> list[list[str]]:
    """Return the cells of a matrix by rows; [] for other texts."""
    match = _MATRIX.fullmatch(text)
    if match is None:
        return []
    rows = [row for row in match[2].split("\\\\") if row.strip()]
    return [[squeeze(cell) for cell in row.split("&")] for row in rows]


def _elements(members: list[str]) -> list[str]:
    r"""Return the content of a lone \{..\}: a list of solutions may be written as their set."""
    shape = _bracketed(_name_and_value(members[0])[1]) if len(members) == 1 else None
    return _members(shape[1]) if shape and shape[0] == "\\{\\}" else members


def _members(text: str) -> list[str]:
    r"""Return the parts between commas (or, and, \cup) outside of brackets; \pm makes two."""
    if "\\cup" in text:
        parts = [squeeze(part) for part in text.split("\\cup")]
        return parts if all(_bracketed(part) for part in parts) else [text]
    if parse_quantity(text) is not None:
        return [text]
    ends = {match.start(): match.end() for match in _LIST.finditer(text)}
    depth, cuts = 0, [(0, 0)]
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if position in ends and depth == 0:
            cuts.append((position, ends[position]))
    cuts.append((len(text), len(text)))
    parts = [squeeze(text[end:start]) for (_, end), (start, _) in pairwise(cuts)]
    return [one for part in parts if part for one in _both_signs(part)] or [text]


def _both_signs(text: str) -> list[str]:
    r"""Return 1 + x, 1 - x for 1 \pm x; any other text as it is."""
    if text.count("\\pm") != 1 or text.startswith("\\{"):
        return [text]
    return [squeeze(re.sub(r"(^|=\s*)\+\s*", r"\1", text.replace("\\pm", sign))) for sign in "+-"]


def _bracketed(text: str) -> tuple[str, str] | None:
    """Return (brackets, content) if one pair encloses a text of several members, else None."""
    for opening, closing in _BRACKETS:
        if not (text.startswith(opening) and text.endswith(closing)):
            continue
        inside, depth = text[len(opening) : -len(closing)], 0
        for character in inside:
            depth += (character in "([{") - (character in ")]}")
            if depth < 0:
                return None
        if opening == "\\{" or len(_members(inside)) > 1:
            return opening + closing, inside
    return None


def _name_and_value(text: str) -> tuple[str, str]:
    """Return ("x", "5") for x = 5; ("", text) if the text gives no value to one name."""
    match = _NAMED.match(text)
    if match is None or "=" in text[match.end() :] or not text[match.end() :]:
        return "", text
    return compact(match.group(1)), text[match.end() :]


def _incomparable(gold: str, answer: str) -> bool:
    """Return True for pairs that math-verify would misread."""
    if gold.count("=") != answer.count("=") or ("%" in gold) != ("%" in answer):
        return True
    if _RELATION.search(answer) and not (_RELATION.search(gold) or gold[:1] in ("(", "[")):
        return True
    if ":" in gold or not answer.isascii():
        return True
    return _NO_VALUE.search(answer) is not None and not _NO_VALUE.search(gold)


_PROCESS = MathProcess()
