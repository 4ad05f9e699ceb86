"""Bring messages and tools into the one form in which every chat template gets them.

It is the form of OpenAI's API: calls and tools wrapped, arguments as objects, no nulls, and the
reasoning under every name under which a template reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import ChatTemplate
from ernie_train.data.completion_format import (
    RESPONSE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CALL_OPEN,
    parse_completion,
)
from ernie_train.data.formats import REASONING_KEYS, read_call, read_tool

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_PROTOCOL_KEYS = frozenset((
    "role", "content", "weight", "tool_calls", "tool_call_id", "id", "type", "function", "name",
    "arguments", "description", "parameters", "properties", "required", "items", "enum",
    *REASONING_KEYS,
))  # fmt: skip
_PROTOCOL_VALUES = {
    "role": ROLES,
    "type": ("function", "object", "array", "string", "integer", "number", "boolean", "null"),
}
_SCHEMA_KEYS = frozenset(("type", "properties", "$ref", "$defs", "anyOf", "oneOf", "allOf"))


def canonical_message(message: Message, at: int, template: ChatTemplate) -> Message:
    """Return message `at` of a conversation as `template` expects it.

    Raises:
        DataError, RowError: it is not well-formed.
    """
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"message {at + 1} has role {role!r}; known are {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and role == "assistant"):
        raise DataError(f"message {at + 1} ({role}) has no text content")
    kept = {k: v for k, v in message.items() if k in ("name", "tool_call_id")}
    canonical: Message = {"role": role, "content": content or "", **kept}
    if role == "assistant":
        canonical |= _assistant_keys(message, at, template)
    return canonical


def _assistant_keys(message: Message, at: int, template: ChatTemplate) -> Message:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"the weight of a message must be 0 or 1, not {weight!r}")
    turn: Message = {"weight": int(weight)}
    reasoning, content = split_reasoning(message)
    calls = [
        {**_id_of(call), **read_call(call, f"message {at + 1}")}
        for call in message.get("tool_calls") or []
    ]
    if not content.strip("\n") and not calls:
        raise DataError("an assistant turn has neither an answer nor a tool call")
    if RESPONSE_OPEN in template.source:
        _check_blocks(content.strip("\n"))
    if reasoning and THINK_CLOSE not in (message.get("content") or ""):
        turn |= {key: reasoning for key in REASONING_KEYS if key in template.source}
    return turn | ({"tool_calls": calls} if calls else {})


def _id_of(call: Any) -> Message:
    known = isinstance(call, dict) and isinstance(call.get("id"), str)
    return {"id": call["id"]} if known else {}


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return (reasoning, content) of an assistant message.

    Raises:
        DataError: the reasoning is unclosed, or given twice.
    """
    content = message.get("content") or ""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    if THINK_CLOSE in content:
        if reasoning:
            raise DataError(f"an assistant turn has both reasoning_content and {THINK_CLOSE}")
        reasoning, _, content = content.partition(THINK_CLOSE)
        reasoning = reasoning.lstrip().removeprefix(THINK_OPEN)
    elif content.lstrip().startswith(THINK_OPEN):
        raise DataError(f"an assistant turn opens {THINK_OPEN} and never closes it")
    return reasoning.strip("\n"), content


def without_reasoning(message: Message) -> Message:
    """Return an assistant message without its reasoning."""
    rest = {k: v for k, v in message.items() if k not in REASONING_KEYS}
    if THINK_CLOSE in (message.get("content") or ""):
        rest["content"] = split_reasoning(message)[1].lstrip("\n")
    return rest


def without_earlier_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Drop the reasoning of all turns before the last question."""
    questions = [at for at, m in enumerate(messages) if m["role"] == "user"]
    last = questions[-1] if questions else -1
    return [
        without_reasoning(m) if m["role"] == "assistant" and at < last else m
        for at, m in enumerate(messages)
    ]


def with_text_arguments(message: Message) -> Message:
    """Return a message whose calls have their arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


def canonical_tools(tools: Sequence[Any]) -> list[Message]:
    """Return tools as OpenAI's API writes them: wrapped, in one order of keys, without nulls.

    Parameters in short, {"place": "string"}, become the JSON schema that they stand for.

    Raises:
        DataError, RowError: one is no object, or has no name.
    """
    found = []
    for tool in map(read_tool, tools):
        function = tool.get("function") or tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool needs a name: {name, description, parameters}")
        kept: Message = {"name": function["name"]}
        if isinstance(function.get("description"), str):
            kept["description"] = function["description"]
        if isinstance(function.get("parameters"), dict):
            kept["parameters"] = _schema(function["parameters"])
        found.append({"type": "function", "function": kept})
    return found


def _schema(parameters: Message) -> Message:
    short = parameters and all(isinstance(kind, str) for kind in parameters.values())
    if not short or _SCHEMA_KEYS & parameters.keys():
        return parameters
    properties = {name: {"type": kind} for name, kind in parameters.items()}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _check_blocks(content: str) -> None:
    """Check the `<response>` and `<tool_call>` markup that a row itself has written."""
    if not content.startswith((RESPONSE_OPEN, TOOL_CALL_OPEN)):
        return
    parsed = parse_completion(THINK_CLOSE + content)
    if parsed.stray:
        raise DataError(
            f"an assistant turn has text outside of its response and tool calls: "
            f"{parsed.stray[0][:60]!r}"
        )
    if any(call.arguments is None for call in parsed.tool_calls):
        raise DataError("an assistant turn has a tool call that is not valid JSON")


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every text in messages or tools, but for the words of their protocol.

    Templates read keys, roles and types by name, also if a tokenizer has such a word as a token.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key if key in _PROTOCOL_KEYS else change(key): item
            if isinstance(item, str) and item in _PROTOCOL_VALUES.get(key, ())
            else map_texts(item, change)
            for key, item in value.items()
        }
    return [map_texts(item, change) for item in value] if isinstance(value, list) else value
