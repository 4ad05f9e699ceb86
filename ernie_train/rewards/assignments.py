"""Who is what: truth assignments such as those of knights and knaves, in any order.

An assignment is written as sentences ("Zoey is a knight, and Ethan is a knave.", "(1) Zoey is a
knight", "Zoey: knight", "Zoey and Ethan are knights"). Each person must be named exactly once, and
nobody else may be named; what a sentence leaves open or denies counts as wrong.
"""

import re
from collections.abc import Collection, Mapping

from ernie_train.rewards.answer_text import (
    MAX_RESPONSE_CHARACTERS,
    fold,
    hedges,
    named_answers,
    squeeze,
)
from ernie_train.rewards.score import Score

_NAME = r"[A-Z][A-Za-z'-]{0,40}"
_NAMES = re.compile(rf"{_NAME}(?:(?:\s?,\s(?:and\s)?|\sand\s){_NAME}){{0,20}}")
_IS = re.compile(r"\s*(?:\bis\b|\bare\b|:|=)\s*(?:both\s|all\s)?(?:an?\s)?\s*([A-Za-z]{1,40})")
_NUMBERS = re.compile(r"\(\d+\)|(?m:^[ \t]*(?:\d+[.)]|[-*])\s)")


def parse_assignment(text: str, roles: Collection[str]) -> dict[str, str] | None:
    """{person: role} as a text says it; None where it contradicts, repeats or hedges."""
    found: dict[str, str] = {}
    text = _NUMBERS.sub("; ", text.replace("**", ""))
    text = re.sub(r"\\(?:text|\\|newline)|[{}$]", " ", text)
    position = 0
    while names := _NAMES.search(text, position):
        position = names.end()
        said = _IS.match(text, position)
        if said is None:
            continue
        position = said.end()
        role = _singular(said[1], roles)
        if role is None:
            continue
        for name in re.findall(_NAME, names.group()):
            if name in found:
                return None
            found[name] = role
    return found if not hedges(text) else None


def grade_assignment(gold: Mapping[str, str], response: str) -> Score:
    """Exactly the people of `gold`, each with the role that it gives them."""
    roles = {fold(role) for role in gold.values()}
    if roles <= {"knight", "knave"}:
        roles = {"knight", "knave"}
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return Score.wrong(f"a response of {len(response)} characters")
    texts = named_answers(response) or [response]
    if len(texts) > 1 and len(set(map(squeeze, texts))) > 1:
        return Score.wrong("the response names several answers")
    # "The answer is:" may stand on a line of its own, above the list.
    found = parse_assignment(texts[0], roles) or parse_assignment(response, roles)
    if found is None:
        return Score.wrong("the response contradicts itself, repeats a person or leaves it open")
    if found == {name: fold(role) for name, role in gold.items()}:
        return Score.correct()
    told = ", ".join(f"{name} {role}" for name, role in sorted(found.items())) or "nobody"
    return Score.wrong(f"not the assignment: {told[:200]}")


def _singular(word: str, roles: Collection[str]) -> str | None:
    word = fold(word)
    return next((role for role in roles if word in (role, role + "s")), None)
