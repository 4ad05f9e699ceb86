"""Settings of an environment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import Positive, PositiveInt, StrictConfig

BuiltIn = Literal["calculator", "python", "lookup"]


class ToolFile(StrictConfig):
    """A file whose public functions are tools; types and docstrings make their schemas."""

    python: Annotated[str, Field(min_length=1)]
    """A file whose public functions are tools; relative paths start where the command does."""


class EnvironmentConfig(StrictConfig):
    """Tools that the policy may call over several turns."""

    tools: Annotated[list[BuiltIn | ToolFile], Field(min_length=1)]
    """`calculator`, `python` (in the sandbox), `lookup` (in a row's `table`), and files of your own
    (docs/tools.md).
    """
    max_turns: Annotated[int, Field(ge=2)] = 8
    """Turns of the assistant; an episode that calls a tool in the last one is cut off."""
    max_tool_seconds: Positive = 5.0
    """Seconds that one call may take; for `python` processor time, together with the episode's
    earlier cells.
    """
    max_tool_tokens: PositiveInt = 256
    """Longest result of a tool, in tokens; a longer one is cut."""

    @model_validator(mode="after")
    def _no_tool_twice(self) -> EnvironmentConfig:
        names = [tool if isinstance(tool, str) else tool.python for tool in self.tools]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tools has {', '.join(twice)} twice")
        return self

    @property
    def files(self) -> list[str]:
        """Return the files that it reads."""
        return [tool.python for tool in self.tools if isinstance(tool, ToolFile)]
