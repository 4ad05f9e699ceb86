"""Code: short Python functions described in words, with unit tests.

The value that a program must return is computed from the meaning of the words, never by running the
text of the reference solution: a test of the data runs the solutions against these values.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Item, Slip


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


def number_function(rng: random.Random) -> Item | None:
    """Ask for a function of one number: two or three operations in a row."""
    return _number_function(rng, rng.choice([2, 3]))


def number_function_four(rng: random.Random) -> Item | None:
    """Ask for four operations in a row."""
    return _number_function(rng, 4)


def _number_function(rng: random.Random, operations: int) -> Item:
    name, variable = rng.choice("fgh"), rng.choice("xnt")
    inputs = [0, 7, -4, rng.randint(10, 99)]
    expression, outputs, atomic = variable, list(inputs), True
    careless = variable  # the same without parentheses
    careless_lines: list[str] = []
    words: list[str] = []
    lines: list[str] = []
    previous: _Step | None = None
    for _ in range(operations):
        step = rng.choice([s for s in _STEPS if s is not previous])
        number = rng.randint(2, 9)
        inner = expression if atomic or not step.tight else f"({expression})"
        expression = step.text.format(x=inner, n=number)
        outputs = [step.apply(value, number) for value in outputs]
        words.append(step.words.format(n=number))
        lines.append(expression)
        careless = step.text.format(x=careless, n=number)
        careless_lines.append(careless)
        previous, atomic = step, step.text.startswith("abs(")
    slip = None
    # Our own few operators on small numbers: where precedence makes no difference, nothing slipped.
    if [eval(careless, {variable: x, "abs": abs}) for x in inputs] != outputs:
        slip = Slip("\n".join(careless_lines), f"def {name}({variable}):\n    return {careless}")
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
        slip=slip,
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
    ("add {n} to each", "x + {n}", lambda x, n: x + n),
    ("subtract {n} from each", "x - {n}", lambda x, n: x - n),
    ("multiply each by {n}", "x * {n}", lambda x, n: x * n),
    ("square each", "x ** 2", lambda x, n: x * x),
    ("negate each", "-x", lambda x, n: -x),
]
_RESULTS: list[tuple[str, str, Callable[[list[int]], Any]]] = [
    ("the sum", "sum({v})", sum),
    ("the list", "[{v}]", list),
    ("the sorted list", "sorted({v})", sorted),
    ("the reversed list", "[{v}][::-1]", lambda values: list(reversed(values))),
    ("the largest, or 0", "max(({v}), default=0)", lambda values: max([*values] or [0])),
    ("the smallest, or 0", "min(({v}), default=0)", lambda values: min([*values] or [0])),
]


def list_function(rng: random.Random) -> Item | None:
    """Ask for a function of a list: filter, transform, collect."""
    filter_words, condition, keep = rng.choice(_FILTERS)
    map_words, change, convert = rng.choice(_MAPS)
    result_words, template, collect = rng.choice(_RESULTS)
    bound, number, name = rng.randint(2, 9), rng.randint(2, 9), rng.choice("fgh")
    condition, change = condition.format(n=bound), change.format(n=number)
    words = f"keep {filter_words.format(n=bound)}, {map_words.format(n=number)}"
    value = template.format(v=f"{change} for x in items if {condition}")
    inputs: list[list[int]] = [
        [],
        [bound, number, bound + 1, 2 * bound],
        [rng.randint(-30, 30) for _ in range(6)],
    ]
    outputs = [collect([convert(x, number) for x in given if keep(x, bound)]) for given in inputs]
    think = f"keep: {condition}\nchange: {change}\nreturn: {template.replace('{v}', '')}"
    answer = f"def {name}(items):\n    return {value}"
    return Item(
        key=f"{words}, {result_words}",
        prompt=f"Write {name}(items): {words}, return {result_words}.",
        think=think,
        answer=answer,
        reward="code",
        fields={
            "entry_point": name,
            "tests": [[[given], output] for given, output in zip(inputs, outputs, strict=True)],
        },
        slip=_list_slip(think, answer, condition if convert(bound, number) else ""),
    )


def _list_slip(think: str, answer: str, bounded: str) -> Slip | None:
    """Forget the empty list, or let the bound of `bounded` in; None if neither applies."""
    if ", default=0" in answer:
        return Slip(think.replace(", default=0", ""), answer.replace(", default=0", ""))
    for operator in ("x > ", "x < "):
        if bounded.startswith(operator) and not bounded.endswith(" 0"):
            closed = bounded.replace(operator, f"{operator.strip()}= ")
            return Slip(think.replace(bounded, closed), answer.replace(bounded, closed))
    return None
