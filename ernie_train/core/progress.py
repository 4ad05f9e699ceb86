"""A bar for long work that is not training: a live one in a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 5.0


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how much of `total` is done."""
    if not console.is_terminal:
        yield _lines(console, title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


def _lines(console: Console, title: str, total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def advance_to(done: int) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            console.print(f"{title}: {done}/{total}", highlight=False)

    return advance_to
