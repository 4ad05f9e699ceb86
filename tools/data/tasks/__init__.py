"""The generated tasks, by domain: those of the main mix, and harder ones."""

from collections.abc import Iterable

from .base import Generator, Item, Task, to_row
from .code import list_function, number_function, number_function_four
from .logic import aiw, boolean, boolean_four, family_relationships
from .mathematics import chain_sum, column_sum, leg_counting, leg_counting_four, simple_equations
from .science import formula, unit_conversion, unit_conversion_decimal
from .toolcalls import tool_arguments, tool_choice, tool_choice_four


def _tasks(**domains: Iterable[Generator]) -> tuple[Task, ...]:
    """Return tasks that are named as their generators."""
    pairs = ((domain, generate) for domain, own in domains.items() for generate in own)
    return tuple(Task(generate.__name__, domain, generate) for domain, generate in pairs)


TASKS = _tasks(
    logic=[boolean, aiw],
    math=[chain_sum, leg_counting, simple_equations],
    code=[number_function, list_function],
    science=[formula, unit_conversion],
    tools=[tool_arguments, tool_choice],
)
# The same kinds of problems, one step harder than what a model of some million parameters learns
# in minutes: for reinforcement learning, and to see how far a model generalises.
HARD_TASKS = _tasks(
    logic=[boolean_four, family_relationships],
    math=[column_sum, leg_counting_four],
    code=[number_function_four],
    science=[unit_conversion_decimal],
    tools=[tool_choice_four],
)
DOMAINS = tuple(dict.fromkeys(task.domain for task in TASKS))

__all__ = ["DOMAINS", "HARD_TASKS", "TASKS", "Item", "Task", "to_row"]
