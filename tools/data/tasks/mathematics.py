"""Mathematics: reasoning-gym's chain_sum, leg_counting and simple_equations, worked out."""

import random
import re

from .base import Item, count_down, count_on
from .gym import draw


def chain_sum(rng: random.Random, level: int) -> Item | None:
    """Ask for three numbers of one digit, added and subtracted from left to right.

    The last two are at most 10 together at the first level, 11 to 14 at the second, and more at the
    third.
    """
    entry = draw("chain_sum", rng, min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
    together = sum(map(int, rest[1::2]))
    if level != (1 if together <= 10 else 2 if together <= 14 else 3):
        return None
    total, lines = int(first), []
    for operator, text in zip(rest[::2], rest[1::2], strict=True):
        term = int(text)
        lines.append(_count(total, operator, term))
        total += term if operator == "+" else -term
    return Item(
        key=expression,
        prompt=entry["question"],
        think="\n".join(lines),
        answer=entry["answer"],
        reward="math",
    )


def _count(total: int, operator: str, term: int) -> str:
    """Return `6 - 2, 2:5 1:4`, an operation and its result by counting in ones."""
    return f"{total} {operator} {term}, {count_on(total, 1 if operator == '+' else -1, term)}"


def leg_counting(rng: random.Random, level: int) -> Item | None:
    """Ask for the legs of two kinds of animals, at most eight and even, up to three of each.

    Up to three animals in all at the first level, four at the second, more at the third.
    """
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    entry = draw("leg_counting", rng, min_animals=2, max_animals=2, max_instances=3)
    question = entry["question"].split("\n\n")[1]  # The first paragraph is the same everywhere.
    counts = entry["metadata"]["animals"]
    legs = {animal: ANIMALS[animal] for animal in counts}
    if not set(legs.values()) <= {0, 2, 4, 6, 8}:
        return None
    animals = sum(counts.values())
    if level != (1 if animals <= 3 else 2 if animals == 4 else 3):
        return None
    total, lines = 0, []
    for animal, number in counts.items():
        lines.append(f"{number} * {legs[animal]}, {count_on(total, legs[animal], number)}")
        total += number * legs[animal]
    return Item(
        key=str(sorted(counts.items())),
        prompt=f"H{question.strip().removeprefix('Now, h')}",
        think="\n".join(lines),
        answer=entry["answer"],
        reward="math",
    )


_EQUATION = re.compile(
    r"(?:(?P<factor>\d+)\*)?(?P<name>[a-z])(?: (?P<sign>[+-]) (?P<shift>\d+))? = (?P<right>\d+)"
)


def simple_equations(rng: random.Random, level: int) -> Item | None:
    """Ask for the unknown of a linear equation: the constant to the other side, then divide.

    Of factor and constant one at least is small at the first level; neither is at the second, where
    the unknown is at most 4, and at the third, where it is 5 or 6.
    """
    entry = draw("simple_equations", rng, max_terms=2, max_value=9)
    equation, answer = entry["metadata"]["equation"], int(entry["answer"])
    found = _EQUATION.fullmatch(equation)
    if found is None or int(found["factor"] or 1) > 6:
        return None
    large = int(found["factor"] or 1) > 3 and int(found["shift"] or 0) > 4
    if answer > 6 or level != (1 if not large else 2 if answer <= 4 else 3):
        return None
    factor, right, lines = int(found["factor"] or 1), int(found["right"]), []
    if found["shift"] is not None:
        shift = int(found["shift"])
        lines.append(_count(right, "-" if found["sign"] == "+" else "+", shift))
        right += -shift if found["sign"] == "+" else shift
    if factor * answer != right:
        raise ValueError(f"simple_equations: {equation!r} does not give {answer}")
    lines.append(f"{right} / {factor}, {count_down(right, factor)}")
    return Item(
        key=equation.replace(found["name"], "x"),
        prompt=entry["question"],
        think="\n".join(lines),
        answer=entry["answer"],
        reward="math",
    )
