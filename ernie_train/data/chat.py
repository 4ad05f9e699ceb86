"""Conversations to token ids and a mask of the tokens that are trained.

Thinking format: a system turn with the settings and the tools, then turns between `<|im_start|>`
and `<|im_end|>`; a tool's result comes back as a user turn. Plain format: `User: ` and
`Assistant: ` between `<|begin_of_sentence|>` and `<|end_of_sentence|>`, `</s>` after the last turn.
Trained is what the model must write itself: each assistant turn after the generation prompt,
through the token that ends the turn.

A conversation is tokenized piece by piece, cut around each assistant turn's text, so that no token
crosses from the prompt into the completion: the ids of a prompt are a prefix of the ids of the
whole conversation.

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
    text: str
    written_by_model: bool
    trainable: bool


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool = True,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and for each id whether it is trained.

    The newlines that would separate the last turn from a next one are left out. Raises DataError
    with the reason where the conversation cannot be rendered or holds a control token.
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
    """Ids of a conversation that the model is to continue, ending in the generation prompt.

    Raises DataError as `encode_chat` does, and where the last message is the assistant's.
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
    """The text of a conversation, exactly as the Jinja template renders it."""
    text = "".join(piece.text for piece in _pieces(messages, tools, thinking))
    return text + _generation_prompt(thinking) if add_generation_prompt else text


def require_chat_tokens(tokenizer: Tokenizer, thinking: bool = True) -> None:
    """Raise DataError that names the turn tokens which the tokenizer lacks."""
    needed = (IM_START, IM_END) if thinking else (SENTENCE_START, SENTENCE_END)
    missing = [token for token in needed if tokenizer.token_id(token) is None]
    if missing:
        name = "Thinking" if thinking else "plain"
        raise DataError(
            f"the tokenizer has no token {' and no token '.join(missing)}, which the {name} chat "
            "format needs; add them to the tokenizer, or use one that has them"
        )


def drop_thinking(messages: Sequence[Message]) -> list[Message]:
    """The same conversation without the assistant's reasoning: answers only."""
    return [_split_thinking(m)[1] if m.get("role") == "assistant" else m for m in messages]


def _generation_prompt(thinking: bool) -> str:
    return GENERATION_PROMPT if thinking else PLAIN_GENERATION_PROMPT


def _merge_prompts(pieces: Sequence[_Piece] | Iterator[_Piece]) -> list[_Piece]:
    """Join neighbours that the model does not write: fewer calls of the tokenizer."""
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
    r"""Return what the model writes after `<think>\n`, up to the token that ends the turn."""
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
    """(reasoning, the message without it)."""
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
    """The answer alone: a model without a thinking part learns no reasoning and no markup."""
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
    """Text of a row must not end its turn or forge another one."""
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
