"""SIGTERM and SIGINT ask for a stop, which work obeys where it can save."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ernie_train.core.errors import Interrupted

NOTICE = "stopping as soon as all work can be saved; Ctrl-C again stops at once, without saving"


class StopFlag:
    """Context that records SIGTERM and SIGINT; work checks `requested` wherever it can stop.

    A second SIGINT raises KeyboardInterrupt at once. Flags nest: a signal sets the inner flag and
    those around it, and each flag restores the handlers that it found.

        with StopFlag() as stop:
            while not stop.requested: ...

    `notice` is written to standard error, after the signal's name, when the first signal comes.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # The stack of entered flags is shared because a process has one handler per signal: that of
    # the innermost flag, which must set the outer ones too.
    _entered: "list[StopFlag]" = []

    def __init__(self, notice: str = "") -> None:
        self.notice = notice
        self.signal_name = ""
        self._at_once = False
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Return whether a signal came or a stop was requested."""
        return bool(self.signal_name)

    def request(self, signal_name: str) -> None:
        """Request a stop without a signal, for instance because another rank got one."""
        self.signal_name = self.signal_name or signal_name

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Interrupted` as soon as a stop is requested, in work that has nothing to save.

        The block must not communicate with other ranks, which would wait for this one.
        """
        self._at_once = True
        try:
            self._raise_if_at_once()
            yield
        finally:
            self._at_once = False

    def _raise_if_at_once(self) -> None:
        if self._at_once and self.requested:
            raise Interrupted(f"stopped on a signal ({self.signal_name})")

    def _acknowledge(self, signal_name: str) -> None:
        if self.notice and not self.requested:
            # Not by print: the signal may have come in the middle of another one.
            with suppress(OSError, ValueError, AttributeError):
                os.write(sys.stderr.fileno(), f"\n{signal_name}: {self.notice}\n".encode())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for flag in StopFlag._entered:
            flag._acknowledge(signal.Signals(number).name)
            flag.request(signal.Signals(number).name)
            flag._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        for flag in StopFlag._entered:
            flag._raise_if_at_once()

    def __enter__(self) -> "StopFlag":
        if StopFlag._entered:
            self.signal_name = StopFlag._entered[-1].signal_name
            self._interrupts = StopFlag._entered[-1]._interrupts
        StopFlag._entered.append(self)
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        # A rank is started with these blocked, so that none comes before there is a handler.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        StopFlag._entered.remove(self)
