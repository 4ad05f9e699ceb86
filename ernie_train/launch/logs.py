"""Where the output of ranks goes: rank 0's to the terminal, the others' to run_dir/logs.

The launcher writes what each rank prints to a file of this launch. From there it is passed on while
the rank runs, so that a rank never waits for a reader, and in the order and the colours in which it
was printed. The logs begin when the run directory exists: a mistake in a recipe leaves none.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ernie_train.launch.console import SafeConsole, to_devnull

LOGS = "logs"
SHOWN_LINES = 30
_CHUNK_BYTES = 1 << 20
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it, and a rank that is killed never shows it


@dataclass
class _Tail:
    """A growing file and how far it has been passed on."""

    source: Path
    position: int = 0

    def read(self) -> bytes:
        try:
            with self.source.open("rb") as stream:
                stream.seek(self.position)
                found = stream.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        self.position += len(found)
        return found


class RankLogs:
    """Passes the output of one launch on.

    Args:
        run_dir: the run directory, which need not exist; None if it is not known.
        title: the line that begins this launch in each rank's log.
        voice: tells where something cannot be written; the rest is passed on all the same.
    """

    def __init__(self, run_dir: Path | None, title: str, voice: SafeConsole) -> None:
        self._run_dir = run_dir
        self._voice = voice
        self._title = f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode()
        self._tails: dict[int, _Tail] = {}
        self._files: dict[int, IO[bytes]] = {}
        self._lost: set[int] = set()  # ranks whose log, or for rank 0 the terminal, is broken

    def add(self, rank: int, source: Path) -> None:
        """Follows from now on what a rank prints to `source`."""
        self._tails.setdefault(rank, _Tail(source))

    def pass_on(self) -> None:
        """Moves on what has been printed since the last time."""
        for rank, tail in self._tails.items():
            if rank == 0:
                self._show(tail)
            elif self._run_dir is not None and rank not in self._lost:
                try:
                    self._log(rank, tail, self._run_dir)
                except OSError as error:
                    self._lost.add(rank)
                    self._voice.complain(str(self.path(rank)), error)

    def path(self, rank: int) -> Path:
        """The log of a rank other than 0."""
        return (self._run_dir or Path()) / LOGS / f"rank_{rank}.log"

    def last_lines(self, rank: int) -> list[str]:
        """The end of what a rank printed in this launch."""
        tail = self._tails.get(rank)
        if tail is None or not tail.source.exists():
            return []
        text = tail.source.read_bytes()[-_CHUNK_BYTES:].decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-SHOWN_LINES:]

    def close(self) -> None:
        """Passes the rest on."""
        self.pass_on()
        for rank, file in self._files.items():
            try:
                file.close()  # where a disk behind a network tells at last
            except OSError as error:
                self._voice.complain(str(self.path(rank)), error)

    def interrupt(self) -> None:
        """Leaves the line of a progress bar that will not be drawn again."""
        if sys.stdout is not None and sys.stdout.isatty():
            self._write(_SHOW_CURSOR + b"\n")

    def _log(self, rank: int, tail: _Tail, run_dir: Path) -> None:
        if rank not in self._files:
            if not run_dir.is_dir():
                return
            self.path(rank).parent.mkdir(exist_ok=True)
            # Without a buffer, so that closing it writes nothing and cannot fail for that.
            self._files[rank] = self.path(rank).open("ab", buffering=0)
            self._files[rank].write(self._title)
        while found := tail.read():
            self._files[rank].write(found)

    def _show(self, tail: _Tail) -> None:
        while found := tail.read():
            self._write(found)

    def _write(self, text: bytes) -> None:
        if sys.stdout is None or 0 in self._lost:
            return
        try:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        except OSError as error:
            self._lost.add(0)
            to_devnull(sys.stdout)
            self._voice.complain("what rank 0 prints", error)
