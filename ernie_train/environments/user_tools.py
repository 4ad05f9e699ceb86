"""Tools of a user's own file, each function in processes that can be killed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
_WRONG = "its process answered something else than a result"


class UserTools:
    """Keeps the processes that hold a file's functions; a thread borrows one for each call.

    Raises `UserError` where the file cannot be read as tools, then or later, or was edited.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._idle: list[WorkerProcess] = []
        self._lock = threading.Lock()
        # The kernel kills a worker when the thread that started it ends, and those of a turn do.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="tools")
        self._loaded: list[Any] = []  # schemas and the file's hash
        try:
            with self._borrow():
                schemas = self._loaded[0]
            if not schemas:
                raise UserError(f"{file} defines no function that could be a tool")
        except BaseException:
            self.close()
            raise
        self.tools = [UserTool(schema, self) for schema in schemas]

    def call(self, name: str, arguments: dict[str, Any], context: ToolContext) -> str:
        """Return the result of a function; raises `ToolError`.

        The time limit is that of the call alone: a worker that must be started first has its own.
        """
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
        self._starter.shutdown()

    @contextmanager
    def _borrow(self) -> Iterator[WorkerProcess]:
        """Lend a process that runs; one whose call failed to answer is killed."""
        worker = None
        while worker is None:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                worker = self._start()
            elif wait([worker.fileno()], timeout=0):  # an idle one sends nothing until it ends
                worker.kill()
                worker = None
        try:
            yield worker
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._idle.append(worker)

    def _start(self) -> WorkerProcess:
        """Return a new process with the file's functions; all have the same ones."""
        worker = self._starter.submit(WorkerProcess, _WORKER).result()
        try:
            _answer(worker, _LOAD_S)
            kind, found = _ask(worker, ("load", str(self.file)), _LOAD_S)
            if kind == "raised":
                raise UserError(f"tools of {found}")
            loaded = [found, hashlib.sha256(self.file.read_bytes()).digest()]
            if self._loaded not in ([], loaded):
                raise UserError(
                    f"{self.file} was edited while its tools were in use; undo it, or start anew"
                )
        except ToolError as error:
            worker.kill()
            raise UserError(f"{self.file}: {error}") from None
        except BaseException:
            worker.kill()
            raise
        self._loaded = loaded
        return worker


@dataclass(frozen=True)
class UserTool:
    """Calls one function of a user's file as a tool."""

    schema: dict[str, Any]
    owner: UserTools

    def call(self, arguments: dict[str, Any], context: ToolContext) -> str:
        return self.owner.call(self.schema["function"]["name"], arguments, context)


def _ask(worker: WorkerProcess, request: tuple[Any, ...], limit_s: float) -> list[Any]:
    """Return the two parts of a reply to a request; raises `ToolError` where there is none."""
    try:
        with suppress(WorkerLost):  # the wait for its answer tells
            worker.ask(None, request, limit_s)
    except RecursionError:
        raise ToolError("the arguments nest too deeply") from None
    reply = _answer(worker, limit_s)
    if not (isinstance(reply, list) and len(reply) == 2):
        raise ToolError(_WRONG)
    return reply


def _answer(worker: WorkerProcess, limit_s: float) -> list[Any]:
    """Return a reply; raises `ToolError` where none comes in time."""
    if not wait([worker.fileno()], timeout=limit_s):
        raise ToolError(f"not finished after {limit_s:g} s")
    try:
        return worker.answer()
    except WorkerLost:
        raise ToolError("it ended its process") from None
    except (ValueError, RecursionError):
        raise ToolError(_WRONG) from None
