"""Grade one label out of a few: true/false/unknown, or a multiple choice by letter or by text."""

import re
import string
from collections.abc import Callable, Sequence

from ernie_train.rewards.score import Score
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

TRUTH_LABELS = ("true", "false", "unknown")
# Other words for the same label.
_SYNONYMS = {
    "uncertain": "unknown", "undetermined": "unknown", "correct": "true", "incorrect": "false",
    "真": "true", "对": "true", "正确": "true", "是": "true", "假": "false", "错": "false",
    "错误": "false", "否": "false", "未知": "unknown", "不确定": "unknown", "无法确定": "unknown",
    "不能确定": "unknown", "无法判断": "unknown",
}  # fmt: skip
_LABEL = rf"(?P<label>{'|'.join((*TRUTH_LABELS, *sorted(_SYNONYMS, key=len, reverse=True)))})"
_SO = (
    r"(?:(?:therefore|thus|hence|so|then|finally|in conclusion|overall|本题|此题|所以|因此|故|综上)"
    r"[,\uff0c]?\s*)*"
)
# "The statement is therefore true.", "It must be false", "这个结论是错误的。"
_TRUTH_SENTENCE = re.compile(
    rf"{_SO}(?:(?:(?:the|this|that|given)\s+)*(?:\w+\s)?(?:statement|conclusion|claim|hypothesis|"
    r"sentence|proposition|result|value|expression|assertion|final label|label)"
    r"(?:\s+[\"\u201c'][^\"\u201d']{0,300}[\"\u201d'])?|it|this|that|\(?[A-Z]\)?)\s+"
    r"(?:is|must be|evaluates to|has to be|remains)\s+(?:therefore\s|thus\s|logically\s"
    rf"|definitely\s|necessarily\s)?[\"'*\s]*{_LABEL}[\"'*\s]*"
    r"|"
    + _SO
    + r"(?:该|这个|此|这一|上述)?(?:陈述|结论|说法|命题|判断|句子|它|这)(?:应该?|就|必然)?(?:是|为)"
    rf"{_LABEL.replace('label', 'chinese')}的?",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"^[*\s]*(?:final )?(?:label|verdict|conclusion|truth value|judge?ment)[*\s]*[:=][*\s]*",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"\(?([A-Z])\s?(?:[).:\u3001\uff1a]|[-\u2013]\s)\s*(.*)", re.DOTALL)
# "B) green", "B (green)", "B, green": a letter with the text of its choice.
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])\s?[\s).:,(\u3001\uff1a\u2013-]\s*\(?(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:\u3002]?", re.IGNORECASE)
# "So option B is right.", "The correct choice is (B) 21.5", "I choose B", "B is correct", "故选B。"
_OPTION = r"(?:\(\s?([A-Z])\s?\)|([A-Z])(?![A-Za-z]))"
_SPOKEN = re.compile(
    rf"{_SO}(?:(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?(?:option|choice|letter)\s*"
    rf"(?:is|would be|must be|:)?\s*(?:option\s)?{_OPTION}"
    rf"|(?:I|we)\s+(?:choose|pick|select|go with)\s+(?:option\s|choice\s)?{_OPTION}"
    rf"|(?:应该?)?选项?(?:是|为)?[:\uff1a]?\s*{_OPTION}"
    rf"|{_OPTION}\s*(?=(?:is|must be)\s+(?:the\s+)?(?:correct|right|best|answer)"
    r"|选?项?(?:是)?正确|选?项$))"
    r"(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_RIGHT = re.compile(
    r"\s*(?:(?:is|must be)\s+(?:the\s+)?(?:correct|right|best|answer)"
    r"(?:\s+(?:one|answer|choice|option))?"
    r"|选?项?(?:是)?正确(?:的|答案)?|选?项)\s*",
    re.IGNORECASE,
)
# "(B) green is the correct answer.", "So option B) green is right.": of a squeezed text.
_CALLED_RIGHT = re.compile(
    rf"{_SO}(?:(?:the\s+)?(?:option|choice)\s+)?(?P<choice>.+?) (?:is|must be) (?:the )?"
    r"(?:correct|right|best)(?: (?:one|answer|choice|option))?",
    re.DOTALL | re.IGNORECASE,
)
# Neither a program that mentions a label nor a question is an answer.
_CODE = re.compile(r"[=_{}`;?\uff1f]")
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\(?:[ ,;:]|quad(?![a-z]))|(?<!~)~(?!~)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\u4e00-\u9fff])|(?<=[\u3002\uff01\uff1f])\s*|\n+")


def grade_truth(gold: str, response: str) -> Score:
    """Accept exactly one of true, false and unknown (uncertain, undetermined): the right one."""
    wanted = truth_label(gold)
    if wanted is None:
        return Score.bad_gold(f"{gold[:80]!r} is none of {', '.join(TRUTH_LABELS)}")
    found: set[str] = set()
    for text in _texts(response, lambda text: _truth_said(text) is not None):
        said = _truth_said(text)
        if said is None:
            return Score.wrong("the response takes its answer back, leaves it open or is talk")
        found.add(said)
    return _one_of(found, wanted)


