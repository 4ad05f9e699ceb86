"""Print to terminals and logs: foreign text so that it can only be read, and progress.

Rows, completions, names and paths come from others. An escape sequence in them could move the
cursor, write to the clipboard (OSC 52) or hide a line; a bidirectional control could turn it round.
"""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.segment import Segment
from rich.text import Text

MOST_LINES = 100  # of a message
LONGEST_LINE = 2000  # characters
LINE_EVERY_S = 5.0  # of progress, where there is no bar
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


def show_every_character() -> None:
    """Let standard output write the code of a character that its encoding lacks, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Terminal(Console):
    """Print on a console as `printable` writes it; brackets and colons are text, not markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

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

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":
            raise AttributeError(name)
        return getattr(sys.stderr, name)


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


def format_duration(seconds: float) -> str:
    """Return `45 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressDisplay:
    """Shows how much of the work is done and how long the rest will take.

    Without a bar it prints a line for the first update, for the last one, and at most every
    `LINE_EVERY_S` between.

    Args:
        console: where to show it.
        bar: True for a live bar in the terminal's last line, with the values below it; False for
            plain lines.
        label: what is being done; shown as it is, without markup.
        unit: a word before the count in plain lines, such as `step`.
        total: the count at the end; None if unknown, then no time left is shown.
        first: the count at the start, which took none of this display's time.
        clock: a monotonic clock in seconds; another one in tests.
    """

    def __init__(
        self,
        console: Console,
        *,
        bar: bool,
        label: str = "",
        unit: str = "",
        total: int | None = None,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._clock = console, clock
        self._label, self._unit, self._total, self._first = label, unit, total, first
        self._began = clock()
        self._printed_at: float | None = None
        self._pending = ""  # the last line, while it is not printed
        self._live: Live | None = None
        self._values = ""
        if bar:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                get_time=clock,
            )
            self._task = self._bar.add_task(label, total=total, completed=first, left="")
            self._live = Live(get_renderable=self._shown, console=console, refresh_per_second=4)
            self._live.start()

    def update(self, done: int, values: Iterable[str] = ()) -> None:
        """Show that `done` of the total is done, and `values` such as `loss 1.2345`."""
        now = self._clock()
        parts, left = [*values], ""
        if self._total is not None and done > self._first:
            seconds_each = (now - self._began) / (done - self._first)
            left = f"{format_duration(seconds_each * max(0, self._total - done))} left"
        if self._live is not None:
            self._bar.update(self._task, completed=done, left=left)
            self._values = "  ".join(parts)
            return
        parts += [left] if left else []
        count = f"{done}/{self._total}" if self._total is not None else str(done)
        head = f"{self._unit} {count}" if self._unit else count
        self._pending = "  ".join([self._label, head, *parts] if self._label else [head, *parts])
        due = self._printed_at is None or now - self._printed_at >= LINE_EVERY_S
        if due or done == self._total:
            self._print_pending(now)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the bar, or print the last line; more than once does no harm."""
        if self._live is not None:
            self._live.stop()
        self._print_pending(self._clock())

    def _shown(self) -> RenderableType:
        """Return the bar, and below it the values in as many lines as they take."""
        return Group(self._bar, Text(self._values)) if self._values else self._bar

    def _print_pending(self, now: float) -> None:
        if self._pending:
            self.note(self._pending)
            self._pending, self._printed_at = "", now


@contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with how much of `total` is done."""
    display = ProgressDisplay(console, bar=console.is_terminal, label=label, total=total)
    try:
        yield display.update
    finally:
        display.close()
