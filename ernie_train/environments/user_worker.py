"""Run a process that answers calls of the functions in a user's file.

It is started by `user_tools.py` and may be killed at any moment. Requests: ["load", file], then
["call", name, arguments, most characters of the result]. Replies are JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from ernie_train.core.processes import die_with_parent
from ernie_train.environments.tool import Signature, ToolError
from ernie_train.io.python_files import run_file


def main(descriptor: int, parent: int) -> None:
    """Answer requests until the other end of the pipe is closed, or its owner `parent` ends."""
    die_with_parent(parent)
    os.set_inheritable(descriptor, False)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what a tool prints belongs to nobody's terminal
        os.dup2(nothing, stream)
    pipe: Connection[Any, Any] = Connection(descriptor)
    tools = FileTools()
    try:
        pipe.send_bytes(b'["ready"]')
        while True:
            kind, *request = pipe.recv()
            reply = tools.load(*request) if kind == "load" else tools.call(*request)
            pipe.send_bytes(json.dumps(reply).encode())
    except (EOFError, ConnectionError):
        return


class FileTools:
    """Calls the public functions of a file, as tools of the names that they have there."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._signatures: dict[str, Signature] = {}

    def load(self, file: str) -> list[Any]:
        """Return ["tools", their schemas], or ["raised", what is wrong with the file]."""
        try:
            module = run_file(file)
            self._functions = {
                name: value
                for name, value in vars(module).items()
                if inspect.isfunction(value)
                and value.__module__ == module.__name__
                and not name.startswith("_")
            }
            for name, function in self._functions.items():
                self._signatures[name] = self._signature(file, name, function)
        except Exception as error:  # a user's file may raise anything
            known = isinstance(error, ValueError) and str(error).startswith(file)
            return ["raised", str(error) if known else f"{file}: {_error_text(error)}"]
        return ["tools", [signature.schema for signature in self._signatures.values()]]

    def _signature(self, file: str, name: str, function: Any) -> Signature:
        """Return the signature of a function; `ValueError` names its line and what is wrong."""
        names = [other for other, same in self._functions.items() if same is function]
        try:
            if len(names) > 1:
                raise ValueError(
                    f"{' and '.join(names)} are one function; give it one name without _ in front"
                )
            return Signature.of(function, name)
        except ValueError as error:
            raise ValueError(f"{file}:{function.__code__.co_firstlineno}: {error}") from None

    def call(self, name: str, arguments: dict[str, Any], most: int) -> list[Any]:
        """Return ["result", text] or ["error", text]."""
        try:
            result = self._functions[name](**self._signatures[name].check(arguments))
            text = result if isinstance(result, str) else _as_json(result)
        except ToolError as error:
            return ["error", str(error)]
        except BaseException as error:  # sys.exit too is an answer
            return ["error", _error_text(error)]
        return ["result", text[:most]]


def _as_json(result: Any) -> str:
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolError(f"the result is no JSON: {error}") from None


def _error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
