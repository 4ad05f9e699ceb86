r"""Find the mathematical answer that a response states, and the ways in which it is spelled."""

import re
from fractions import Fraction

from ernie_train.rewards.verifiers.answer_text import (
    announced_behind_boxes,
    denies,
    hedges,
    named_answers,
    talks,
    without_reason,
)
from ernie_train.rewards.verifiers.expressions.arithmetic import read_small
from ernie_train.rewards.verifiers.expressions.notation import compact, normalize
from ernie_train.rewards.verifiers.expressions.real_sets import read_real_set
from ernie_train.rewards.verifiers.expressions.structure import name_and_value
from ernie_train.rewards.verifiers.quantities import parse_quantity

MAX_ANSWER_CHARACTERS = 1000

_MATH_SPAN = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\*\*([^*]+)\*\*")
_SPAN_NUMBER = re.compile(
    r"(?<![\w.])[+-]?[$\u00a5\u20ac]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?"
    r"(?: (?:hundred|thousand|million|billion|dozen)\b)?(?![A-Za-z0-9_])",
    re.ASCII,
)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_SENTENCE_START = re.compile(r"(?<=[.!?])\s+(?=[A-Z\u4e00-\u9fff])|(?<=[。\uff01\uff1f])")
# Words around a number that make a bound, an estimate or another number of it.
_INEXACT = re.compile(
    r"\b(?:at (?:least|most)|up to|about|around|approximately|roughly|nearly|almost|between|minus"
    r"|(?:more|less|fewer|greater|larger|smaller|other|rather) than|exceeds?|over|under)\b"
    r"|\b(?:twice|thrice|doubled?|tripled?|half|negative|near"
    r"|(?:square|cube|root|negative|opposite|reciprocal|inverse|double|triple|half|quarter|multiple"
    r"|factorial|logarithm) of)\s+(?=[-$\\\d*(])"
    r"|\b(?:close to|add(?:ing|ed)?\s+\w+\s+to)\s+(?=[-$\\\d*(])"
    r"|\d[)*$]*\s+(?:is|was|are|were|seems?|looks?)\s+(?:far |much )?too\b"
    r"|\d[)*$]*\s+(?:squared|cubed)\b"
    r"|至少|大于|小于|至多|最多|最少|以上|以下|左右|超过|多于|少于|大约|不到|约|(?<![附最])近(?=[\d$])|将近|接近|几乎"
    r"|差不多|比\s*[$\d][\d.,$]*\s*[还要]?[大小多少高低]",
    re.IGNORECASE,
)
_APPROXIMATION = re.compile(
    r"^(?P<exact>.*?)[,\s$]*(?:\b(?:or|i\.e\.|which is)\s|或)?\s*\(?\s*"
    r"(?:(?:\\approx|\\simeq|\\doteq)(?![A-Za-z])"
    r"|\b(?:about|approximately|approx\.?|roughly|around)\s|大?约(?:等于|为|是)?)"
    r"\s*\$?(?P<about>[^=$()]+?)\$?\)?\.?$"
)
_ARITHMETIC = re.compile(r"\d\s*[-+*/^\u00d7\u00f7\u2212]\s*\(?\d")
_LEAD = re.compile(
    r"(?:(?:thus|therefore|hence|so|then|finally|and|we (?:get|have|find|obtain)|it follows that"
    r"|\u2234|\\therefore|\u6240\u4ee5|\u56e0\u6b64|\u6545)(?![a-z])[,:\uff0c]?\s*)+"
    r"|[A-Z][a-z]+(?: [a-z]+){0,2}: ?(?=[-$\\\d(])",
    re.IGNORECASE,
)
# "She has 70." is a sentence, though of fewer words than most.
_SHORT_SENTENCE = re.compile(
    r"(?:It|She|He|They|There|That|This|We) (?:is|was|are|were|has|have|had|costs?|makes?|gives?"
    r"|needs?|takes?|weighs?|earns?|gets?|leaves?|pays?) (?=[$\d])"
)
_FENCED = re.compile(r"\s*(```|~~~)\w{0,20}\n(?P<line>[^\n]+)\n\1\s*")
_CHOICE = re.compile(r"\(\s?([A-Z])\s?\)\s*[.:]?\s*(.+)")
_NAMES_CHOICE = re.compile(r"(?<![\\A-Za-z])[A-Z](?![A-Za-z])|\?")
_PEOPLE = re.compile(r"[A-Z][\w'-]*(?:(?:, (?:and )?| and )[A-Z][\w'-]*)*")


