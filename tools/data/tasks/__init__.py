"""The generated tasks, by domain: those of the main mix, and harder ones."""

from . import code, logic, mathematics, science, toolcalls
from .base import Item, Task, to_row

DOMAINS = ("logic", "math", "code", "science", "tools")
TASKS = (
    Task("boolean", "logic", logic.boolean),
    Task("aiw", "logic", logic.aiw),
    Task("chain_sum", "math", mathematics.chain_sum),
    Task("leg_counting", "math", mathematics.leg_counting),
    Task("simple_equations", "math", mathematics.simple_equations),
    Task("number_function", "code", code.number_function),
    Task("list_function", "code", code.list_function),
    Task("formula", "science", science.formula),
    Task("unit_conversion", "science", science.unit_conversion),
    Task("tool_arguments", "tools", toolcalls.tool_arguments),
    Task("tool_choice", "tools", toolcalls.tool_choice),
)
# The same kinds of problems, one step harder than what a model of some million parameters learns
# in minutes: for reinforcement learning, and to see how far a model generalises.
HARD_TASKS = (
    Task("boolean_four", "logic", logic.boolean_four),
    Task("family_relationships", "logic", logic.family_relationships),
    Task("column_sum", "math", mathematics.column_sum),
    Task("leg_counting_four", "math", mathematics.leg_counting_four),
    Task("number_function_four", "code", code.number_function_four),
    Task("unit_conversion_decimal", "science", science.unit_conversion_decimal),
    Task("tool_choice_four", "tools", toolcalls.tool_choice_four),
)

__all__ = ["DOMAINS", "HARD_TASKS", "TASKS", "Item", "Task", "to_row"]
