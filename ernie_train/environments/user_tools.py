"""Tools of a user's own file, each function in processes that can be killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ernie_train.core.errors import UserError
from ernie_train.environments.tool import ToolContext, ToolError
from ernie_train.rewards.scoring import WorkerLost, WorkerProcess

_WORKER = "ernie_train.environments.user_worker"
_LOAD_S = 120.0


class UserTools:
    """Keeps the processes that hold a file's functions; a thread borrows one for each call.

    Raises `UserError` where the file cannot be read as tools.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._idle: list[WorkerProcess] = []
        self._lock = threading.Lock()
        worker, schemas = self._start()
        self._idle.append(worker)
        if not schemas:
            self.close()
            raise UserError(f"{file} defines no function that could be a tool")
        self.tools = [UserTool(schema, self) for schema in schemas]

    def call(self, name: str, arguments: dict[str, Any], context: ToolContext) -> str:
        """Return the result of a function; raises `ToolError`."""
        request = ("call", name, arguments, context.max_characters)
        with self._borrow() as worker:
            kind, text = _ask(worker, request, context.limit_s)
        if kind == "error":
            raise ToolError(text)
        return str(text)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for worker in self._idle:
                worker.close()
            self._idle.clear()

    @contextmanager
    def _borrow(self) -> Iterator[WorkerProcess]:
        """Lend a process; one whose call failed to answer is killed."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or self._start()[0]
        try:
            yield worker
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._idle.append(worker)

    def _start(self) -> tuple[WorkerProcess, list[dict[str, Any]]]:
        worker = WorkerProcess(_WORKER)
        try:
            _answer(worker, _LOAD_S)
            kind, told = _ask(worker, ("load", str(self.file)), _LOAD_S)
        except ToolError as error:
            worker.kill()
            raise UserError(f"{self.file}: {error}") from None
        if kind == "raised":
            worker.close()
            raise UserError(f"tools of {told}")
        return worker, told


@dataclass(frozen=True)
class UserTool:
    """A function of a user's file as a tool."""

    schema: dict[str, Any]
    owner: UserTools

    def call(self, arguments: dict[str, Any], context: ToolContext) -> str:
        return self.owner.call(self.schema["function"]["name"], arguments, context)


def _ask(worker: WorkerProcess, request: tuple[Any, ...], limit_s: float) -> list[Any]:
    with suppress(WorkerLost):  # the wait for its answer tells
        worker.ask(None, request, limit_s)
    return _answer(worker, limit_s)


def _answer(worker: WorkerProcess, limit_s: float) -> list[Any]:
    """Return a reply; raises `ToolError` where none comes in time."""
    if not wait([worker.fileno()], timeout=limit_s):
        raise ToolError(f"not finished after {limit_s:g} s")
    try:
        return worker.answer()
    except WorkerLost:
        raise ToolError("it ended its process") from None
