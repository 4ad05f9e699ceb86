"""What the supervisor says, where it may be that nobody can hear it any more.

A full disk behind standard output, a terminal that was closed: that is no reason to end a job, nor
to change its exit status.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any

from rich.console import Console
from rich.markup import escape


class SafeConsole:
    """Speaks on a console for as long as that can be written to."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._complaints: set[str] = set()

    def say(self, text: str) -> None:
        """Prints a text as it is, paths unbroken, or not at all."""
        self._print(text, markup=False)

    def _print(self, text: str, *, markup: bool) -> None:
        # A console that finds its pipe broken would end the process: so it writes to memory.
        with self._console.capture() as said:
            self._console.print(text, markup=markup, highlight=False, soft_wrap=True)
        try:
            self._console.file.write(said.get())
            self._console.file.flush()
        except OSError:
            to_devnull(self._console.file)

    def error(self, message: str) -> None:
        """Says why a command ends."""
        self._print(f"[bold red]error:[/] {escape(message)}", markup=True)

    def complain(self, about: str, error: OSError) -> None:
        """Says, the first time, that something could not be written; the job goes on without."""
        if about not in self._complaints:
            self._complaints.add(about)
            reason = error.strerror or str(error)
            self.say(f"{about} cannot be written any more: {reason}")


def to_devnull(stream: IO[Any]) -> None:
    """Sends to nowhere what a broken stream still holds and what it is given.

    The interpreter writes it out at its end, and exits with 120 where that fails.
    """
    with suppress(OSError, ValueError):  # no descriptor stands behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
