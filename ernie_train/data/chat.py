"""Encode conversations as token ids and a mask of the tokens to train on.

Thinking format: a system turn with the settings and the tools, then turns between `<|im_start|>`
and `<|im_end|>`; the result of a tool is a user turn. Plain format: `User: ` and `Assistant: `
between `<|begin_of_sentence|>` and `<|end_of_sentence|>`, `</s>` after the last turn.
The trained tokens are those that the model must generate: each assistant turn from after the
generation prompt up to and including the token that ends the turn.

A conversation is split before and after the text of each assistant turn and each part is tokenized
separately, so that no token spans prompt and completion: the ids of a prompt are a prefix of the
ids of the whole conversation.

A message is a dict: role ("system" first only, "user", "assistant", "tool"), content, and for
assistants `reasoning_content`, `tool_calls`, `weight` (0: this turn is not trained).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import (
    CHAT_TEMPLATE,
    GLOBAL_CLOSE,
    GLOBAL_OPEN,
    PLAIN_CHAT_TEMPLATE,
    SYSTEM_CLOSE,
    SYSTEM_OPEN,
    THINK_MODE,
    TOOLS_CLOSE,
    TOOLS_OPEN,
)
from ernie_train.data.completion_format import (
    EOS,
    IM_END,
    IM_START,
    RESPONSE_OPEN,
    SENTENCE_END,
    SENTENCE_START,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CALL_OPEN,
    TOOL_RESPONSE_CLOSE,
    TOOL_RESPONSE_OPEN,
    parse_completion,
    response_block,
    tool_call_block,
)
from ernie_train.data.tokenizer import Tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "PLAIN_CHAT_TEMPLATE",
    "Message",
    "drop_thinking",
    "encode_chat",
    "prompt_ids",
    "render_chat",
    "require_chat_tokens",
]

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
GENERATION_PROMPT = f"{IM_START}assistant\n{THINK_OPEN}\n"
PLAIN_GENERATION_PROMPT = "Assistant: "


@dataclass(frozen=True)
class _Piece:
    """Hold a part of a conversation that is tokenized separately."""

    text: str
    written_by_model: bool
    trainable: bool


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
) -> tuple[list[int], list[bool]]:
    """Encode a conversation; return its ids [L] and the mask [L] of the tokens to train on.

    The newlines that would separate the last turn from a next one are left out.

    Args:
        tokenizer: must have the tokens of the chat format.
        messages: the conversation.
        tools: the tools offered to the model, as JSON-schema dicts.
        thinking: True for the Thinking format, False for the plain one.

    Raises:
        DataError: the conversation cannot be rendered or contains a control token, or the
            tokenizer lacks a token of the format.
    """
    require_chat_tokens(tokenizer, thinking)
    _refuse_control_tokens(tokenizer, messages, tools)
    ids: list[int] = []
    trainable: list[bool] = []
    pieces = _merge_prompts(_pieces(messages, tools, thinking))
    if pieces and pieces[-1].text == "\n\n":
        pieces.pop()
    for piece in pieces:
        piece_ids = tokenizer.encode(piece.text)
        ids += piece_ids
        trainable += [piece.trainable] * len(piece_ids)
    return ids, trainable


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
) -> list[int]:
    """Encode a conversation that the model is to continue; ends with the generation prompt.

    Raises:
        DataError: as for `encode_chat`, or the last message is the assistant's.
    """
    require_chat_tokens(tokenizer, thinking)
    _refuse_control_tokens(tokenizer, messages, tools)
    if messages and messages[-1].get("role") == "assistant":
        raise DataError("a prompt must not end in an assistant turn")
    pieces = list(_pieces(messages, tools, thinking))
    pieces.append(_Piece(_generation_prompt(thinking), False, False))
    return [i for piece in _merge_prompts(pieces) for i in tokenizer.encode(piece.text)]


def render_chat(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation as text, exactly as the Jinja template does.

    Raises:
        DataError: the conversation cannot be rendered.
    """
    text = "".join(piece.text for piece in _pieces(messages, tools, thinking))
    return text + _generation_prompt(thinking) if add_generation_prompt else text


