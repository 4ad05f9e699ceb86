"""Grade one label out of a few: true/false/unknown, or a multiple choice by letter or by text."""

import re
import string
from collections.abc import Sequence

from ernie_train.rewards.score import Score
from ernie_train.rewards.verifiers.answer_text import (
    MAX_RESPONSE_CHARACTERS,
    denies,
    fold,
    hedges,
    named_answers,
)

TRUTH_LABELS = ("true", "false", "unknown")
# Names of data sets for the same label.
_SYNONYMS = {"uncertain": "unknown", "undetermined": "unknown"}
_PREFIX = re.compile(r"\(?([A-Z])\s?(?:[).:]|[-\u2013]\s)\s*(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?", re.IGNORECASE)
_SPOKEN_LETTER = re.compile(
    r"\(([A-Z])\)|\b(?i:option|choice)\s+(?:\(?([A-Z])\b|is\s+([A-Z])(?=[.,:;]|\s*$))"
)
# "B because ..", "True since ..": a label and its reason.
_REASONED = re.compile(
    r"(\(?[A-Z]\)?|true|false|unknown|uncertain|undetermined),?\s+(?:because|since)\s.*",
    re.DOTALL | re.IGNORECASE,
)
_WORDS = re.compile(r"[a-z]+(?:'[a-z]+)?")
# Neither a program that mentions a label nor a question is an answer.
_CODE = re.compile(r"[=_{}`;?]")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")


def grade_truth(gold: str, response: str) -> Score:
    """Accept exactly one of true, false and unknown (uncertain, undetermined): the right one."""
    wanted = truth_label(gold)
    if wanted is None:
        return Score.bad_gold(f"{gold[:80]!r} is none of {', '.join(TRUTH_LABELS)}")
    texts = _texts(response)
    found: set[str] = set()
    for text in texts:
        text = _REASONED.sub(r"\1", text)
        words = [_SYNONYMS.get(word, word) for word in _WORDS.findall(fold(text))]
        found |= {word for word in words if word in TRUTH_LABELS}
        if hedges(text) or denies(text, besides=TRUTH_LABELS) or _CODE.search(text):
            return Score.wrong("the response takes its answer back, leaves it open or is code")
    return _one_of(found, wanted)


def truth_label(text: str) -> str | None:
    """Return the truth label that a text consists of."""
    label = fold(text).removesuffix(".")
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
    for text in _texts(response):
        read = _read_choice(text, texts)
        spoken = {read} if read is not None else _spoken_choices(text, texts)
        if not spoken:
            return Score.wrong(f"{text[:80]!r} names no choice")
        found |= spoken
    return _one_of(found, wanted)


def _one_of(found: set[str], wanted: str) -> Score:
    if len(found) != 1:
        named = ", ".join(sorted(found)) or "none"
        return Score.wrong(f"one label is asked for, the response names {named}")
    return Score.correct() if wanted in found else Score.wrong(f"{found.pop()} is not {wanted}")


def _texts(response: str) -> list[str]:
    """Return the answers that the response names, or else all of it."""
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return []
    texts = named_answers(response) or [response]
    return [_plain(text) for text in texts]


def _plain(text: str) -> str:
    return _LATEX_TEXT.sub(r"\1", text).strip(" $*\n\t")


def _without_letter(choice: str, place: int) -> str:
    match = _PREFIX.match(choice.strip())
    lettered = match is not None and match[1] == string.ascii_uppercase[place]
    return match[2].strip() if match is not None and lettered else choice.strip()


def _read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a text consists of; None for other texts."""
    by_text = {_key(choice): string.ascii_uppercase[i] for i, choice in enumerate(choices)}
    text = text.strip()
    if (letter := by_text.get(_key(text))) is not None:
        return letter
    text = _REASONED.sub(r"\1", text)
    letters = set(by_text.values())
    if (match := _LETTER.fullmatch(text)) and match[1].upper() in letters:
        return match[1].upper()
    if match := _PREFIX.fullmatch(text):
        return match[1] if by_text.get(_key(match[2])) == match[1] else None
    return None


def _key(text: str) -> str:
    """Return a key that is equal for a choice of the row and its spelling in a response."""
    return fold(_plain(text)).removesuffix(".")


def _spoken_choices(text: str, choices: Sequence[str]) -> set[str]:
    """Return the letters that a sentence names, as in "option B"; none in hedging, denial, code."""
    if hedges(text) or denies(text) or _CODE.search(text):
        return set()
    letters = set(string.ascii_uppercase[: len(choices)])
    return {"".join(groups) for groups in _SPOKEN_LETTER.findall(text)} & letters
