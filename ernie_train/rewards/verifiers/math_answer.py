r"""Grade mathematical answers: structure and numbers here, other expressions by `math-verify`.

The answer of a response is split into lists, sets, tuples and intervals; their members are compared
as exact quantities, without any parser of expressions. Only the rest (roots, polynomials,
equations) goes to `math-verify`, in a process of its own.

Three errors of `math-verify` are prevented: it takes 3=5 for 5, 10 for 10%, and a product of
letters for any word with the same letters.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ernie_train.rewards.score import Score, grade_response, mismatch
from ernie_train.rewards.verifiers.answer_text import (
    MAX_RESPONSE_CHARACTERS,
    boxes,
    fold,
    hedges,
    named_answers,
    squeeze,
)
from ernie_train.rewards.verifiers.math_process import TOO_MUCH, MathProcess
from ernie_train.rewards.verifiers.quantities import parse_quantity, split_unit

_MAX_CHARACTERS = 1000
_MAX_MEMBERS = 16

_SIGNS = str.maketrans({
    "\u2212": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u03c0": "\\pi ",
    "\u221e": "\\infty ", "\u00b0": "^\\circ", "\u2264": "\\le ", "\u2265": "\\ge ",
    "\u222a": "\\cup ", "\u2208": "\\in ", "\u221a": "\\sqrt ", "\u00a0": " ", "~": " ",
})  # fmt: skip
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;: ]")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_REWRITES = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("{,}", ","), ("\\%", "%"),
             ("\\leq", "\\le"), ("\\geq", "\\ge"), ("\\$", "$"),
             ("\\varnothing", "\\emptyset"))  # fmt: skip
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_VARIABLE = re.compile(
    r"(\([a-z](?:,\s?[a-z])+\)|[A-Za-z](?:_\{?\w+\}?)?(?:\([a-z](?:,\s?[a-z])*\))?)\s*(=|\\in\b)\s*"
)
_LIST = re.compile(r",(?!\d{3}(?!\d))|,(?=\s)|;|\b(?:or|and)\b")
_BRACKETS = {("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}")}
_WORD_ANSWER = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+")
_LETTER = re.compile(r"\(?([A-Z])\)?[.)]?")
_DIGIT_INDEX = re.compile(r"_\{(\w)\}")
_BASE = re.compile(r"[\dA-F]+_\{?(\d+)\}?")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|neq|in|subset|approx|sim|equiv|lt|gt)(?![A-Za-z])")
# Adjacent numbers, alternatives, several lines, words among symbols.
_NO_VALUE = re.compile(
    r"\d\s+\d|\\(?:pm|mp|vee|lor|wedge|land|mid|cup|cap|[lcv]?dots|&|\\)|[|&;:?']"
    r"|(?<![\\A-Za-z])(?:[A-Za-z]{3,}\s|[a-z]{4,})",
    re.ASCII,
)
_MATH_SPAN = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_SPAN_NUMBER = re.compile(r"(?<![\w.])[+-]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?!\w)", re.ASCII)


def score(row: dict[str, Any], completion: str) -> Score:
    r"""Compare the answer that the response names with `answer`.

    Boxes count (`\boxed{..}`), else the text after "the answer is", "####" and the like, else the
    whole response, else the only number of its last sentence. A response that names different
    answers is read as their list, so that it equals no single one. `answer` may be a whole
    solution that names its answer in the same ways (`.. #### 42`).
    """
    return grade_response(row, completion, _compare)


def _compare(gold: str, response: str) -> Score:
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
            equal = _equal(wanted, given, verify)
    except _ScoreSettled as verdict:
        return verdict.score
    return Score.correct() if equal else mismatch(wanted, given)


def answer_of(response: str) -> str | None:
    """Return the answer of a response, normalized; a list if it names several; None for none."""
    named = [normalize(text) for text in named_answers(response)]
    if any(len(text) > _MAX_CHARACTERS for text in named):
        return None
    if named:
        different = {_key(text): text for text in named}
        return " ; ".join(different.values())
    last = next((line for line in reversed(response.splitlines()) if line.strip()), "")
    alone = last.strip() == response.strip() and len(last) <= _MAX_CHARACTERS
    if alone and not _is_prose(last):
        return normalize(last) or None
    sentence = re.split(r"[.!?]\s+(?=[A-Z])", last)[-1]
    return _only_answer_of(sentence) if len(sentence) <= _MAX_CHARACTERS else None


def normalize(text: str) -> str:
    """Unify the spelling of signs, spaces, delimiters and text commands; keep the meaning."""
    text = _SPACING.sub(" ", text.translate(_SIGNS).replace("\\!", ""))
    text = _TEXT.sub(r" \1 ", text)
    for old, new in _REWRITES:
        text = text.replace(old, new)
    text = squeeze(_DIGIT_INDEX.sub(r"_\1", text))
    for opening, closing in _WRAPPERS:
        inside = text.removesuffix(".").removeprefix(opening).removesuffix(closing)
        if text.startswith(opening) and text.rstrip(".").endswith(closing) and "$" not in inside:
            text = squeeze(inside)
    if inner := boxes(text):
        text = squeeze(inner[-1]) if len(inner) == 1 and text.startswith("\\boxed") else text
    return text.removesuffix(".") if not text.endswith("..") else text


def _key(text: str) -> object:
    """Return a key that is equal for two spellings of the same quantity or of the same text."""
    quantity = parse_quantity(text)
    return text.replace(" ", "") if quantity is None or quantity.unit else quantity.value


def _is_prose(line: str) -> bool:
    words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}", line)
    return len(words) > 2 and parse_quantity(normalize(line)) is None


def _only_answer_of(sentence: str) -> str | None:
    """Return the only formula of a sentence, or else its only number; None if it hedges."""
    if hedges(sentence):
        return None
    spans = {normalize(a or b) for a, b in _MATH_SPAN.findall(sentence)}
    if not spans:
        spans = {normalize(text.rstrip(",")) for text in _SPAN_NUMBER.findall(sentence)}
    if len({_key(span) for span in spans}) != 1:
        return None
    return next(iter(spans))


class _ScoreSettled(Exception):
    """Signal that one of several members decides the score of all."""

    def __init__(self, score: Score) -> None:
        super().__init__(score.detail)
        self.score = score


Verify = Callable[[str, str], Score]


def _equal(gold: str, answer: str, verify: Verify) -> bool:
    """Compare two normalized texts: lists and brackets here, single members by `_same`."""
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    golds, answers = _members(gold), _members(answer)
    if max(len(golds), len(answers)) > _MAX_MEMBERS:
        return False
    if len(golds) > 1 or len(answers) > 1:
        return _same_members(_elements(golds), _elements(answers), verify)
    gold_name, gold = _variable_and_value(gold)
    name, answer = _variable_and_value(answer)
    if gold_name and name and gold_name != name:
        return False
    shape, answer_shape = _bracketed(gold), _bracketed(answer)
    if shape is None or answer_shape is None:
        return _same(gold, answer, verify)
    if shape[0] != answer_shape[0]:
        return False
    inner, answer_inner = _members(shape[1]), _members(answer_shape[1])
    if shape[0] == "\\{\\}":
        return _same_members(inner, answer_inner, verify)
    if len(inner) != len(answer_inner):
        return False
    return all(_equal(g, a, verify) for g, a in zip(inner, answer_inner, strict=True))


def _same_members(golds: list[str], answers: list[str], verify: Verify) -> bool:
    """Return True if the members match one to one, in any order."""
    if len(golds) != len(answers):
        return False
    left = list(answers)
    for gold in golds:
        found = next((a for a in left if _equal(gold, a, verify)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _elements(members: list[str]) -> list[str]:
    r"""Return the content of a lone \{..\}: a list of solutions may be written as their set."""
    shape = _bracketed(members[0]) if len(members) == 1 else None
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
    if text.count("\\pm") != 1:
        return [text]
    return [text.replace("\\pm", "+"), text.replace("\\pm", "-")]


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


def _variable_and_value(text: str) -> tuple[str, str]:
    """Return ("x", "5") for x = 5; ("", text) if the text does not define one variable."""
    match = _VARIABLE.match(text)
    if match is None or "=" in text[match.end() :] or not text[match.end() :]:
        return "", text
    return match.group(1).replace(" ", ""), text[match.end() :]


def _same(gold: str, answer: str, verify: Verify) -> bool:
    """Compare two single expressions."""
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    gold_quantity, quantity = parse_quantity(gold), parse_quantity(answer)
    if gold_quantity is not None and quantity is not None:
        return quantity.equals(gold_quantity)
    if _WORD_ANSWER.fullmatch(gold) or _WORD_ANSWER.fullmatch(answer):
        return fold(gold) == fold(answer)
    letters = _LETTER.fullmatch(gold), _LETTER.fullmatch(answer)
    if letters[0] and letters[1]:
        return letters[0][1] == letters[1][1]
    sides = answer.split("=")
    if len(sides) > 1 and "=" not in gold:  # 8 + 9 = 17: each side must be the answer
        return all(squeeze(side) and _same(gold, squeeze(side), verify) for side in sides)
    (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
    if (gold_unit and unit and gold_unit != unit) or _incomparable(gold, answer):
        return False
    verdict = verify(gold, answer)
    if verdict is TOO_MUCH or not verdict.trains:
        raise _ScoreSettled(verdict)
    return verdict.status == "correct"


def _incomparable(gold: str, answer: str) -> bool:
    """Return True for pairs that math-verify would misread."""
    if gold.count("=") != answer.count("=") or ("%" in gold) != ("%" in answer):
        return True
    if _RELATION.search(answer) and not (_RELATION.search(gold) or gold[:1] in ("(", "[")):
        return True
    if _NO_VALUE.search(answer) and not _NO_VALUE.search(gold):
        return True
    bases = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    # A gold answer may have a base that the response leaves out, not the other way round.
    return bases[1] is not None or not answer.isascii()


_PROCESS = MathProcess()