def require_chat_tokens(tokenizer: Tokenizer, thinking: bool = True) -> None:
    """Check that the tokenizer has the tokens that begin and end turns.

    Raises:
        DataError: it lacks some; the message names them.
    """
    needed = (IM_START, IM_END) if thinking else (SENTENCE_START, SENTENCE_END)
    missing = [token for token in needed if tokenizer.token_id(token) is None]
    if missing:
        name = "Thinking" if thinking else "plain"
        raise DataError(
            f"the tokenizer has no token {' and no token '.join(missing)}, which the {name} chat "
            "format needs; add them to the tokenizer, or use one that has them"
        )


def drop_thinking(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation without the assistant's reasoning.

    Raises:
        DataError: an assistant turn has unclosed reasoning, or has reasoning twice.
    """
    return [_split_thinking(m)[1] if m.get("role") == "assistant" else m for m in messages]


def _generation_prompt(thinking: bool) -> str:
    return GENERATION_PROMPT if thinking else PLAIN_GENERATION_PROMPT


def _merge_prompts(pieces: Sequence[_Piece] | Iterator[_Piece]) -> list[_Piece]:
    """Join adjacent pieces that the model does not write, to call the tokenizer less often."""
    merged: list[_Piece] = []
    for piece in pieces:
        if merged and not piece.written_by_model and not merged[-1].written_by_model:
            merged[-1] = _Piece(merged[-1].text + piece.text, False, False)
        else:
            merged.append(piece)
    return merged


def _pieces(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, thinking: bool
) -> Iterator[_Piece]:
    _check(messages)
    yield from _thinking_pieces(messages, tools) if thinking else _plain_pieces(messages, tools)


def _thinking_pieces(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> Iterator[_Piece]:
    system = messages[0].get("content") if messages[0]["role"] == "system" else None
    yield _Piece(_system_turn(system, tools), False, False)
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "user":
            yield _Piece(f"{IM_START}user\n{content}{IM_END}\n\n", False, False)
        elif message["role"] == "tool":
            result = f"{TOOL_RESPONSE_OPEN}\n{content}\n{TOOL_RESPONSE_CLOSE}"
            yield _Piece(f"{IM_START}user\n{result}{IM_END}\n\n", False, False)
        elif message["role"] == "assistant":
            yield _Piece(GENERATION_PROMPT, False, False)
            yield _Piece(_assistant_body(message) + IM_END, True, _is_trained(message))
            yield _Piece("\n\n", False, False)


def _system_turn(system: str | None, tools: Sequence[dict[str, Any]] | None) -> str:
    parts = [f"{GLOBAL_OPEN}\n{THINK_MODE}\n{GLOBAL_CLOSE}"]
    if system:
        parts.insert(0, f"{SYSTEM_OPEN}\n{system}\n{SYSTEM_CLOSE}")
    if tools:
        listed = ", ".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        parts.append(f"{TOOLS_OPEN}\n[{listed}]\n{TOOLS_CLOSE}")
    return f"{IM_START}system\n" + "\n\n".join(parts) + f"{IM_END}\n\n"


def _assistant_body(message: Message) -> str:
    r"""Return the text of a turn after `<think>\n`, without the token that ends the turn.

    Raises:
        DataError: the turn has neither an answer nor a tool call, or is not well-formed.
    """
    reasoning, answer = _split_thinking(message)
    content = (answer.get("content") or "").strip("\n")
    blocks: list[str] = []
    if content.startswith((RESPONSE_OPEN, TOOL_CALL_OPEN)):
        _check_blocks(content)
        blocks.append(content + "\n")
    elif content:
        blocks.append(response_block(content))
    for name, arguments in _calls(message):
        blocks.append(tool_call_block(name, arguments))
    if not blocks:
        raise DataError("an assistant turn has neither an answer nor a tool call")
    return f"{reasoning}\n{THINK_CLOSE}\n\n{''.join(blocks)}"


def _split_thinking(message: Message) -> tuple[str, Message]:
    """Return the reasoning of an assistant message, and the message without it.

    Raises:
        DataError: the reasoning is unclosed, or given twice.
    """
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or ""
    rest = {k: v for k, v in message.items() if k != "reasoning_content"}
    if THINK_CLOSE in content:
        if reasoning:
            raise DataError(f"an assistant turn has both reasoning_content and {THINK_CLOSE}")
        reasoning, _, rest["content"] = content.partition(THINK_CLOSE)
        if reasoning.lstrip().startswith(THINK_OPEN):
            reasoning = reasoning.lstrip()[len(THINK_OPEN) :]
        rest["content"] = rest["content"].lstrip("\n")
    elif content.lstrip().startswith(THINK_OPEN):
        raise DataError(f"an assistant turn opens {THINK_OPEN} and never closes it")
    return reasoning.strip("\n"), rest


def _check_blocks(content: str) -> None:
    parsed = parse_completion(THINK_CLOSE + content)
    if parsed.stray:
        raise DataError(
            f"an assistant turn has text outside of its response and tool calls: "
            f"{parsed.stray[0][:60]!r}"
        )
    if any(call.arguments is None for call in parsed.tool_calls):
        raise DataError("an assistant turn has a tool call that is not valid JSON")


def _calls(message: Message) -> Iterator[tuple[str, Any]]:
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            raise DataError("a tool call needs a name and arguments")
        yield name, arguments


def _plain_pieces(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
) -> Iterator[_Piece]:
    if tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        raise DataError("tools need the Thinking chat format")
    yield _Piece(SENTENCE_START, False, False)
    for index, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "system":
            yield _Piece(f"{content}\n", False, False)
        elif message["role"] == "user":
            yield _Piece(f"User: {content}\n", False, False)
        else:
            end = EOS if index == len(messages) - 1 else SENTENCE_END
            yield _Piece(PLAIN_GENERATION_PROMPT, False, False)
            yield _Piece(_plain_answer(message) + end, True, _is_trained(message))


def _plain_answer(message: Message) -> str:
    """Return the answer without reasoning and markup, which a model of the plain format lacks.

    Raises:
        DataError: the turn has no answer, or is not well-formed.
    """
    content = str(_split_thinking(message)[1].get("content") or "")
    if content.startswith(RESPONSE_OPEN):
        _check_blocks(content)
        content = parse_completion(THINK_CLOSE + content).response or ""
    if not content:
        raise DataError("an assistant turn has no answer")
    return content


def _is_trained(message: Message) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"the weight of a message must be 0 or 1, not {weight!r}")
    return bool(weight)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("a conversation has no messages")
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"message {index + 1} has role {role!r}; known are {', '.join(ROLES)}")
        if role == "system" and index > 0:
            raise DataError(f"message {index + 1} is a system message; only the first may be one")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and role == "assistant"):
            raise DataError(f"message {index + 1} ({role}) has no text content")


def _refuse_control_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
) -> None:
    """Check that messages and tools contain no control token: it could end or forge a turn.

    Raises:
        DataError: there is one; the message names it.
    """
    for index, message in enumerate(messages):
        for key in ("content", "reasoning_content", "tool_calls"):
            value = message.get(key)
            if not value:
                continue
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found = tokenizer.control_pattern.search(text)
            if found:
                raise DataError(f"message {index + 1} contains the control token {found.group()}")
    if tools:
        found = tokenizer.control_pattern.search(json.dumps(tools, ensure_ascii=False))
        if found:
            raise DataError(f"the tools contain the control token {found.group()}")
