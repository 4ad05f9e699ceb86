"""Encode conversations as token ids and a mask of the tokens to train on.

The text of a conversation is what the model's chat template renders, and its ids are those of the
whole text. The trained tokens of a turn are what the model generates when it is asked at that
turn: from the end of the generation prompt up to and including the token that ends the turn.

A template may show an earlier turn otherwise than the model wrote it, without its reasoning for
example. Such a turn cannot be trained within the whole conversation; it is trained in a sample of
its own, the conversation up to that turn.

A message is a dict: role, content (text), and for assistants `reasoning_content`, `tool_calls`,
`weight` (0: this turn is not trained).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ernie_train.core.errors import DataError
from ernie_train.data.chat_messages import Message, split_reasoning, without_reasoning
from ernie_train.data.chat_template import MARKUP_TOKENS, ChatTemplate
from ernie_train.data.completion_format import THINK_CLOSE, THINK_OPEN
from ernie_train.data.conversation import Conversation, Tools, Turn
from ernie_train.data.tokenizer import MARK, Tokenizer, unmark

_EMPTY_THINKING = re.compile(rf"\s*(?:{THINK_OPEN})?\s*{THINK_CLOSE}\s*")


@dataclass(frozen=True)
class ChatTraining:
    """Say which parts of a conversation are trained.

    turns: every turn of the assistant, or the last one alone.
    reasoning: False trains the answers alone; the reasoning stays in the context.
    """

    turns: Literal["all", "last"] = "all"
    reasoning: bool = True


@dataclass(frozen=True)
class EncodedChat:
    """Hold one sample: `ids` [L], and `trainable` [L], True for tokens to train on."""

    ids: list[int]
    trainable: list[bool]


@dataclass(frozen=True)
class EncodedConversation:
    """Hold the samples of a conversation, and what a user should know about it.

    samples: turns that the whole conversation shows otherwise than they were written come first,
        each at the end of its own conversation; then the whole conversation.
    notes: reasons, to be counted in the data report.
    """

    samples: list[EncodedChat]
    notes: list[str]


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Tools = None,
    training: ChatTraining | None = None,
) -> EncodedConversation:
    """Encode a conversation in as many samples as its trained turns need.

    Raises:
        DataError: the template refuses or does not show a message, a turn is not well-formed, or
            a text contains a control token and the recipe refuses those.
    """
    chat = Conversation(tokenizer, messages, tools)
    training = training or ChatTraining()
    turns = chat.turns()
    trained = [turn for turn in turns if turn.weight]
    if training.turns == "last":
        trained = [turn for turn in trained if turn is turns[-1]]
    text = chat.text
    inside = [turn for turn in trained if turn.stands_in(text)]
    apart = [turn for turn in trained if not turn.stands_in(text)]
    samples = [_encode(chat, turn.text, [turn], training) for turn in apart]
    if inside or not apart:
        samples.append(_encode(chat, text, inside, training))
    return EncodedConversation(
        samples, _notes(trained, opens_thinking=chat.template.opens_thinking)
    )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Tools = None,
) -> tuple[list[int], list[bool]]:
    """Encode the whole conversation; return its ids [L] and the mask [L] of trained tokens.

    Turns that `encode_conversation` would put into samples of their own are context here. White
    space behind the last turn is left out.

    Raises:
        DataError: as for `encode_conversation`.
    """
    chat = Conversation(tokenizer, messages, tools)
    turns, text = chat.turns(), chat.text
    inside = [turn for turn in turns if turn.weight and turn.stands_in(text)]
    sample = _encode(chat, text, inside, ChatTraining())
    return sample.ids, sample.trainable


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = None) -> list[int]:
    """Encode a conversation that the model is to continue; ends with the generation prompt.

    Raises:
        DataError: as for `encode_conversation`, or the last message is the assistant's.
    """
    if messages and messages[-1].get("role") == "assistant":
        raise DataError("a prompt must not end in an assistant turn")
    chat = Conversation(tokenizer, messages, tools)
    return tokenizer.encode_marked(chat.render(chat.messages, ask=True))[0]


def tool_result_ids(
    tokenizer: Tokenizer, calls: Sequence[str], results: Sequence[Message], tools: Tools
) -> list[int]:
    """Encode what stands between a turn that calls tools and the assistant's next turn.

    Behind the ids of a turn as it was sampled these ids make the next prompt. They depend on a
    turn's calls alone, so that what was sampled is never encoded again, and never shown otherwise.
    Markup and control tokens in results are plain text.

    Args:
        calls: names of the called tools.
        results: messages of the role tool.

    Raises:
        DataError: the template has no place for results, or does not keep turns as they were; or
            a result contains a control token and the recipe refuses those.
    """
    called = [{"function": {"name": name, "arguments": {}}} for name in calls]
    turn = {"role": "assistant", "content": "", "tool_calls": called}
    chat = Conversation(tokenizer, [{"role": "user", "content": "?"}, turn, *results], tools)
    shown = [m | {"content": mark_markup(m["content"])} for m in chat.messages[2:]]
    chat.messages[2:] = shown
    return chat.ids_behind(1)


_MARKUP = re.compile("|".join(map(re.escape, MARKUP_TOKENS)))


def mark_markup(text: str) -> str:
    """Mark the texts that structure a turn, so that `encode_marked` takes them for plain text."""
    return _MARKUP.sub(lambda found: found.group()[0] + MARK + found.group()[1:], text)


def render_chat(
    by: Tokenizer | ChatTemplate,
    messages: Sequence[Message],
    tools: Tools = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation as the text that the model reads, by its tokenizer or template.

    Raises:
        DataError: the conversation cannot be rendered.
    """
    if isinstance(by, ChatTemplate):
        chat = Conversation(None, messages, tools, by)
    else:
        chat = Conversation(by, messages, tools)
    return unmark(chat.render(chat.messages, ask=add_generation_prompt))


