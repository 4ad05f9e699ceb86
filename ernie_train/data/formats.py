"""Convert rows of each known format to records; RowError says why a row cannot be converted."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Message = dict[str, Any]
Kind = Literal["chat", "text", "prompt", "preference"]


class RowError(ValueError):
    """Report that a row cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Record:
    """Hold one row, independent of its format.

    kind: "chat" for messages with an assistant turn; "prompt" for messages without one; "text"; or
        "preference", where `chosen` and `rejected` are the messages that may follow `messages`.
    tools: the tools offered to the model, as JSON-schema dicts.
    fields: all other keys of the row: domain, task, answer and others that a verifier needs.
    source: "file:line".
    """

    kind: Kind
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def prompt_messages(self) -> list[Message]:
        """Return the messages without the assistant turns at the end."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]


def from_messages(row: Row) -> Record:
    """Convert an OpenAI row: `messages` with role and content, and `tools` beside them.

    An assistant message may have `tool_calls`, `reasoning_content` and `weight`.
    """
    messages = _messages(row["messages"], "messages")
    return _conversation(row, messages, {"messages", "tools", "functions"})


def from_sharegpt(row: Row) -> Record:
    """Convert a ShareGPT row: `conversations` of `from` and `value`, tool calls included."""
    key = "conversations" if "conversations" in row else "conversation"
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{key} must be a list that is not empty")
    messages = [_sharegpt_turn(turn, index) for index, turn in enumerate(turns)]
    messages = _with_system(messages, row.get("system"))
    used = {key, "system", "tools", "chosen", "rejected"}
    if "chosen" in row or "rejected" in row:
        return _preference(row, messages, used)
    return _conversation(row, messages, used)


def from_alpaca(row: Row) -> Record:
    """Convert an Alpaca row: instruction, input and output, or chosen and rejected.

    It may also have `system` and `history`, a list of [question, answer].
    """
    instruction = _text(row, "instruction")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise RowError("input must be text")
    messages = _history(row.get("history"))
    messages.append(_user(f"{instruction}\n{extra}" if extra else instruction))
    messages = _with_system(messages, row.get("system"))
    used = {"instruction", "input", "output", "system", "history", "chosen", "rejected", "tools"}
    if "chosen" in row or "rejected" in row:
        return _preference(row, messages, used)
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return _conversation(row, messages, used)


def from_prompt_completion(row: Row) -> Record:
    """Convert a row of `prompt` and `completion`, each a text or a list of messages."""
    messages = _turns(row, "prompt", "user") + _turns(row, "completion", "assistant")
    messages = _with_system(messages, row.get("system"))
    return _conversation(row, messages, {"prompt", "completion", "system", "tools"})


def from_preference(row: Row) -> Record:
    """Convert a row of `prompt` (or `messages`), `chosen` and `rejected`, texts or messages.

    Without a prompt, `chosen` and `rejected` are whole conversations with a common beginning.
    """
    used = {"prompt", "messages", "chosen", "rejected", "system", "tools"}
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "prompt" in row:
        messages = _turns(row, "prompt", "user")
    else:
        return _preference_of_conversations(row, used)
    return _preference(row, _with_system(messages, row.get("system")), used)


def from_prompt(row: Row) -> Record:
    """Convert a row of `prompt` or `question`; other keys are fields for the verifier."""
    key = "prompt" if "prompt" in row else "question"
    messages = _with_system(_turns(row, key, "user"), row.get("system"))
    return _conversation(row, messages, {key, "system", "tools"})


def from_text(row: Row) -> Record:
    """Convert a row of plain `text` for pre-training."""
    fields = {k: v for k, v in row.items() if k != "text"}
    return Record(kind="text", text=_text(row, "text"), fields=fields)


@dataclass(frozen=True)
class Format:
    """Define a format: `read` converts a row; a row has all keys of one of the sets `marks`."""

    marks: tuple[frozenset[str], ...]
    read: Callable[[Row], Record]


def _marks(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(keys.split()) for keys in sets)


# Detection tries the formats in this order.
FORMATS: dict[str, Format] = {
    "sharegpt": Format(_marks("conversations", "conversation"), from_sharegpt),
    "alpaca": Format(_marks("instruction output", "instruction chosen rejected"), from_alpaca),
    "preference": Format(_marks("chosen rejected"), from_preference),
    "messages": Format(_marks("messages"), from_messages),
    "prompt_completion": Format(_marks("prompt completion"), from_prompt_completion),
    "prompt": Format(_marks("prompt", "question"), from_prompt),
    "text": Format(_marks("text"), from_text),
}


def detect_format(row: Row) -> str | None:
    """Return the first format whose keys the row has; None if there is none."""
    for name, entry in FORMATS.items():
        if any(marks <= row.keys() for marks in entry.marks):
            return name
    return None


def missing_keys(format_name: str, row: Row) -> str | None:
    """Return a text that names the keys that the row lacks for the format; None if it has all."""
    marks = FORMATS[format_name].marks
    if any(keys <= row.keys() for keys in marks):
        return None
    wanted = " or ".join(" + ".join(sorted(keys)) for keys in marks)
    return f"it lacks {wanted}, which the format {format_name} needs"


def _conversation(row: Row, messages: list[Message], used: set[str]) -> Record:
    if not messages:
        raise RowError("it has no messages")
    has_answer = any(m["role"] == "assistant" for m in messages)
    tools = _tools(row)
    return Record(
        kind="chat" if has_answer else "prompt",
        messages=messages,
        tools=tools,
        fields=_fields(row, used, tools),
    )


def _preference(row: Row, messages: list[Message], used: set[str]) -> Record:
    tools = _tools(row)
    return Record(
        kind="preference",
        messages=messages,
        tools=tools,
        chosen=_turns(row, "chosen", "assistant"),
        rejected=_turns(row, "rejected", "assistant"),
        fields=_fields(row, used, tools),
    )


def _preference_of_conversations(row: Row, used: set[str]) -> Record:
    chosen, rejected = _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or shared in (len(chosen), len(rejected)):
        raise RowError("chosen and rejected need a prompt, or must begin alike and end differently")
    return Record(
        kind="preference",
        messages=_with_system(chosen[:shared], row.get("system")),
        tools=_tools(row),
        chosen=chosen[shared:],
        rejected=rejected[shared:],
        fields=_fields(row, used, _tools(row)),
    )


def _fields(row: Row, used: set[str], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    fields = {k: v for k, v in row.items() if k not in used}
    return {**fields, "tools": tools} if tools else fields


def _turns(row: Row, key: str, role: str) -> list[Message]:
    """Return the messages at `key`: a text (one turn of `role`), a message or a list of them.

    Raises:
        RowError: it is none of them, or empty.
    """
    value = row.get(key)
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{key} is empty")
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]:
        return [_sharegpt_turn(turn, index) for index, turn in enumerate(value)]
    return _messages(value, key)


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{key} must be text, not {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{key} is empty")
    return value


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if not system:
        return messages
    if not isinstance(system, str):
        raise RowError("system must be text")
    if messages and messages[0]["role"] == "system":
        raise RowError("it has two system messages")
    return [{"role": "system", "content": system}, *messages]


def _history(history: Any) -> list[Message]:
    messages: list[Message] = []
    for pair in history or []:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise RowError("history must be a list of [question, answer]")
        messages += [_user(pair[0]), {"role": "assistant", "content": pair[1]}]
    return messages


_ROLES = {"developer": "system", "function": "tool"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} must be a list of messages that is not empty")
    return [_message(message, index + 1) for index, message in enumerate(value)]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is not an object")
    role = message.get("role")
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        raise RowError(f"message {number} has role {role!r}")
    out: Message = {"role": role, "content": _content(message.get("content"), role, number)}
    if role == "assistant":
        reasoning = message.get("reasoning_content")
        if reasoning:
            if not isinstance(reasoning, str):
                raise RowError(f"message {number}: reasoning_content must be text")
            out["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if not calls and message.get("function_call"):
            calls = [message["function_call"]]
        if calls:
            out["tool_calls"] = _tool_calls(calls, number)
        if "weight" in message:
            out["weight"] = message["weight"]
    if not out["content"] and not (role == "assistant" and out.get("tool_calls")):
        raise RowError(f"message {number} ({role}) is empty")
    return out


def _content(content: Any, role: str, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if role == "tool" and isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RowError(f"message {number} ({role}) has content that is not text")


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls must be a list")
    out = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"message {number} has a tool call without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"message {number}: the arguments of a tool call")
        if not isinstance(arguments, dict):
            raise RowError(f"message {number}: the arguments of a tool call must be an object")
        function = {"name": function["name"], "arguments": arguments}
        out.append({"type": "function", "function": function})
    return out


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}


def _sharegpt_turn(turn: Any, index: int) -> Message:
    number = index + 1
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is not an object")
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(value, str) or not value:
        raise RowError(f"turn {number} ({speaker}) has no text in value")
    if speaker == "function_call":
        calls = _json(value, f"turn {number}: the function call")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(calls, number)}
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"turn {number} is from {speaker!r}")
    return {"role": role, "content": value}


def _tools(row: Row) -> list[dict[str, Any]] | None:
    tools = row.get("tools") or row.get("functions")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools must be a list of objects")
    return tools


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON: {error}") from error
