r"""Take apart lists, tuples, sets, matrices and named values, as texts."""

import re
from itertools import pairwise

from ernie_train.rewards.verifiers.answer_text import bracket_depths, squeeze
from ernie_train.rewards.verifiers.expressions.notation import compact, normalize
from ernie_train.rewards.verifiers.quantities import parse_quantity

# What may have a value: x, x_1, f(2), (x, y), \angle ABC, AB, |AB|, P(A), m + n, Area, \cos x.
_NAMED = re.compile(
    r"(\([a-z](?:,\s?[a-z])+\)|[A-Za-z](?:_\{?\w+\}?)?'*(?:\([\w, +-]{1,12}\))?"
    r"|(?:m\s?)?\\(?:angle|triangle|overline|overrightarrow|vec|hat|widehat|bar)\s*\{?\s?[A-Z]{1,4}\}?"
    r"|\|?[A-Z]{2,4}\|?|[A-Z][a-z]{2,}(?:\s[a-z]{2,}){0,2}|[a-z]{4,}(?:\s[a-z]{2,}){0,2}"
    r"|[a-z](?:\s?\+\s?[a-z]){1,3}|\\(?:sin|cos|tan|cot)\s?\\?[A-Za-z]+"
    r"|\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi"
    r"|rho|sigma|tau|upsilon|(?:var)?phi|chi|psi|omega|ell)(?:_\{?\w+\}?)?)"
    r"\s*(=|\\in\b)\s*"
)
_LIST = re.compile(r",(?!\d{3}(?!\d))|,(?=\s)|;|\b(?:or|and)\b|或者?|和|与|以?及")
_BRACKETS = {("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}"),
             ("\\langle", "\\rangle")}  # fmt: skip
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}\s*[)\]]?"
)


def matrix_rows(text: str) -> list[list[str]]:
    """Return the cells of a matrix by rows; [] for other texts."""
    match = _MATRIX.fullmatch(text)
    if match is None:
        return []
    rows = [row for row in match[2].split("\\\\") if row.strip()]
    return [[squeeze(cell) for cell in row.split("&")] for row in rows]


def elements_of(members: list[str]) -> list[str]:
    r"""Return the content of a lone \{..\}: a list of solutions may be written as their set."""
    shape = bracketed(name_and_value(members[0])[1]) if len(members) == 1 else None
    return members_of(shape[1]) if shape and shape[0] == "\\{\\}" else members


def members_of(text: str) -> list[str]:
    r"""Return the parts between commas (or, and, \cup) outside of brackets; \pm makes two."""
    if "\\cup" in text:
        parts = [squeeze(part) for part in text.split("\\cup")]
        return parts if all(bracketed(part) for part in parts) else [text]
    if parse_quantity(text) is not None:
        return [text]
    depths = bracket_depths(text)
    outside = [match.span() for match in _LIST.finditer(text) if depths[match.start()] == 0]
    cuts = [(0, 0), *outside, (len(text), len(text))]
    parts = [text[end:start].strip() for (_, end), (start, _) in pairwise(cuts)]
    if len(parts) > 1 and "$" in text:
        parts = [normalize(part) for part in parts]
    return [one for part in parts if part for one in _both_signs(part)] or [text]


def tuple_members(golds: list[str], answers: list[str]) -> list[list[str]]:
    """Return both sides in order if one side names each value (x = 3, y = 4) and one does not."""
    sides = []
    for members in (golds, answers):
        shape = bracketed(members[0]) if len(members) == 1 else None
        sides.append(members_of(shape[1]) if shape and shape[0] == "()" else members)
    named = [[name_and_value(text)[0] for text in side] for side in sides]
    distinct = [len(set(names)) == len(names) > 1 and all(names) for names in named]
    one_only = any(distinct) and not all(any(names) for names in named)
    return [[name_and_value(text)[1] for text in side] for side in sides] if one_only else []


def _both_signs(text: str) -> list[str]:
    r"""Return 1 + x, 1 - x for 1 \pm x; any other text as it is."""
    if text.count("\\pm") != 1 or text.startswith("\\{"):
        return [text]
    return [squeeze(re.sub(r"(^|=\s*)\+\s*", r"\1", text.replace("\\pm", sign))) for sign in "+-"]


def bracketed(text: str) -> tuple[str, str] | None:
    """Return (brackets, content) if one pair encloses a text of several members, else None."""
    for opening, closing in _BRACKETS:
        if not (text.startswith(opening) and text.endswith(closing)):
            continue
        inside = text[len(opening) : -len(closing)]
        if min(bracket_depths(inside), default=0) < 0:
            return None
        if opening == "\\{" or len(members_of(inside)) > 1:
            return opening + closing, inside
    return None


def name_and_value(text: str) -> tuple[str, str]:
    """Return ("x", "5") for x = 5; ("", text) if the text gives no value to one name."""
    match = _NAMED.match(text)
    if match is None or "=" in text[match.end() :] or not text[match.end() :]:
        return "", text
    return compact(match.group(1)), text[match.end() :]


def turned_alike(gold: str, answer: str) -> tuple[str, str]:
    r"""Return two equations, the sides of one changed if both then begin with the same name.

    y = x is turned for x = y, and \pi r^2 = A for A = \pi r^2; other texts stay as they are.
    """
    sides = [[squeeze(side) for side in text.split("=")] for text in (gold, answer)]
    names = [name_and_value(text)[0] for text in (gold, answer)]
    if any(len(pair) != 2 or not all(pair) for pair in sides) or names[0] == names[1]:
        return gold, answer
    turned = [f"{right} = {left}" for left, right in sides]
    if names[0] and name_and_value(turned[1])[0] == names[0]:
        return gold, turned[1]
    if names[1] and name_and_value(turned[0])[0] == names[1]:
        return turned[0], answer
    return gold, answer