def _truth_said(text: str) -> str | None:
    """Return the label of a text that is one, or whose last sentence says that something is."""
    text = without_reason(_LABELLED.sub("", text), besides=TRUTH_LABELS).strip()
    if (label := truth_label(text.strip("*\"' "))) is not None:
        return label
    if _CODE.search(text):
        return None
    *before, last = [part for part in _SENTENCE.split(text) if part.strip()] or [""]
    # "I refuse to say True" and "Somebody said True" name a label and say nothing.
    match = _TRUTH_SENTENCE.fullmatch(last.strip(" *.\u3002!"))
    if match is None:
        return None
    said = truth_label(match["label"] or match["chinese"])
    earlier = [word for part in before for word in _WORDS.findall(fold(part))]
    others = {_SYNONYMS.get(word, word) for word in earlier} & set(TRUTH_LABELS)
    open_ended = any(hedges(part) or denies(part, besides=TRUTH_LABELS) for part in before)
    return None if open_ended or others - {said} else said


def truth_label(text: str) -> str | None:
    """Return the truth label that a text consists of."""
    label = fold(text).rstrip(".\u3002")
    label = _SYNONYMS.get(label, label)
    return label if label in TRUTH_LABELS else None


def grade_choice(gold: str, choices: Sequence[str], response: str) -> Score:
    """Accept exactly one of `choices`, by its letter, its text, or both if they agree.

    `gold` is a letter or a text; letters go by position, and texts may begin with theirs
    ("B) 21"). Bad gold if it is neither, or if two choices have the same text.
    """
    texts = [_without_letter(choice, place) for place, choice in enumerate(choices)]
    if len(set(map(_key, texts))) < len(texts) or not 1 < len(texts) <= 26:
        return Score.bad_gold("choices must be 2 to 26 different texts")
    wanted = _read_choice(gold, texts)
    if wanted is None:
        return Score.bad_gold(f"the answer {gold[:80]!r} is none of the choices")
    found: set[str] = set()
    for text in _texts(response, lambda text: bool(_choices_said(text, texts))):
        said = _choices_said(text, texts)
        if not said:
            return Score.wrong(f"{text[:80]!r} names no choice")
        found |= said
    return _one_of(found, wanted)


def chosen_label(response: str, choices: Sequence[str] = ()) -> str | None:
    """Return the truth label, or the letter of one of `choices`, that a response gives.

    None if it gives none, or several.
    """
    texts = [_without_letter(choice, place) for place, choice in enumerate(choices)]

    def said(text: str) -> set[str]:
        return _choices_said(text, texts) if texts else {_truth_said(text) or ""} - {""}

    found = [said(text) for text in _texts(response, lambda text: bool(said(text)))]
    labels = set().union(*found)
    return labels.pop() if all(found) and len(labels) == 1 else None


def _choices_said(text: str, choices: Sequence[str]) -> set[str]:
    read = _read_choice(text, choices)
    return {read} if read is not None else _spoken_choices(text, choices)


def _one_of(found: set[str], wanted: str) -> Score:
    if len(found) != 1:
        named = ", ".join(sorted(found)) or "none"
        return Score.wrong(f"one label is asked for, the response names {named}")
    return Score.correct() if wanted in found else Score.wrong(f"{found.pop()} is not {wanted}")


def _texts(response: str, is_answer: Callable[[str], bool]) -> list[str]:
    """Return the answers that the response names, or else all of it.

    Boxes that hold no answer are formulas, if one is announced behind them.
    """
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return []
    texts = [_plain(text) for text in named_answers(response) or [response]]
    if not any(map(is_answer, texts)):
        behind = [_plain(text) for text in announced_behind_boxes(response)]
        return behind if behind and texts[-1] else texts
    return texts


def _plain(text: str) -> str:
    return _LATEX_SPACE.sub(" ", _LATEX_TEXT.sub(r"\1", text)).strip(" $*`\n\t")


def _without_letter(choice: str, place: int) -> str:
    text = _plain(choice)
    match = _PREFIX.match(text)
    lettered = match is not None and match[1] == string.ascii_uppercase[place]
    return match[2].strip() if match is not None and lettered else text


def _read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a text consists of; None for other texts."""
    by_text = {_key(choice): string.ascii_uppercase[i] for i, choice in enumerate(choices)}
    text = text.strip()
    if (letter := by_text.get(_key(text))) is not None:
        return letter
    text = without_reason(text).strip()
    letters = set(by_text.values())
    if (match := _LETTER.fullmatch(text)) and match[1].upper() in letters:
        return match[1].upper()
    if match := _LETTER_AND_TEXT.fullmatch(text):
        told = match[2], match[2].removesuffix(")")
        return match[1] if match[1] in {by_text.get(_key(text)) for text in told} else None
    return None


def _key(text: str) -> str:
    """Return a key that is equal for a choice of the row and its spelling in a response."""
    return fold(_plain(text)).removesuffix(".")


def _spoken_choices(text: str, choices: Sequence[str]) -> set[str]:
    """Return the letter that the last sentence names, as in "option B"; none in hedging or talk."""
    if hedges(text) or denies(text) or talks(text) or _CODE.search(text):
        return set()
    last = [part for part in _SENTENCE.split(text) if part.strip()][-1:]
    said = last[0].strip(" *\u3002") if last else ""
    called = _CALLED_RIGHT.fullmatch(squeeze(said.rstrip(".*")))
    if called and (named := _read_choice(called["choice"], choices)):
        return {named}
    match = _SPOKEN.fullmatch(said)
    if match is None:
        return set()
    *letters, rest = match.groups()
    letter = next(group for group in letters if group)
    rest = rest.strip(" .*")
    place = string.ascii_uppercase.find(letter)
    if not 0 <= place < len(choices):
        return set()
    told = _key(rest.lstrip(").:,-\u2013\u3001\uff1a "))
    fits = not rest or _RIGHT.fullmatch(rest) is not None or told == _key(choices[place])
    return {letter} if fits else set()
