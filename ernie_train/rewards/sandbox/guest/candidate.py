"""Run a program that a model wrote: define it, call it, send back plain values.

This process does not know which results are expected, and decides nothing about them.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import types
from typing import Any

from ernie_train.rewards.sandbox.guest.values import Reader, decode, encode, plain_scalar, send

_MAX_REQUEST_BYTES = 64 << 20
_SHOWN = 200


def run(channel: int) -> None:
    """Read the one request of the channel and carry it out."""
    reader = Reader(channel, _MAX_REQUEST_BYTES)
    request = reader.message()
    kind = request["kind"]
    if kind == "calls":
        _answer_calls(channel, request)
    elif kind == "script":
        _run_script(channel, request["source"])
    else:
        _serve_judge(channel, reader, request["source"])


def described(error: BaseException) -> str:
    """Return the type and message of an error, cut to a bounded length."""
    return f"{type(error).__name__}: {str(error)[:_SHOWN]}"


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _answer_calls(channel: int, request: dict[str, Any]) -> None:
    """Send ["value", v] or ["error", text] for each call, in one message.

    Each call gets its own arguments from the JSON text, so that no call sees the changes of
    another.
    """
    calls = [json.dumps(call) for call in request["calls"]]
    space, failure, values = _module("candidate"), "", []
    try:
        exec(compile(request["source"], "candidate", "exec"), space)
        function = _function(space, request["entry_point"])
    except BaseException as error:
        failure = described(error)
    for call in calls:
        try:
            if failure:
                raise RuntimeError(failure)
            text = json.dumps(function(*json.loads(call)), allow_nan=False, default=_as_plain)
            value = ["value", json.loads(text)]
        except BaseException as error:
            value = ["error", described(error)]
        values.append(value)
    send(channel, values)


def _as_plain(value: Any) -> Any:
    plain = plain_scalar(value)
    if plain is value:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return plain


def _function(space: dict[str, Any], name: str) -> Any:
    """Return the function of that name, or the method of a class Solution, as in contests."""
    if name not in space and "Solution" in space:
        return getattr(space["Solution"](), name)
    return space[name]


def _run_script(channel: int, source: str) -> None:
    """Run as `python program.py`: on the standard streams, with the exit status of Python."""
    sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", newline="\n")  # noqa: SIM115
    sys.argv = ["program.py"]
    status, failure = 0, ""
    try:
        exec(compile(source, "program.py", "exec"), _module("__main__"))
    except SystemExit as error:
        code = error.code
        status = code if isinstance(code, int) else int(code is not None)
    except BaseException as error:
        status, failure = 1, described(error)
    if "threading" in sys.modules:  # as at the end of any script
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    send(channel, failure)
    sys.stdout.flush()
    os._exit(status & 255)


def _serve_judge(channel: int, reader: Reader, source: str) -> None:
    """Carry out the requests of a judge on the program's objects, until the judge ends.

    Objects that are not plain values stay here in `objects`; messages name them by their index.
    """
    space = _module("candidate")
    objects: list[Any] = []

    def number_of(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def perform(request: Any) -> Any:
        operation, target, arguments = request
        arguments = decode(arguments, objects.__getitem__)
        if operation == "define":
            return exec(compile(target, "candidate", "exec"), space)
        if operation == "name":
            return space[target]
        return _OPERATIONS[operation](objects[target], *arguments)

    message: Any = ["define", source, []]
    while True:
        try:
            answer = ["value", encode(perform(message), number_of)]
        except BaseException as error:
            answer = ["error", _builtin_name(error), str(error)[:_SHOWN]]
        send(channel, answer)
        try:
            message = reader.message()
        except EOFError:
            return


def _builtin_name(error: BaseException) -> str:
    """Return the name of an exception's class; for the program's own classes, of a builtin base."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _call(function: Any, positional: list[Any], named: dict[str, Any]) -> Any:
    return function(*positional, **named)


_OPERATIONS: dict[str, Any] = {
    "call": _call,
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "iter": iter,
    "next": next,
    "len": len,
}
