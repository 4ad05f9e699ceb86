"""Mathematics: reasoning-gym's chain_sum, leg_counting and simple_equations, worked out."""

import random
import re

from .base import Item, Slip, count_down, count_on
from .gym import draw


def chain_sum(rng: random.Random) -> Item | None:
    """Ask for three numbers of one digit, added and subtracted from left to right by counting."""
    entry = draw("chain_sum", rng, min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
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
        slip=_from_the_right(expression),
    )


def _from_the_right(expression: str) -> Slip | None:
    """Take `a - b + c` for a - (b + c); None if that cannot be counted or changes nothing."""
    a, sign, b, operator, c = expression.split()
    inner = int(b) + int(c) if operator == "+" else int(b) - int(c)
    if sign == "+" or inner < 0 or int(c) == 0:
        return None
    steps = [_count(int(b), operator, int(c)), _count(int(a), "-", inner)]
    return Slip("\n".join(steps), str(int(a) - inner))


def _count(total: int, operator: str, term: int) -> str:
    """Return `6 - 2, 2:5 1:4`, an operation and its result by counting in ones."""
    return f"{total} {operator} {term}, {count_on(total, 1 if operator == '+' else -1, term)}"


def _column_steps(larger: int, smaller: int, operator: str) -> list[str]:
    """Return the steps of column addition or subtraction, ones first, as taught at school."""
    steps, carry = [], 0
    width = len(str(larger))
    for upper, lower in zip(str(larger)[::-1], f"{smaller:0{width}d}"[::-1], strict=True):
        top, bottom = int(upper), int(lower)
        if operator == "+":
            total = top + bottom + carry
            steps.append(f"{top} + {bottom}" + (" + 1" if carry else "") + f" = {total}")
            carry = int(total > 9)
        else:
            borrow = int(top - bottom - carry < 0)
            total = top + 10 * borrow - bottom - carry
            shown = f"{top + 10 * borrow} - {bottom}" + (" - 1" if carry else "")
            steps.append(f"{shown} = {total}")
            carry = borrow
    return steps


def column_sum(rng: random.Random) -> Item | None:
    """Ask for the sum or difference of two numbers of two digits, column by column."""
    entry = draw("chain_sum", rng, min_terms=2, max_terms=2, min_digits=2, max_digits=2)
    expression = entry["metadata"]["expression"]
    first, operator, second = expression.split()
    one, other = int(first), int(second)
    lines = []
    if operator == "-" and one < other:
        lines.append(f"-({other} - {one})")
    lines += _column_steps(max(one, other), min(one, other), operator)
    return Item(
        key=expression,
        prompt=entry["question"],
        think="\n".join(lines),
        answer=entry["answer"],
        reward="math",
    )


def leg_counting(rng: random.Random) -> Item | None:
    """Ask for the legs of two kinds of animals, at most eight and even, up to three of each."""
    return _leg_counting(rng, kinds=2, most=3, legs={0, 2, 4, 6, 8})


def leg_counting_four(rng: random.Random) -> Item | None:
    """Ask for the legs of four kinds of animals of any sort, up to nine of each."""
    return _leg_counting(rng, kinds=4, most=9)


def _leg_counting(
    rng: random.Random, kinds: int, most: int, legs: set[int] | None = None
) -> Item | None:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    entry = draw("leg_counting", rng, min_animals=kinds, max_animals=kinds, max_instances=most)
    question = entry["question"].split("\n\n")[1]  # The first paragraph is the same everywhere.
    counts = entry["metadata"]["animals"]
    if legs is not None and not {ANIMALS[animal] for animal in counts} <= legs:
        return None
    legs_of = {animal: ANIMALS[animal] for animal in counts}
    lines, _ = _added_legs(counts, legs_of)
    return Item(
        key=str(sorted(counts.items())),
        prompt=f"H{question.strip().removeprefix('Now, h')}",
        think="\n".join(lines),
        answer=entry["answer"],
        reward="math",
        slip=_single_ones_forgotten(counts, legs_of),
    )


def _added_legs(counts: dict[str, int], legs: dict[str, int]) -> tuple[list[str], int]:
    """Return the worked steps, a line for each kind of animal, and the sum."""
    total, lines = 0, []
    for animal, number in counts.items():
        lines.append(f"{number} * {legs[animal]}, {count_on(total, legs[animal], number)}")
        total += number * legs[animal]
    return lines, total


def _single_ones_forgotten(counts: dict[str, int], legs: dict[str, int]) -> Slip | None:
    """Pass over the kinds of which there is one; None if all or none are single."""
    several = {animal: number for animal, number in counts.items() if number > 1}
    lines, total = _added_legs(several, legs)
    right = _added_legs(counts, legs)[1]
    return Slip("\n".join(lines), str(total)) if several and total != right else None


_EQUATION = re.compile(
    r"(?:(?P<factor>\d+)\*)?(?P<name>[a-z])(?: (?P<sign>[+-]) (?P<shift>\d+))? = (?P<right>\d+)"
)


def simple_equations(rng: random.Random) -> Item | None:
    """Ask for the unknown of a linear equation: the constant to the other side, then divide."""
    entry = draw("simple_equations", rng, max_terms=2, max_value=6)
    equation, answer = entry["metadata"]["equation"], int(entry["answer"])
    found = _EQUATION.fullmatch(equation)
    if found is None or int(found["factor"] or 1) > 6:
        return None
    factor, right, lines = int(found["factor"] or 1), int(found["right"]), []
    if found["shift"] is not None:
        shift = int(found["shift"])
        lines.append(_count(right, "-" if found["sign"] == "+" else "+", shift))
        right += -shift if found["sign"] == "+" else shift
    if factor * answer != right:
        raise ValueError(f"simple_equations: {equation!r} does not give {answer}")
    # After a subtraction the division that is left is easily forgotten.
    forgotten = found["sign"] == "+" and factor > 1
    slip = Slip("\n".join(lines), str(right)) if forgotten else None
    lines.append(f"{right} / {factor}, {count_down(right, factor)}")
    return Item(
        key=equation.replace(found["name"], "x"),
        prompt=entry["question"],
        think="\n".join(lines),
        answer=entry["answer"],
        reward="math",
        slip=slip,
    )
