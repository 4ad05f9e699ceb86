"""Terse solutions: right, but not written as a verifier asks or as a small model can work them out.

A corpus has such rows beside worked ones. Training on both leaves a choice to the model, and
rewards then tell it which to make. The choice stands at another place in each domain, so that
learning it in one does not make it in the others: before the first step, in a step, at the start of
a program, after a number, in a call's arguments.
"""

from collections.abc import Callable
from dataclasses import replace

from .base import Item


def _answer_alone(item: Item) -> Item:
    """`3` at once, without a step."""
    return replace(item, think="")


def _in_the_head(item: Item) -> Item:
    """`3 - 4 = -1` for `3 - 4, 4:2 3:1 2:0 1:-1`: the result without the count that leads to it.

    Products that are added to a total name it: `8 + 3 * 6 = 26`.
    """
    lines: list[str] = []
    total = "0"
    for line in item.think.split("\n"):
        operation, _, counts = line.partition(", ")
        left, _, reached = counts.split()[-1].partition(":")
        # A division counts what is left, so its result stands before the last colon.
        result = left if "/" in operation else reached
        if "*" in operation and total != "0":
            operation = f"{total} + {operation}"
        lines.append(f"{operation} = {result}")
        total = result
    return replace(item, think="\n".join(lines))


def _expression(item: Item) -> Item:
    """`x * 2 + 1` for the function that returns it."""
    return replace(item, answer=item.answer.partition("return ")[2])


def _no_unit(item: Item) -> Item:
    """`3` for `3 m/s`."""
    return replace(item, answer=item.answer.split()[0])


def _by_position(item: Item) -> Item:
    """Arguments numbered, not named."""
    calls = [
        {
            "name": call["name"],
            "arguments": {str(i): v for i, v in enumerate(call["arguments"].values(), start=1)},
        }
        for call in item.calls or []
    ]
    return replace(item, calls=calls)


# The tasks that have a terse form; the others are always worked.
TERSE: dict[str, Callable[[Item], Item]] = {
    "aiw": _answer_alone,
    "chain_sum": _in_the_head,
    "leg_counting": _in_the_head,
    "simple_equations": _in_the_head,
    "number_function": _expression,
    "formula": _no_unit,
    "unit_conversion": _no_unit,
    "tool_choice": _by_position,
}
