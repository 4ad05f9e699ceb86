"""Forward the output of ranks: rank 0's to the terminal, the others' to run_dir/logs.

The launcher writes the output of each rank to a file of its launch. It is copied from there while
the rank runs, so a rank never waits for a reader, and order and colours are kept. Logs are written
once the run directory exists: a mistake in a recipe leaves none.
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
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it; a killed rank never shows it again


@dataclass
class _Tail:
    """Hold a growing file and the position up to which it has been forwarded."""

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
    """Forward the output of the ranks of one launch.

    Args:
        run_dir: the run directory, which need not exist; None if it is not known.
        title: first line of this launch in each rank's log.
        console: warns about a log that cannot be written; the others are still forwarded.
    """

    def __init__(self, run_dir: Path | None, title: str, console: SafeConsole) -> None:
        self._run_dir = run_dir
        self._console = console
        self._title = f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n".encode()
        self._tails: dict[int, _Tail] = {}
        self._files: dict[int, IO[bytes]] = {}
        self._broken: set[int] = set()  # ranks whose log, for rank 0 the terminal, failed

    def follow(self, rank: int, source: Path) -> None:
        """Forward the output that a rank writes to `source`, from now on."""
        self._tails.setdefault(rank, _Tail(source))

    def forward(self) -> bool:
        """Forward what has been printed since the last call, and return whether that was anything.

        At most 1 MiB of each rank: the caller also has to watch ranks that print without end.
        """
        found = False
        for rank, tail in self._tails.items():
            if rank == 0:
                found |= self._to_terminal(tail)
            elif self._run_dir is not None and rank not in self._broken:
                try:
                    found |= self._to_log(rank, tail, self._run_dir)
                except OSError as error:
                    self._broken.add(rank)
                    self._console.warn_once(str(self.path(rank)), error)
        return found

    def path(self, rank: int) -> Path:
        """Return the log of a rank other than 0."""
        return (self._run_dir or Path()) / LOGS / f"rank_{rank}.log"

    def last_lines(self, rank: int) -> list[str]:
        """Return the last lines that a rank printed in this launch."""
        tail = self._tails.get(rank)
        if tail is None or not tail.source.exists():
            return []
        text = tail.source.read_bytes()[-_CHUNK_BYTES:].decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-SHOWN_LINES:]

    def close(self) -> None:
        """Forward the rest and close the logs."""
        while self.forward():
            pass
        for rank, file in self._files.items():
            try:
                file.close()  # a network disk may report a failed write only here
            except OSError as error:
                self._console.warn_once(str(self.path(rank)), error)

    def end_progress_bar(self) -> None:
        """Leave the line of a progress bar that its rank will not draw again."""
        if sys.stdout is not None and sys.stdout.isatty():
            self._write(_SHOW_CURSOR + b"\n")

    def _to_log(self, rank: int, tail: _Tail, run_dir: Path) -> bool:
        if rank not in self._files:
            if not run_dir.is_dir():
                return False
            self.path(rank).parent.mkdir(exist_ok=True)
            # Unbuffered: otherwise closing a log on a full disk fails again.
            self._files[rank] = self.path(rank).open("ab", buffering=0)
            self._files[rank].write(self._title)
        found = tail.read()
        self._files[rank].write(found)
        return bool(found)

    def _to_terminal(self, tail: _Tail) -> bool:
        found = tail.read()
        self._write(found)
        return bool(found)

    def _write(self, text: bytes) -> None:
        if sys.stdout is None or 0 in self._broken:
            return
        try:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        except OSError as error:
            self._broken.add(0)
            to_devnull(sys.stdout)
            self._console.warn_once("what rank 0 prints", error)
