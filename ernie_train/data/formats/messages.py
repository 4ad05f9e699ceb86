"""Read messages in the spellings of public data sets; give one spelling.

A message becomes {role, content}: role is "system", "user", "assistant" or "tool", content a text.
An assistant's may also have `reasoning_content`, `weight` (0: not trained) and `tool_calls`, a list
of {"type": "function", "function": {"name", "arguments": {...}}}.
"""

from collections.abc import Iterable
from typing import Any

from ernie_train.data.formats.values import (
    BlankAnswer,
    Message,
    RowError,
    as_json,
    kind_of,
    parse_json,
    shown,
    without_nulls,
)

_ROLE_NAMES = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt model bot chatbot ai",
    "tool": "tool function observation function_response tool_response tool_result ipython",
}
_ROLE_OF = {name: role for role, names in _ROLE_NAMES.items() for name in names.split()}
CALL_ROLES = ("function_call", "tool_call")  # turns whose text is the JSON of calls
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
# Names of the reasoning in rows, and in templates, for which `transformers` 5 fills all of them.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts")
FLAGS = ("weight", "loss", "train", "train_on_turn")
# Keys that would change what is trained, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "train_detail": ([],),
    "loss_scale": (1, ""),
    "prefix": (False,),
    "images": ([],),
    "image": ("",),
    "videos": ([],),
    "audios": ([],),
}
_READ = {
    *ROLE_KEYS,
    *CONTENT_KEYS,
    *REASONING_KEYS,
    *FLAGS,
    *UNSUPPORTED,
    *("tool_calls", "function_call", "tool_call_id", "id", "name"),
}


def read_messages(turns: Iterable[Any]) -> list[Message]:
    """Return the messages of a conversation; calls in turns of their own are joined to one turn.

    Raises:
        RowError: a turn is not well-formed, or asks for something that cannot be trained.
        BlankAnswer: an answer is white space.
    """
    messages: list[Message] = []
    after_call = False
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} is not an object")
        turn = without_nulls(turn)
        is_call = _speaker(turn) in CALL_ROLES
        message = _call_turn(turn, number) if is_call else _message(turn, number)
        if is_call and after_call:
            messages[-1]["tool_calls"] += message["tool_calls"]
        elif message["content"] or message["role"] != "system":
            messages.append(message)
        after_call = is_call
    if not messages:
        raise RowError("it has no messages with text")
    return messages


def unread_keys(turns: Any, key: str) -> set[str]:
    """Return the keys of messages that are not read, such as `messages.rating`."""
    if not isinstance(turns, list):
        return set()
    found = {name for turn in turns if isinstance(turn, dict) for name in turn if turn[name]}
    return {f"{key}.{name}" for name in found - _READ}


def tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return calls in one spelling; arguments may be an object, JSON text or absent.

    Raises:
        RowError: a call has no name, or arguments that are no object.
    """
    if isinstance(calls, str):
        calls = parse_json(calls, f"message {number}: tool_calls")
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls must be a list")
    return [read_call(call, f"message {number}") for call in calls]


def read_call(call: Any, where: str) -> dict[str, Any]:
    """Return one call as OpenAI's API writes it, without its id; `where` is for messages.

    Raises:
        RowError: it has no name, or arguments that are no object.
    """
    function = call.get("function") or call if isinstance(call, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise RowError(f"{where} has a tool call without a name")
    arguments = _first(function, ("arguments", "parameters"))
    if isinstance(arguments, str):
        text = arguments.strip() or "{}"
        arguments = parse_json(text, f"{where}: the arguments of a tool call")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: the arguments of a tool call must be an object")
    function = {"name": name, "arguments": without_nulls(arguments)}
    return {"type": "function", "function": function}


def read_tool(tool: Any) -> dict[str, Any]:
    """Return a tool, an object or its JSON text, without nulls.

    Raises:
        RowError: it is no object.
    """
    tool = parse_json(tool, "a tool") if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise RowError("tools must be a list of objects")
    cleaned: dict[str, Any] = without_nulls(tool)
    return cleaned


def trained_flag(value: Any, what: str) -> int:
    """Return 1 for a flag that asks for training, 0 for one that does not.

    Raises:
        RowError: it is neither true, false, 0 nor 1.
    """
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RowError(f"{what} must be true or false, 1 or 0, not {shown(value)}")
    return int(value)


def _first(turn: Message, keys: Iterable[str]) -> Any:
    return next((turn[key] for key in keys if key in turn), None)


def _speaker(turn: Message) -> Any:
    speaker = _first(turn, ROLE_KEYS)
    return speaker.strip().lower() if isinstance(speaker, str) else speaker


def _message(turn: Message, number: int) -> Message:
    speaker = _speaker(turn)
    role = _ROLE_OF.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_ROLE_NAMES)
        has = "no role" if speaker is None else f"role {shown(speaker)}"
        raise RowError(
            f"message {number} has {has}; a message needs role (or from): {known} "
            "and content (or value)"
        )
    for key, harmless in UNSUPPORTED.items():
        if key in turn and turn[key] not in harmless:
            raise RowError(f"message {number}: {key} cannot be trained here")
    content, thoughts = _content(_first(turn, CONTENT_KEYS), role, number)
    if role == "assistant":
        return _assistant(turn, content, thoughts, number)
    if any(turn.get(flag) is True for flag in FLAGS):
        raise RowError(f"message {number} ({role}) is to be trained; only an assistant's can be")
    if not content and role == "user":
        raise RowError(f"message {number} ({role}) is empty")
    return {"role": role, "content": content}


def _assistant(turn: Message, content: str, thoughts: str, number: int) -> Message:
    out: Message = {"role": "assistant", "content": content}
    reasoning = _reasoning(turn, thoughts, number)
    if reasoning:
        out["reasoning_content"] = reasoning
    if calls := turn.get("tool_calls") or turn.get("function_call"):
        out["tool_calls"] = tool_calls(calls, number)
    flags = {
        key: trained_flag(turn[key], f"message {number}: {key}") for key in FLAGS if key in turn
    }
    if len(set(flags.values())) > 1:
        raise RowError(f"message {number}: {' and '.join(flags)} contradict each other")
    if flags:
        out["weight"] = next(iter(flags.values()))
    if not out.get("tool_calls"):
        if not content:
            raise RowError(f"message {number} (assistant) is empty")
        if not content.strip():
            raise BlankAnswer("with a blank answer")
    return out


def _reasoning(turn: Message, thoughts: str, number: int) -> str:
    """Return the reasoning of a turn: under one of several keys, or in parts of the content."""
    given = {thoughts} if thoughts else set()
    for key in REASONING_KEYS:
        value = turn.get(key) or ""
        if isinstance(value, list):
            value, _ = _content(value, "assistant", number)
        if not isinstance(value, str):
            raise RowError(f"message {number}: {key} must be text")
        given |= {value} if value.strip() else set()
    if len(given) > 1:
        raise RowError(f"message {number} has two different reasonings")
    return given.pop() if given else ""


def _content(value: Any, role: str, number: int) -> tuple[str, str]:
    """Return the text of a content, and the text of its parts that are reasoning.

    Parts are joined by line breaks, as servers do that hand text to a template (vLLM).
    """
    if value is None or isinstance(value, str):
        return value or "", ""
    if isinstance(value, list):
        parts = [_part(part) for part in value if part is not None]
        if all(parts):
            texts = [text for kind, text in filter(None, parts) if kind == "text"]
            thoughts = [text for kind, text in filter(None, parts) if kind == "reasoning"]
            return "\n".join(texts), "\n".join(thoughts)
    if role == "tool":
        return as_json(value), ""
    found = [part for part in value if _part(part) is None] if isinstance(value, list) else [value]
    raise RowError(f"message {number} ({role}) has content that is not text: {_named(found[0])}")


def _named(part: Any) -> str:
    """Return a name for a part of a content that is no text, for a message."""
    kind = part.get("type") if isinstance(part, dict) else None
    return f"a part of type {kind}" if isinstance(kind, str) else kind_of(part)


def _part(part: Any) -> tuple[str, str] | None:
    """Return (text or reasoning, its text) of a part; None if it is something else."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        return None
    kind = part.get("type", "text")
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        # An object without a type is a part only if it is nothing but a text.
        return ("text", part["text"]) if "type" in part or len(part) == 1 else None
    if kind in ("thinking", "reasoning"):
        value = _first(part, ("thinking", "reasoning", "text"))
        inner = [_part(item) for item in value] if isinstance(value, list) else [_part(value)]
        if all(inner):
            return "reasoning", "\n".join(text for _, text in filter(None, inner))
    return None


def _call_turn(turn: Message, number: int) -> Message:
    value = _first(turn, CONTENT_KEYS)
    if isinstance(value, str):
        value = parse_json(value, f"message {number}: the function call")
    message = {"role": "assistant", "content": "", "tool_calls": value}
    flags = {key: turn[key] for key in (*FLAGS, *REASONING_KEYS) if key in turn}
    return _assistant({**message, **flags}, "", "", number)
