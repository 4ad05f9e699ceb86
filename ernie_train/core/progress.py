"""Progress of long work: a live bar in a terminal, else a line now and then.

The bar keeps its place below what is printed meanwhile, by logging and warnings too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

LINE_EVERY_S = 5.0


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
