"""SIGTERM and SIGINT ask for a stop, which work obeys where it can save."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopFlag:
    """Context that records SIGTERM and SIGINT; work checks `requested` wherever it can stop.

    A second SIGINT raises KeyboardInterrupt at once. Flags nest: a signal sets the inner flag and
    those around it, and each flag restores the handlers that it found.

        with StopFlag() as stop:
            while not stop.requested: ...
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # The stack of entered flags is shared because a process has one handler per signal: that of
    # the innermost flag, which must set the outer ones too.
    _entered: "list[StopFlag]" = []

    def __init__(self) -> None:
        self.signal_name = ""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Return whether a signal came or a stop was requested."""
        return bool(self.signal_name)

    def request(self, signal_name: str) -> None:
        """Request a stop without a signal, for instance because another rank got one."""
        self.signal_name = self.signal_name or signal_name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for flag in StopFlag._entered:
            flag.request(signal.Signals(number).name)
            flag._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        StopFlag._entered.remove(self)
