"""Print to terminals and logs so that foreign text can only be read there.

Rows, completions, names and paths come from others. An escape sequence in them could move the
cursor, write to the clipboard (OSC 52) or hide a line; a bidirectional control could turn it round.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

MOST_LINES = 100  # of a message
LONGEST_LINE = 2000  # characters
# C0 without tab and newline, DEL, C1, controls of direction and of annotation, line and paragraph
# separators, tags, and halves of surrogate pairs, which no encoding can write.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return `text` with every control character written out, such as `\x1b`; the rest is kept.

    Tabs and newlines stay, and `\r\n` becomes a newline.
    """
    return _CONTROLS.sub(_written_out, text.replace("\r\n", "\n"))


def one_line(text: str, longest: int = 200) -> str:
    """Return a name or value as one printable line of at most about `longest` characters."""
    return printable(shorten(text.replace("\n", "\\n").replace("\t", "\\t"), longest))


def shorten(text: str, longest: int) -> str:
    """Return `text`, without its middle if it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}[... {len(text) - 2 * half} characters ...]{text[-half:]}"


def message_text(text: str) -> str:
    """Return the message of an error as it is printed: harmless, and of bounded length."""
    lines = text.splitlines() or [""]
    kept = [printable(shorten(line, LONGEST_LINE)) for line in lines[:MOST_LINES]]
    more = len(lines) - len(kept)
    return "\n".join(kept + ([f"... and {more} more lines"] if more else []))


class Terminal(Console):
    """Print on a console as `printable` writes it; brackets and colons are text, not markup."""

    def __init__(self, *, markup: bool = False, emoji: bool = False, **options: Any) -> None:
        super().__init__(markup=markup, emoji=emoji, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        # Before the layout, so that columns are as wide as what is written.
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        return _harmless(super().render(renderable, options))


class CurrentStderr:
    """Write to whatever `sys.stderr` is at the moment.

    While a live bar is shown that is a stand-in which prints above the bar. rich's consoles look
    through it, so that a warning of theirs would break the bar.
    """

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str:
        return sys.stderr.encoding


def _harmless(segments: Iterable[Segment]) -> Iterator[Segment]:
    for segment in segments:
        if segment.control is None and _CONTROLS.search(segment.text):
            yield Segment(printable(segment.text), segment.style)
        else:
            yield segment


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
