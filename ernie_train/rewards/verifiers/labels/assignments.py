"""Read and grade truth assignments such as those of knights and knaves, in any order.

An assignment is written as sentences ("Zoey is a knight, and Ethan is a knave.", "(1) Zoey is a
knight", "Zoey: knight", "Zoey and Ethan are knights", "Knights: Zoey, Ethan"). Each person must be
named exactly once, and nobody else may be named; a sentence that leaves a role open or
denies one makes the answer wrong.
"""

import functools
import re
from collections.abc import Collection, Mapping

from ernie_train.rewards.score import Score
from ernie_train.rewards.verifiers.answer_text import (
    MAX_RESPONSE_CHARACTERS,
    denies,
    fold,
    hedges,
    named_answers,
    squeeze,
    talks,
)

_NAME = r"[A-Z][A-Za-z'-]{0,40}"
_IS = (
    r"\s*(?:\b(?:is|are|must be)\b|:|=|->|\u2192|\||\(|(?<=\s)[-\u2013\u2014](?=\s))"
    r"\s*(?:both\s|all\s)?(?:an?\s|the\s)?\s*"
)
_CLAUSE_END = re.compile(r"[.;\n]")
_CLAUSE_CHARACTERS = 80
_ASKED = re.compile(r"[^.;\n]{0,20}[?\uff1f]")
_NUMBERS = re.compile(r"\(\d+\)|(?m:^[ \t]*(?:\d+[.)]|[-*])\s)")
# Capitalized words at the start of a sentence that are not names.
_CONNECTIVES = {"therefore", "thus", "hence", "so", "then", "finally", "and"}


def parse_assignment(
    text: str, roles: Collection[str], people: Collection[str] = ()
) -> dict[str, str] | None:
    """Return {person: role} from a text; None if it contradicts itself, repeats or hedges.

    Any word with a capital may be a name; `people` are names of other forms. If a role is
    mentioned outside of such a statement, the text is unclear: None.
    """
    name_word, names, role_said, role_word, listed_by_role = _patterns(
        frozenset(roles), frozenset(people)
    )
    text = _NUMBERS.sub("; ", text.replace("**", ""))
    text = re.sub(r'\\(?:text|\\|newline)|[{}$"]', " ", text)
    if hedges(text) or denies(text, besides=roles):
        return None
    # "Knights: Zoey, Ethan" says "Zoey, Ethan are knights".
    text = listed_by_role.sub(r" ; \g<people> are \g<role> ; ", text)
    found: dict[str, str] = {}
    rest, position, read = [], 0, 0
    while listed := names.search(text, position):
        position = listed.end()
        said = role_said.match(text, position)
        if said is None:
            continue
        rest.append(text[read : listed.start()])
        position = read = said.end()
        clause = _CLAUSE_END.split(
            text[max(0, listed.start() - _CLAUSE_CHARACTERS) : listed.start()]
        )
        if talks(clause[-1]) or _ASKED.match(text, position):
            return None
        for name in name_word.findall(listed.group()):
            if name not in people and fold(name) in _CONNECTIVES:
                continue
            if name in found:
                return None
            found[name] = fold(said[1])
    rest.append(text[read:])
    return None if any(map(role_word.search, rest)) else found


@functools.lru_cache(maxsize=1024)
def _patterns(roles: frozenset[str], people: frozenset[str]) -> tuple[re.Pattern[str], ...]:
    """Return patterns for a name, a list of names, the role given to them and any role."""
    known = [re.escape(name) for name in sorted(people, key=lambda name: (-len(name), name))]
    name = rf"(?<!\w)(?:{'|'.join([*known, _NAME])})(?!\w)"
    names = rf"{name}(?:(?:\s?,\s(?:and\s)?|\sand\s){name}){{0,20}}"
    role = "|".join(re.escape(r) for r in sorted(roles, key=lambda role: (-len(role), role)))
    by_role = (
        rf"(?:^|(?<=[.;\n])|(?<=\band))\s*(?:[Tt]he\s|[Oo]nly\s)?(?i:(?P<role>{role})s?)\s?"
        rf"(?::|are:?|is:?)\s*(?P<people>{names})(?=\s*(?:[.;\n]|$|,?\sand\s(?:the|only)\s))"
    )
    role = rf"(?i:({role})s?)(?!\w)"
    patterns = name, names, _IS + role, rf"(?<!\w){role}", by_role
    return tuple(map(re.compile, patterns))


def grade_assignment(gold: Mapping[str, str], response: str) -> Score:
    """Accept exactly the people of `gold`, each with the role that it gives them."""
    found = assignment_said(gold, response)
    if isinstance(found, str):
        return Score.wrong(found)
    if found == {name: fold(role) for name, role in gold.items()}:
        return Score.correct()
    told = ", ".join(f"{name} {role}" for name, role in sorted(found.items())) or "nobody"
    return Score.wrong(f"not the assignment: {told[:200]}")


def assignment_said(people: Mapping[str, str], response: str) -> dict[str, str] | str:
    """Return {person: role} as a response says it, or the reason why it says none.

    `people` are those that are asked for, with roles that may be given.
    """
    roles = {fold(role) for role in people.values()}
    if roles <= {"knight", "knave"}:
        roles = {"knight", "knave"}
    if len(response) > MAX_RESPONSE_CHARACTERS:
        return f"a response of {len(response)} characters"
    texts = named_answers(response) or [response]
    if len(texts) > 1 and len(set(map(squeeze, texts))) > 1:
        return "the response names several answers"
    # "The answer is:" may be on a line of its own, above the list.
    found = parse_assignment(texts[0], roles, people)
    if not found or found.keys() < people.keys():
        found = parse_assignment(response, roles, people)
    if found is None:
        return "the response contradicts itself, repeats a person or leaves it open"
    return found
