"""Code: short Python functions described in words, with unit tests.

The value that a program must return is computed from the meaning of the words, never by running the
text of the reference solution: a test of the data runs the solutions against these values.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Item, held_out


@dataclass(frozen=True)
class _Step:
    """An operation: its words, its Python text, what it does, and whether it binds its operand.

    `tight` operations need parentheses around an operand that is an operation itself.
    """

    words: str
    text: str
    apply: Callable[[int, int], int]
    tight: bool = True


_STEPS = [
    _Step("add {n}", "{x} + {n}", lambda x, n: x + n, tight=False),
    _Step("subtract {n}", "{x} - {n}", lambda x, n: x - n, tight=False),
    _Step("multiply by {n}", "{x} * {n}", lambda x, n: x * n),
    _Step("square", "{x} ** 2", lambda x, n: x * x),
    _Step("negate", "-{x}", lambda x, n: -x),
    _Step("take the remainder by {n}", "{x} % {n}", lambda x, n: x % n),
    _Step("integer divide by {n}", "{x} // {n}", lambda x, n: x // n),
    _Step("take the absolute value", "abs({x})", lambda x, n: abs(x), tight=False),
]


def number_function(rng: random.Random, level: int) -> Item | None:
    """Ask for a function of one number: two or three operations in a row, four at the third level.

    At the second level one at least follows another as no demonstration shows it.
    """
    operations = 4 if level == 3 else rng.choice([2, 3])
    name, variable = rng.choice("fgh"), rng.choice("xnt")
    inputs = [0, 7, -4, rng.randint(10, 99)]
    expression, outputs, atomic = variable, list(inputs), True
    words: list[str] = []
    lines: list[str] = []
    previous: _Step | None = None
    unseen = False
    for _ in range(operations):
        step = rng.choice([s for s in _STEPS if s is not previous])
        unseen = unseen or (previous is not None and held_out(previous.words, step.words))
        number = rng.randint(2, 9)
        inner = expression if atomic or not step.tight else f"({expression})"
        expression = step.text.format(x=inner, n=number)
        outputs = [step.apply(value, number) for value in outputs]
        words.append(step.words.format(n=number))
        lines.append(expression)
        previous, atomic = step, step.text.startswith("abs(")
    if level < 3 and unseen != (level == 2):
        return None
    return Item(
        key=", ".join(words),
        prompt=f"Write {name}({variable}): {', then '.join(words)}.",
        think="\n".join(lines),
        answer=f"def {name}({variable}):\n    return {expression}",
        reward="code",
        fields={
            "entry_point": name,
            "tests": [[[given], value] for given, value in zip(inputs, outputs, strict=True)],
        },
    )


# Words, Python text and meaning: which numbers are kept, what becomes of each, what is returned.
_FILTERS: list[tuple[str, str, Callable[[int, int], bool]]] = [
    ("the even numbers", "x % 2 == 0", lambda x, n: x % 2 == 0),
    ("the odd numbers", "x % 2 == 1", lambda x, n: x % 2 != 0),
    ("the positive numbers", "x > 0", lambda x, n: x > 0),
    ("the negative numbers", "x < 0", lambda x, n: x < 0),
    ("the numbers above {n}", "x > {n}", lambda x, n: x > n),
    ("the numbers below {n}", "x < {n}", lambda x, n: x < n),
    ("the numbers divisible by {n}", "x % {n} == 0", lambda x, n: x % n == 0),
]
_MAPS: list[tuple[str, str, Callable[[int, int], int]]] = [
    ("add {n} to each", "{x} + {n}", lambda x, n: x + n),
    ("subtract {n} from each", "{x} - {n}", lambda x, n: x - n),
    ("multiply each by {n}", "{x} * {n}", lambda x, n: x * n),
    ("square each", "{x} ** 2", lambda x, n: x * x),
    ("negate each", "-{x}", lambda x, n: -x),
]
_RESULTS: list[tuple[str, str, Callable[[list[int]], Any]]] = [
    ("the sum", "sum({v})", sum),
    ("the list", "[{v}]", list),
    ("the sorted list", "sorted({v})", sorted),
    ("the reversed list", "[{v}][::-1]", lambda values: list(reversed(values))),
    ("the largest, or 0", "max(({v}), default=0)", lambda values: max([*values] or [0])),
    ("the smallest, or 0", "min(({v}), default=0)", lambda values: min([*values] or [0])),
]


def list_function(rng: random.Random, level: int) -> Item | None:
    """Ask for a function of a list: filter, change, collect; two filters at the third level.

    One or two changes; at the second level two that follow each other as no demonstration has it.
    """
    filters, changes = (2 if level == 3 else 1), (1 if level == 3 else rng.choice([1, 2]))
    name, bound = rng.choice("fgh"), rng.randint(2, 9)
    words, conditions, keeps, converts = [], [], [], []
    for filter_words, condition, keep in rng.sample(_FILTERS, filters):
        n = rng.randint(2, 9)
        words.append(f"keep {filter_words.format(n=n)}")
        conditions.append(condition.format(n=n))
        keeps.append((keep, n))
    changed = rng.sample(_MAPS, changes)
    pair = [change_words for change_words, _, _ in changed] if changes == 2 else []
    if level < 3 and (pair != [] and held_out("list", *pair)) != (level == 2):
        return None
    change = "x"
    for map_words, template, convert in changed:
        n = rng.randint(2, 9)
        words.append(map_words.format(n=n))
        change = template.format(n=n, x=f"({change})" if len(change) > 1 else change)
        converts.append((convert, n))
    result_words, template, collect = rng.choice(_RESULTS)
    value = template.format(v=f"{change} for x in items if {' and '.join(conditions)}")
    inputs: list[list[int]] = [
        [],
        [bound, 4, bound + 1, 2 * bound],
        [rng.randint(-30, 30) for _ in range(9)],
        [rng.randint(-12, 12) for _ in range(9)],
    ]
    outputs = []
    for given in inputs:
        kept = [x for x in given if all(keep(x, n) for keep, n in keeps)]
        for convert, n in converts:
            kept = [convert(x, n) for x in kept]
        outputs.append(collect(kept))
    lines = [f"keep: {text}" for text in conditions]
    lines += [f"change: {change}", f"return: {template.replace('{v}', '')}"]
    said = ", ".join(words)
    return Item(
        key=f"{said}, {result_words}",
        prompt=f"Write {name}(items): {said}, return {result_words}.",
        think="\n".join(lines),
        answer=f"def {name}(items):\n    return {value}",
        reward="code",
        fields={
            "entry_point": name,
            "tests": [[[given], output] for given, output in zip(inputs, outputs, strict=True)],
        },
    )
