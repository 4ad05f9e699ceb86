"""Tools: functions with a JSON schema, made of typed Python functions with docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, get_type_hints

import pydantic

_ARGUMENT = re.compile(r"^\s*(\w+)(?: \([^)]*\))?:\s*(.+)$")


class ToolError(Exception):
    """Signal a call that failed; the policy reads its text."""


@dataclass
class ToolContext:
    """Hold what a call may use beside its arguments.

    row: the fields of the problem. limit_s: seconds for the call. max_characters: what is beyond
    them in a result is never read. memory: what tools keep for the length of one episode.
    """

    row: Mapping[str, Any]
    limit_s: float
    max_characters: int
    memory: dict[str, Any] = field(default_factory=dict)


class Tool(Protocol):
    """Answers calls of one function. `schema` is what the model is shown."""

    @property
    def schema(self) -> dict[str, Any]: ...

    def call(self, arguments: dict[str, Any], context: ToolContext) -> str:
        """Return the result as text; raises `ToolError`. Several threads may call at once."""
        ...


@dataclass(frozen=True)
class Signature:
    """Hold a function's JSON schema, and check the arguments of calls against its types."""

    schema: dict[str, Any]
    model: type[pydantic.BaseModel]

    @classmethod
    def of(cls, function: Callable[..., Any], name: str = "") -> Signature:
        """Read the signature and docstring of a function; `name` is its own by default.

        Descriptions of arguments stand in the docstring's section `Args:`, one line each. Raises
        `ValueError` for an argument without a type, a type without a JSON schema, no docstring, or
        a function that does not return its result when it is called.
        """
        name = name or function.__name__
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ValueError(f"{name} is async; a tool returns its result, without await")
        if inspect.isgeneratorfunction(function):
            raise ValueError(f"{name} is a generator; a tool returns its result, without yield")
        text = inspect.getdoc(function)
        if not text:
            raise ValueError(f"{name} needs a docstring: it tells the model what the tool does")
        description, _, listed = text.partition("\nArgs:\n")
        found = filter(None, map(_ARGUMENT.match, listed.split("\n")))
        described: dict[str, str] = {m.group(1): m.group(2) for m in found}
        hints = get_type_hints(function)
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"{name}: {parameter} has no name in a call; name each argument")
            if parameter.name not in hints:
                raise ValueError(
                    f"{name}: the argument {parameter.name} needs a type, as {parameter.name}: str"
                )
            default = ... if parameter.default is parameter.empty else parameter.default
            about = pydantic.Field(default, description=described.get(parameter.name))
            fields[parameter.name] = (hints[parameter.name], about)
        try:
            config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())
            model: Any = pydantic.create_model(name, __config__=config, **fields)
            parameters = _without_titles(model.model_json_schema())
        except (pydantic.PydanticUserError, NameError, TypeError) as error:
            raise ValueError(f"{name}: its types have no JSON schema: {error}") from None
        parameters.pop("additionalProperties", None)
        shown = {"name": name, "description": " ".join(description.split())}
        return cls({"type": "function", "function": shown | {"parameters": parameters}}, model)

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments in the function's types; raises `ToolError` with what is wrong."""
        try:
            checked = self.model.model_validate(arguments)
        except pydantic.ValidationError as error:
            problems = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}"
                for e in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            raise ToolError("; ".join(problems[:3])) from None
        return {name: getattr(checked, name) for name in checked.model_fields_set}


def _without_titles(schema: Any) -> Any:
    """Drop the titles that pydantic adds, and descriptions that are None."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str)) and value is not None
        }
    return [_without_titles(value) for value in schema] if isinstance(schema, list) else schema
