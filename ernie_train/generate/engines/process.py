"""A server as a process of its own, which ends with this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ernie_train.core.errors import EngineError, UserError, storage_errors
from ernie_train.core.foreign_files import open_regular

_GUARD = Path(__file__).with_name("guard.py")
_STOP_S = 30.0
_LAST_LINES = 4
_LAST_BYTES = 2**16  # of the log, which may be long


class ServerProcess:
    """Starts `command`, whose output goes to `log`; `close` ends it and all that it started."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        if shutil.which(command[0]) is None:
            raise UserError(f"the engine cannot be started: no program {command[0]}")
        with storage_errors("cannot write", log):
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = log.open("ab")
        with stream:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), *command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                start_new_session=True,  # signals of the terminal are for the trainer
            )

    def require_alive(self) -> None:
        """Raise `EngineError` with the end of the log if the process has ended."""
        status = self._guard.poll()
        if status is not None:
            raise EngineError(
                f"the engine's process ended with status {status}; the end of {self.log}: "
                f"{self._last_lines()}"
            )

    def _last_lines(self) -> str:
        with suppress(OSError), open_regular(self.log) as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = log.read(_LAST_BYTES).decode(errors="replace")[-4000:].splitlines()
            return " | ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])
        return "(no log)"

    def close(self) -> None:
        """End the server and all that it started."""
        if self._guard.stdin is not None:
            with suppress(OSError):
                self._guard.stdin.close()
        try:
            self._guard.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