def drop_thinking(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation without the assistant's reasoning."""
    return [without_reasoning(m) if m.get("role") == "assistant" else m for m in messages]


def _encode(
    chat: Conversation, text: str, turns: Sequence[Turn], training: ChatTraining
) -> EncodedChat:
    """Encode a text, in which `turns` are trained."""
    tail = max([m.end() for m in chat.control_pattern.finditer(text)], default=0)
    if not text[tail:].strip():
        text = text[:tail] or text
    spans = [(_trained_start(turn, training), turn.end) for turn in turns]
    ids, offsets = chat.required_tokenizer.encode_marked(text)
    cuts = [(a - text.count(MARK, 0, a), b - text.count(MARK, 0, b)) for a, b in spans]
    trainable = [False] * len(ids)
    for a, b in cuts:
        trainable = [t or (s < b and e > a) for t, (s, e) in zip(trainable, offsets, strict=True)]
    return EncodedChat(ids, trainable)


def _trained_start(turn: Turn, training: ChatTraining) -> int:
    """Return where the trained part of a turn begins; an empty thinking part is never trained."""
    empty = _EMPTY_THINKING.match(turn.text, turn.start, turn.end)
    if empty:
        return empty.end()
    close = turn.text.find(THINK_CLOSE, turn.start, turn.end)
    if training.reasoning or close < 0:
        return turn.start
    answer = turn.text[close + len(THINK_CLOSE) : turn.end]
    return turn.end - len(answer.lstrip("\n"))


def _notes(trained: Sequence[Turn], *, opens_thinking: bool) -> list[str]:
    """Return what a user should know about the trained turns."""
    notes = []
    for turn in trained:
        reasoning = split_reasoning(turn.message)[0].strip()
        if reasoning and reasoning not in turn.written:
            notes.append("answers whose reasoning the chat template does not show")
        elif not reasoning and opens_thinking:
            notes.append(
                "answers without reasoning, although the model is asked to think: it would "
                "not learn to end its thinking part"
            )
        if not turn.closed:
            notes.append("turns that the chat template ends by no token of their own")
        if turn.message.get("tool_calls") and turn.message["content"].strip():
            notes.append(
                "turns with an answer beside a tool call, of which some servers return one"
            )
    return notes
