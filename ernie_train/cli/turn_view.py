"""Show what a model writes while it writes it: reasoning, answer and tool calls apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from ernie_train.core.terminal import printable
from ernie_train.data import Tokenizer
from ernie_train.data.completion_format import (
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
)

THINKING, ANSWER, CALL = "thinking", "answer", "call"
STYLES = {THINKING: "dim italic", ANSWER: "", CALL: "cyan"}
_FOLDED = "thinking ... (/thinking shows it)"
_BEGINS = {
    THINK_OPEN: THINKING, THINK_CLOSE: ANSWER, RESPONSE_OPEN: ANSWER, RESPONSE_CLOSE: ANSWER,
    TOOL_CALL_OPEN: CALL, TOOL_CALL_CLOSE: ANSWER,
}  # fmt: skip
TAG = re.compile("|".join(map(re.escape, _BEGINS)))


class TokenText:
    """Turns token ids into text as they come.

    The bytes of a character that are not all there yet are held back. The tokens before a new one
    are decoded with it, since a token alone may be written otherwise.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those of the last text, and what follows it
        self._given = 0  # how many of them have been returned as text

    def add(self, token: int) -> str:
        """Return the text that `token` adds, "" while a character is incomplete."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        del self._ids[: self._given]
        self._given = len(self._ids)
        return text

    def end(self) -> str:
        """Return the text of what was held back."""
        return self._new_text() if self._given < len(self._ids) else ""

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given])
        return self._tokenizer.decode(self._ids)[len(before) :]


@dataclass(frozen=True)
class PartText:
    """Hold some text of a part of a turn; `is_first` says that a part begins with it."""

    kind: str
    text: str
    is_first: bool


class TurnParts:
    """Splits the text of a turn, as it comes, into its parts, without tags and outer space."""

    def __init__(self, kind: str) -> None:
        """`kind` is that of the part that the generation prompt opened."""
        self._kind, self._rest, self._begun = kind, "", False

    def add(self, text: str) -> Iterator[PartText]:
        """Yield what is decided by now: a tag may be incomplete, space may end a part."""
        self._rest += text
        while found := TAG.search(self._rest):
            yield from self._cut(found.start())
            self._kind, self._begun = _BEGINS[found.group()], False
            self._rest = self._rest[len(found.group()) :]
        start = self._rest.rfind("<")
        open_tag = start >= 0 and any(tag.startswith(self._rest[start:]) for tag in _BEGINS)
        decided = len(self._rest[: start if open_tag else None].rstrip())
        yield from self._cut(decided)

    def end(self) -> Iterator[PartText]:
        """Yield the rest."""
        yield from self._cut(len(self._rest))

    def _cut(self, end: int) -> Iterator[PartText]:
        """Take the text up to `end` from the rest; yield it unless it is space around a part."""
        text, self._rest = self._rest[:end], self._rest[end:]
        if not self._begun:
            text = text.lstrip()
        if self._rest.startswith("<") or not self._rest:
            text = text.rstrip()
        if text:
            yield PartText(self._kind, text, not self._begun)
            self._begun = True


class TurnView:
    """Prints the parts of a turn as tokens come, reasoning dim, or folded into one line.

    `thinking` is all reasoning so far. Whatever the model writes is harmless to the terminal.
    """

    def __init__(
        self, console: Console, tokenizer: Tokenizer, *, opens_thinking: bool, folded: bool
    ) -> None:
        self._console, self._folded = console, folded
        self._text = TokenText(tokenizer)
        self._parts = TurnParts(THINKING if opens_thinking else ANSWER)
        self._printed = False
        self.thinking = ""

    def add(self, token: int) -> None:
        """Print what `token` adds."""
        self._print(self._parts.add(self._text.add(token)))

    def end(self) -> None:
        """Print what was held back, and end the line."""
        self._print(self._parts.add(self._text.end()))
        self._print(self._parts.end())
        if self._printed:
            self._console.print()

    def _print(self, parts: Iterator[PartText]) -> None:
        for part in parts:
            text = part.text
            if part.kind == THINKING:
                self.thinking += text
                text = text if not self._folded else _FOLDED if part.is_first else ""
            if part.is_first:
                space = "\n\n" if self._printed else ""
                text = space + ("call: " if part.kind == CALL else "") + text
            self._printed = self._printed or bool(text)
            shown = Text(printable(text), style=STYLES[part.kind])
            self._console.print(shown, end="", soft_wrap=True, highlight=False)
