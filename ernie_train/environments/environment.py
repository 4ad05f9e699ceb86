"""The environment of tools: it executes the calls of a turn; one without calls ends the episode."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ernie_train.core.errors import (
    ConfigError,
    DataError,
    ErnieTrainError,
    Interrupted,
    ToolFailure,
)
from ernie_train.data import (
    Record,
    Tokenizer,
    mark_markup,
    prompt_ids,
    render_chat,
    require_chat_template,
    tool_result_ids,
)
from ernie_train.data.completion_format import ToolCall, parse_completion
from ernie_train.environments.calculator import Calculator
from ernie_train.environments.config import BuiltIn, EnvironmentConfig
from ernie_train.environments.lookup import TABLE, Lookup
from ernie_train.environments.python_cells import PythonCells
from ernie_train.environments.tool import Tool, ToolContext, ToolError
from ernie_train.environments.user_tools import UserTools

Message = dict[str, Any]

MAX_CALLS = 8  # of one turn; further ones are answered by an error
_CHARACTERS_PER_TOKEN = 16  # more of a result are never encoded
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufdd0-\ufdef\ufffe\uffff]")
_CUT = " [cut]"
_REFUSED = "error: the result contains a control token of the chat format"
_NO_TOOL = "unknown"  # the name of a tool that there is not: the one in the call is foreign text
_BUILT_IN: dict[BuiltIn, Callable[[], Tool]] = {
    "calculator": Calculator,
    "lookup": Lookup,
    "python": PythonCells,
}
_QUESTION: Message = {"role": "user", "content": "?"}


@dataclass(frozen=True)
class StepResult:
    """Hold the answer of an environment to a turn.

    messages: results of the turn's calls, for the model. done: the episode ends with this turn.
    failed: of each call, whether it did.
    """

    messages: list[Message]
    done: bool
    failed: list[bool] = field(default_factory=list)


class Toolbox:
    """The tools of an environment, shared by all episodes; `close` ends their processes."""

    def __init__(
        self,
        config: EnvironmentConfig,
        tools: Mapping[str, Tool],
        tokenizer: Tokenizer,
        resources: ExitStack,
    ) -> None:
        self.config, self.tools, self.tokenizer = config, tools, tokenizer
        self._resources = resources

    def close(self) -> None:
        """End all processes of tools."""
        self._resources.close()

    def serves(self, record: Record) -> bool:
        """Return whether a problem is an episode here; else it is answered in one turn.

        Problems about making a call (`reward: tool_call`), and those with tools of their own that
        are not all here, are answered in one turn.
        """
        own = {_function(tool).get("name") for tool in record.tools or ()}
        return record.fields.get("reward") != "tool_call" and own <= self.tools.keys()

    def offer(self, record: Record) -> Record:
        """Return a problem as an episode of it is asked: with its own choice of tools, or all.

        What follows its last question, such as a demonstration, is left out. `lookup` is offered to
        rows with a table alone. Raises `DataError` for a table that is none.
        """
        if not self.serves(record):
            return record
        questions = [at for at, m in enumerate(record.messages) if m["role"] == "user"]
        asked = record.messages[: questions[-1] + 1] if questions else record.messages
        table = record.fields.get(TABLE)
        if table is not None and not isinstance(table, dict):
            raise DataError(f"{record.source}: {TABLE} must be an object of keys and entries")
        chosen = {_function(tool)["name"] for tool in record.tools or ()} or self.tools.keys()
        usable = [name for name in self.tools if name in chosen and (name != "lookup" or table)]
        if record.tools and len(usable) < len(chosen):
            raise DataError(f"{record.source}: a row that offers lookup needs a {TABLE}")
        schemas = [self.tools[name].schema for name in usable]
        fields = {**record.fields, **({"tools": schemas} if schemas else {})}
        return replace(record, messages=asked, tools=schemas or None, fields=fields)

    def result_ids(self, results: Sequence[Message]) -> list[int]:
        """Encode results, and the generation prompt behind them, as the template writes them."""
        first = next(iter(self.tools))
        known = [m["name"] if m["name"] in self.tools else first for m in results]
        schemas = [tool.schema for tool in self.tools.values()]
        return tool_result_ids(self.tokenizer, known, results, schemas)

    def format_result(self, text: str) -> tuple[str, bool]:
        """Return foreign text as a result may show it, and whether it was refused.

        It is bounded and has no control characters. Where the recipe refuses control tokens, a text
        with one is an error that does not quote it.
        """
        most = self.config.max_tool_tokens
        read = text[: most * _CHARACTERS_PER_TOKEN]
        shown = _CONTROL.sub("\ufffd", read.replace("\r\n", "\n"))
        shown = shown.encode("utf-8", "replace").decode("utf-8")
        try:
            marked = self.tokenizer.mark_control_tokens(shown, "a tool's result")
        except DataError:
            return self.format_result(_REFUSED)[0], True
        _, places = self.tokenizer.encode_marked(mark_markup(marked))
        if len(places) <= most and read == text:
            return shown, False
        return shown[: places[most][0] if most < len(places) else None] + _CUT, False


class ToolEnvironment:
    """One episode with the tools of a `Toolbox`; a stop is looked for before each call.

    The verifier grades its last turn.
    """

    def __init__(
        self, toolbox: Toolbox, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self._toolbox, self._stop_requested = toolbox, stop_requested
        self._context = self._context_of({})
        self._offered: set[str] = set()

    def reset(self, record: Record) -> list[Message]:
        """Begin an episode with a problem; return the messages that the assistant answers."""
        record = self._toolbox.offer(record)
        self._offered = {_function(tool)["name"] for tool in record.tools or ()}
        self._context = self._context_of(record.fields)
        return list(record.prompt_messages)

    def step(self, turn: str) -> StepResult:
        """Execute the calls of a turn, given as its text; one without a call ends the episode.

        Raises `ToolFailure` where a tool cannot run, and `Interrupted` when a stop is requested.
        """
        template = require_chat_template(self._toolbox.tokenizer)
        parsed = parse_completion(
            turn, thinking=template.opens_thinking, tagged=template.has_response_tags
        )
        if not parsed.tool_calls:
            return StepResult([], done=True)
        messages, failures = [], []
        for number, call in enumerate(parsed.tool_calls[: MAX_CALLS + 1]):
            if self._stop_requested():
                raise Interrupted("stopped on a signal while tools were called")
            try:
                if number == MAX_CALLS:
                    raise ToolError(f"a turn may make {MAX_CALLS} calls; no further one was made")
                text, failed = self._execute_call(call), False
            except ToolError as error:
                text, failed = f"error: {error}", True
            shown, refused = self._toolbox.format_result(text)
            name = call.name if call.name in self._toolbox.tools else _NO_TOOL
            messages.append({"role": "tool", "name": name, "content": shown})
            failures.append(failed or refused)
        return StepResult(messages, done=False, failed=failures)

    def _execute_call(self, call: ToolCall) -> str:
        """Return the result of a call; raises `ToolError` for one that the policy got wrong."""
        if call.arguments is None:
            raise ToolError("the call is not JSON with a name and arguments")
        if call.name not in self._offered:
            offered = ", ".join(sorted(self._offered))
            raise ToolError(f"there is no tool of this name, only {offered or 'none'}")
        try:
            return self._toolbox.tools[call.name].call(call.arguments, self._context)
        except (ErnieTrainError, OSError) as error:  # nothing that the policy should learn from
            raise ToolFailure(f"the tool {call.name} cannot run: {error}") from error

    def _context_of(self, row: Mapping[str, Any]) -> ToolContext:
        config = self._toolbox.config
        characters = config.max_tool_tokens * _CHARACTERS_PER_TOKEN + 1
        return ToolContext(row, config.max_tool_seconds, characters)


def build_toolbox(config: EnvironmentConfig, tokenizer: Tokenizer, base_directory: Path) -> Toolbox:
    """Return the tools of a recipe's environment; files are relative to `base_directory`.

    Raises `ConfigError` where the chat template cannot carry them, `UserError` for a file that is
    no tools, and `SandboxUnavailable` where Python is asked for and no sandbox works.
    """
    tools: list[Tool] = []
    with ExitStack() as resources:
        for asked in config.tools:
            if isinstance(asked, str):
                tools.append(_BUILT_IN[asked]())
            else:
                file = (base_directory / Path(asked.python).expanduser()).resolve()
                own = UserTools(file)
                resources.callback(own.close)
                tools += own.tools
        named = {tool.schema["function"]["name"]: tool for tool in tools}
        if len(named) < len(tools):
            names = [tool.schema["function"]["name"] for tool in tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"environment.tools: two tools have the name {twice!r}")
        toolbox = Toolbox(config, named, tokenizer, resources.pop_all())
    try:
        _check_format(toolbox)
    except DataError as error:
        toolbox.close()
        raise ConfigError(f"environment: {error}") from None
    return toolbox


def open_toolbox(
    config: EnvironmentConfig | None, tokenizer: Tokenizer, base_directory: Path
) -> AbstractContextManager[Toolbox | None]:
    """Return a context with the tools of an environment, or with None where there is none.

    Raises the errors of `build_toolbox`.
    """
    if config is None:
        return nullcontext()
    return closing(build_toolbox(config, tokenizer, base_directory))


def _check_format(toolbox: Toolbox) -> None:
    """Check that the chat format shows tools and results, and writes calls as they are read.

    Raises `DataError` with what it cannot do.
    """
    tokenizer = toolbox.tokenizer
    origin = require_chat_template(tokenizer).origin
    name, tool = next(iter(toolbox.tools.items()))
    if prompt_ids(tokenizer, [_QUESTION], [tool.schema]) == prompt_ids(tokenizer, [_QUESTION]):
        raise DataError(f"{origin} does not show tools to the model")
    called = {"function": {"name": name, "arguments": {"a": "1"}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [called]}
    before = render_chat(tokenizer, [_QUESTION], [tool.schema])
    text = render_chat(tokenizer, [_QUESTION, turn], [tool.schema])
    calls = parse_completion(text[len(before) :], thinking=False).tool_calls
    if [(call.name, call.arguments) for call in calls] != [(name, {"a": "1"})]:
        raise DataError(
            f"{origin} writes calls otherwise than as <tool_call> with JSON, which alone is read"
        )
    results = [
        toolbox.result_ids([{"role": "tool", "name": name, "content": text}]) for text in ("1", "2")
    ]
    if results[0] == results[1]:
        raise DataError(f"{origin} does not show the results of tools")


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function") or tool
    return function if isinstance(function, Mapping) else {}