def answer_of(response: str) -> str | None:
    """Return the answer of a response, normalized; a list if it names several; None for none."""
    if fenced := _FENCED.fullmatch(response):
        response = fenced["line"]
    named = [normalize(without_reason(text)) for text in named_answers(response)]
    if any(len(text) > MAX_ANSWER_CHARACTERS for text in named):
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
    alone = last.strip() == response.strip() and len(last) <= MAX_ANSWER_CHARACTERS
    if alone and not _is_prose(answer := _without_lead(without_reason(last))):
        return normalize(answer) or None
    sentence = ([part for part in _SENTENCE_START.split(last) if part.strip()] or [""])[-1]
    return _only_answer_of(sentence) if len(sentence) <= MAX_ANSWER_CHARACTERS else None


def _without_lead(line: str) -> str:
    """Return a line without "Thus," and "Total:" before its answer."""
    lead = _LEAD.match(line)
    if lead and not (hedges(lead[0]) or denies(lead[0]) or talks(lead[0])):
        line = line[lead.end() :]
    return re.sub(r"(?<=\w)\s+(?:equals|is)\s+(?=[-$\\\d(])", " = ", line)


def _key(text: str) -> object:
    """Return a key that is equal for two spellings of the same quantity or of the same text."""
    quantity = parse_quantity(text)
    return compact(text) if quantity is None or quantity.unit else quantity.value


def _is_prose(line: str) -> bool:
    text = normalize(line)
    if (
        parse_quantity(text) is not None
        or read_real_set(text.lower())
        or _PEOPLE.fullmatch(line.strip(" ."))
    ):
        return False
    many = len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}", line)) > 2
    return many or _SHORT_SENTENCE.match(line) is not None or _is_chinese_sentence(line)


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
    spans = {span for span in spans if not re.fullmatch(r"[A-Za-z]?", span)} or spans
    if not any(re.search(r"\d|\\", span) for span in spans):
        if _ARITHMETIC.search(sentence):
            return None
        spans = {normalize(text.rstrip(",")) for text in _SPAN_NUMBER.findall(sentence)}
    if len({_key(span) for span in spans}) != 1:
        return None
    return next(iter(spans))


def spellings(gold: str, answer: str) -> list[str]:
    """Return an answer without its approximation; that too if the gold answer is a decimal."""
    match = _APPROXIMATION.match(answer)
    about = parse_quantity(match["about"]) if match else None
    if match is None or about is None:
        return [answer]
    decimal = re.fullmatch(r"[+-]?\d*\.\d+.*", gold) is not None
    exact = match["exact"].strip(" ,$(")
    if not exact or name_and_value(f"{exact} = 0")[0]:
        return [match["about"]] if decimal else []
    place = _value_of(exact.rpartition("=")[2].strip())
    digits = re.search(r"\.(\d+)", match["about"])
    step = Fraction(1, 10 ** (len(digits[1]) if digits else 0))
    near = place is not None and abs(Fraction(place) - about.value) <= step * Fraction(501, 1000)
    if not near:
        return []
    return [exact, match["about"]] if decimal else [exact]


def split_choice(text: str) -> tuple[str, str]:
    """Return ("C", "5") for "(C) 5", the choice of a contest; ("", text) for any other text.

    What stands behind the letter must neither name another choice nor take it back.
    """
    match = _CHOICE.fullmatch(text)
    rest = match[2] if match else ""
    if match is None or _NAMES_CHOICE.search(rest) or hedges(rest) or denies(rest) or talks(rest):
        return "", text
    return match[1], normalize(rest)


def _value_of(text: str) -> Fraction | float | None:
    quantity = parse_quantity(text)
    if quantity is not None:
        return quantity.value
    expression = read_small(text)
    return expression.number if expression else None
