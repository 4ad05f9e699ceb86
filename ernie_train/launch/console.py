"""Print to a console without ever ending the job: text that cannot be written is dropped.

Neither a full disk behind standard output nor a closed terminal may end a job or change its exit
status.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from ernie_train.core.errors import Interrupted
from ernie_train.core.terminal import message_text


class SafeConsole:
    """Print to a console for as long as it can be written to."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._warned: set[str] = set()

    def print(self, text: str) -> None:
        """Print a text as it is, without markup or line breaks in paths."""
        self._write(message_text(text))

    def error(self, message: str, exit_status: int = 1) -> None:
        """Print why a command ends; a stop that was asked for (`Interrupted`) is no error."""
        label = ("", "") if exit_status == Interrupted.exit_status else ("error: ", "bold red")
        self._write(Text.assemble(label, message_text(message)))

    def warn_once(self, name: str, error: OSError) -> None:
        """Print, the first time for this name, that it cannot be written."""
        if name not in self._warned:
            self._warned.add(name)
            self.print(f"{name} cannot be written any more: {error.strerror or error}")

    def _write(self, text: str | Text) -> None:
        # rich exits the process on a broken pipe, so it renders to memory.
        with self._console.capture() as captured:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        try:
            self._console.file.write(captured.get())
            self._console.file.flush()
        except OSError:
            to_devnull(self._console.file)


def to_devnull(stream: IO[Any]) -> None:
    """Redirect a broken stream to /dev/null, with what its buffer holds.

    The interpreter flushes it at exit, and would exit with 120 if that fails.
    """
    with suppress(OSError, ValueError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
