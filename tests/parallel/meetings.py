"""Counts how often ranks meet in collectives."""

from __future__ import annotations

from collections.abc import Callable

from ernie_train.core import process_group


def meetings_of(work: Callable[[], object]) -> int:
    """Return the number of collectives that some work takes."""
    meetings = 0
    ready = process_group.sync

    def counted() -> None:
        nonlocal meetings
        meetings += 1
        ready()

    process_group.sync = counted
    work()
    process_group.sync = ready
    return meetings
