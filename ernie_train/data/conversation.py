"""Render conversations by a chat template and find the assistant's turns in the text.

The words of a turn are what the model generates when it is asked at that turn: from the end of the
generation prompt up to and including the token that ends the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data.chat_messages import (
    Message,
    canonical_message,
    canonical_tools,
    map_texts,
    with_text_arguments,
    without_earlier_reasoning,
    without_reasoning,
)
from ernie_train.data.chat_template import ChatTemplate
from ernie_train.data.formats import RowError
from ernie_train.data.tokenizer import MARK, Tokenizer, common_start

ANOTHER_TEMPLATE = "chat.template in the recipe names one that writes it (docs/chat.md)"
Tools = Sequence[dict[str, Any]] | None
Rendering = tuple[str, list[tuple[int, int]]]  # a text, and its generation blocks


def require_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template of a tokenizer.

    Raises:
        DataError: it has none, or one that cannot be used; the message says what to do.
    """
    template = tokenizer.chat.template
    if template is None:
        raise DataError(
            f"{tokenizer.directory} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), and not the tokens of an ERNIE format; name a template file "
            "by chat.template in the recipe"
        )
    template.check()
    return template


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the conversation up to it, and where its own words stand in that."""

    text: str
    start: int
    end: int
    weight: int
    message: Message
    closed: bool  # by a token

    @property
    def written(self) -> str:
        return self.text[self.start : self.end]

    def stands_in(self, text: str) -> bool:
        """Return True if `text` shows the turn, and all before it, as the model saw and wrote."""
        return text.startswith(self.text[: self.end])


class Conversation:
    """A conversation in the form that templates expect, and its renderings by one template."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        messages: Sequence[Message],
        tools: Tools,
        template: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._renderings: dict[str, Rendering] = {}
        self.template = template or require_chat_template(self.required_tokenizer)
        self.history = tokenizer.chat.history_reasoning if tokenizer else "template"
        try:
            self.tools = None if not tools else self._marked(canonical_tools(tools), "a tool")
            self.messages = [
                self._marked(canonical_message(m, at, self.template), f"message {at + 1}")
                for at, m in enumerate(messages)
            ]
        except RowError as error:
            raise DataError(str(error)) from None
        if not messages:
            raise DataError("a conversation has no messages")
        if any("tool_calls" in message for message in self.messages):
            self._settle_arguments()

    def _settle_arguments(self) -> None:
        """Give arguments of calls as JSON text to a template that cannot write objects."""
        try:
            self._plain_render(self.messages)
        except DataError as error:
            if isinstance(error.__cause__, TypeError):
                self.messages = [with_text_arguments(message) for message in self.messages]

    @property
    def required_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; `DataError` for a conversation that has a template alone."""
        if self.tokenizer is None:
            raise DataError("a template alone can render a conversation, but not encode it")
        return self.tokenizer

    @property
    def control_pattern(self) -> re.Pattern[str]:
        """Return what matches the tokenizer's control tokens."""
        return self.required_tokenizer.control_pattern

    @property
    def text(self) -> str:
        """Return the whole conversation as text.

        Raises:
            DataError: the template leaves a message out.
        """
        text = self.render(self.messages)
        for at, message in enumerate(self.messages):
            if message["role"] == "assistant" or message["content"].strip() in text:
                continue
            # The template may write it otherwise; one that leaves it out writes others alike.
            other = [*self.messages[:at], _changed(message), *self.messages[at + 1 :]]
            if self.render(other) == text:
                raise DataError(
                    f"message {at + 1} is a {message['role']} message that {self.template.origin} "
                    f"leaves out; {ANOTHER_TEMPLATE}"
                )
        return text

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """Return the text of messages, with their history as the recipe wants it."""
        if self.history == "keep":
            return self._with_all_reasoning(messages, ask)
        if self.history == "drop":
            messages = without_earlier_reasoning(messages)
        return self._plain_render(messages, ask)

    def _plain_render(self, messages: Sequence[Message], ask: bool = False) -> str:
        return self._rendering(messages, ask)[0]

    def _rendering(self, messages: Sequence[Message], ask: bool = False) -> Rendering:
        """Return text and generation blocks, rendered once: most of encoding a row is rendering."""
        key = repr((ask, messages))
        if (known := self._renderings.get(key)) is None:
            made = self.template.render_spans(messages, self.tools, add_generation_prompt=ask)
            known = self._renderings[key] = made
        return known

    def _with_all_reasoning(self, messages: Sequence[Message], ask: bool) -> str:
        """Render every assistant turn as the template renders the last one.

        What the template writes behind a turn's last words is found by changing them: both texts
        end alike from there on. So each turn is cut there and goes on as it does in a history.
        """
        bare = [without_reasoning(m) if m["role"] == "assistant" else m for m in messages]
        text, before = "", None
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                text = self._joined(text, before, [*bare[:at], message])
                before = at
        if before != len(messages) - 1 or ask:
            text = self._joined(text, before, bare, ask)
        return text

    def _joined(
        self, text: str, before: int | None, messages: Sequence[Message], ask: bool = False
    ) -> str:
        """Return `text`, which ends with turn `before`, and what `messages` show behind it."""
        whole = self._plain_render(messages, ask)
        if before is None:
            return whole
        others = [*messages[:before], _changed(messages[before]), *messages[before + 1 :]]
        rest = _common_end(whole, self._plain_render(others, ask))
        own = self._plain_render(messages[: before + 1])
        tail = _common_end(own, self._plain_render(others[: before + 1]))
        if not text.endswith(tail) or not rest.startswith(tail.rstrip()):
            raise DataError(
                f"history_reasoning: keep needs a template that ends every turn alike, and "
                f"{self.template.origin} does not"
            )
        return text[: len(text) - len(tail)] + rest

    def turns(self) -> list[Turn]:
        """Return the assistant turns."""
        if self.template.marks_generation and self.history == "template":
            marked = self._marked_turns()
            if marked is not None:
                return marked
        found = []
        for at, message in enumerate(self.messages):
            if message["role"] == "assistant":
                text = self.render(self.messages[: at + 1])
                found.append(self._turn(at, text, self._prompt_end(at, text), len(text)))
        return found

    def _marked_turns(self) -> list[Turn] | None:
        """Return the turns by the template's own marks; None if it does not mark each once."""
        text, spans = self._rendering(self.messages)
        places = [at for at, m in enumerate(self.messages) if m["role"] == "assistant"]
        if len(spans) != len(places):
            return None
        return [
            self._turn(at, text, max(start, self._prompt_end(at, text)), end)
            for at, (start, end) in zip(places, spans, strict=True)
        ]

    def _prompt_end(self, at: int, text: str) -> int:
        """Return where the words of turn `at` begin in `text`, the conversation up to the turn.

        That is behind the generation prompt, or where the template gives up on it (an open
        thinking part in front of an answer without reasoning): at the last line or control token
        that both share.
        """
        prompt = self.render(self.messages[:at], ask=True)
        if text.startswith(prompt):
            return len(prompt)
        end = self._last_boundary(common_start(prompt, text))
        before = self.render(self.messages[:at]) if at else ""
        shared = common_start(before, text)
        lost = self.control_pattern.sub("", before[len(shared) :]).strip()
        if lost or end < self._last_boundary(shared):
            raise DataError(
                f"message {at + 1}: {self.template.origin} shows what stands before the turn "
                "otherwise than when the turn is asked for"
            )
        return end

    def _last_boundary(self, text: str) -> int:
        """Return the position behind the last line break or control token."""
        ends = [match.end() for match in self.control_pattern.finditer(text)]
        return max([text.rfind("\n") + 1, *ends])

    def _turn(self, at: int, text: str, start: int, end: int) -> Turn:
        """Return a turn; its end is behind the control token that closes it, if one does."""
        closing = self._closing(at, text, start, end)
        end = closing or start + len(text[start:end].rstrip("\n"))
        message = self.messages[at]
        written = text[start:end]
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        shown = [
            name in written or json.dumps(name, ensure_ascii=False)[1:-1] in written
            for name in names
        ]
        if not written.strip() or not all(shown):
            raise DataError(
                f"message {at + 1}: {self.template.origin} leaves the turn or its tool call out; "
                + ANOTHER_TEMPLATE
            )
        return Turn(text, start, end, message.get("weight", 1), message, closing > 0)

    def _closing(self, at: int, text: str, start: int, end: int) -> int:
        """Return the end of the control token that closes the turn at text[start:end]; 0 for none.

        Behind it stands nothing; a template may end a whole conversation by a further token, which
        is none of the turn's: a next question takes its place.
        """
        pattern = self.control_pattern
        found = [match.end() for match in pattern.finditer(text, start, end)]
        found = [place for place in found if not pattern.sub("", text[place:end]).strip()]
        if len(found) > 1:
            question = {"role": "user", "content": "?"}
            try:
                longer = self.render([*self.messages[: at + 1], question])
            except DataError:
                return found[-1]
            shared = len(common_start(text, longer))
            found = [place for place in found if place <= shared] or found
        return found[-1] if found else 0

    def ids_behind(self, at: int) -> list[int]:
        """Encode what the template writes behind turn `at`, to the end of a generation prompt.

        Raises:
            DataError: the template ends the turn by no token, or shows it otherwise than alone.
        """
        text = self.render(self.messages[: at + 1])
        turn = self._turn(at, text, self._prompt_end(at, text), len(text))
        whole = self.render(self.messages, ask=True)
        encode = self.required_tokenizer.encode_marked
        ids, before = encode(whole)[0], encode(whole[: turn.end])[0]
        if not (turn.closed and turn.stands_in(whole) and ids[: len(before)] == before):
            raise DataError(
                f"{self.template.origin} cannot continue a conversation behind the tokens of a "
                "turn: it ends the turn by no token of its own, or shows it otherwise later"
            )
        return ids[len(before) :]

    def _marked(self, value: Any, where: str) -> Any:
        if self.tokenizer is None:
            return value
        mark = self.tokenizer.mark_control_tokens
        return map_texts(value, lambda text: mark(text, where))


def _changed(turn: Message) -> Message:
    """Return a turn whose last words are others."""
    if turn.get("tool_calls"):
        other = {"type": "function", "function": {"name": MARK, "arguments": {}}}
        return {**turn, "tool_calls": [*turn["tool_calls"][:-1], other]}
    return {**turn, "content": turn["content"] + MARK}


def _common_end(one: str, other: str) -> str:
    return common_start(one[::-1], other[::-1])[::-1]
