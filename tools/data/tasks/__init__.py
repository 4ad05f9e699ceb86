"""The generated tasks, by domain, each at three levels."""

from collections.abc import Iterable

from .base import Generator, Item, Task, to_row
from .code import list_function, number_function
from .logic import aiw, boolean
from .mathematics import chain_sum, leg_counting, simple_equations
from .science import formula, unit_conversion
from .toolcalls import tool_arguments, tool_choice


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
DOMAINS = tuple(dict.fromkeys(task.domain for task in TASKS))

__all__ = ["DOMAINS", "TASKS", "Item", "Task", "to_row"]
