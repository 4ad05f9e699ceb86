"""Run a row's own tests. The program under test is in another process.

To the tests the program's names are `Remote` objects: operations on one are sent to the program's
process, and return a plain value or another Remote. A Remote equals itself alone and has no truth
value, so no class of the program can decide the comparison, and no patch of the program reaches the
`assert`, the builtins or the libraries that the tests use.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

from ernie_train.rewards.sandbox.guest.values import Reader, decode, encode, send

_MAX_REQUEST_BYTES = 64 << 20
_SHOWN = 200


class CandidateError(Exception):
    """Signal that the program raised no ordinary exception, or sent back no value."""


class CandidateGone(BaseException):
    """Signal that the program's process ended; no `except Exception` of a test may catch this."""


class _Link:
    """Send requests to the program's process and read its answers."""

    def __init__(self, channel: int, max_bytes: int) -> None:
        self._channel = channel
        self._reader = Reader(channel, max_bytes)
        self.used = False
        self.gone = ""  # the reason why there are no more answers

    def ask(self, operation: str, target: Any, *arguments: Any) -> Any:
        self.used = True
        request = [operation, target, encode(list(arguments), _number_of)]
        try:
            if not self.gone:
                send(self._channel, request)
                return self._value(operation, self._reader.line())
        except (OSError, EOFError):
            self.gone = "the program's process has ended"
        except OverflowError as error:
            self.gone = str(error)
        raise CandidateGone(self.gone)

    def _value(self, operation: str, answer: bytes) -> Any:
        try:
            kind, *body = json.loads(answer)
            if kind == "value":
                return decode(body[0], lambda number: Remote(self, int(number)))
            name, text = map(str, body)
        except Exception as error:
            raise CandidateError("the program sent back something that is no value") from error
        raise _exception(operation, name, text)


def _exception(operation: str, name: str, text: str) -> Exception:
    """Return a builtin exception of that name; AssertionError is kept for the tests' own.

    So are those that end iterations, but for an iterator's: `all(map(test, cases))` would take one
    for the end of the cases.
    """
    kind = getattr(builtins, name, None)
    unlike = CandidateError(f"{name}: {text}")
    if name in ("StopIteration", "StopAsyncIteration") and operation != "next":
        return unlike
    if not isinstance(kind, type) or not issubclass(kind, Exception) or kind is AssertionError:
        return unlike
    try:
        return kind(text)
    except TypeError:  # its constructor needs more than a text
        return unlike


def _number_of(value: Any) -> int:
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_number")
    raise TypeError(f"a test passes a {type(value).__name__}, which cannot be sent to the program")


class Remote:
    """Represent an object of the program: a function, a class or a value that is not plain."""

    __slots__ = ("_link", "_number")
    _link: _Link
    _number: int

    def __init__(self, link: _Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.ask("call", self._number, list(positional), named)

    def __getattr__(self, name: str) -> Any:
        # Protocols of the tests' own libraries (copy, unittest) ask for special methods.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self._number, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("item", self._number, key)

    def __iter__(self) -> Iterator[Any]:
        made = self._link.ask("iter", self._number)
        return made if isinstance(made, Remote) else iter(made)

    def __next__(self) -> Any:
        return self._link.ask("next", self._number)

    def __len__(self) -> int:
        return int(self._link.ask("len", self._number))

    def __bool__(self) -> bool:
        raise TypeError("the program gave an object where the tests need a plain value")


def run(channel: int, program: int) -> None:
    """Run the tests of one request; send {"setup_error": text} or the results.

    Results: {"results": [[passed, text], ...], "gone": why the program's process ended, or ""}.
    A setup error is one that the program had no hand in: it was asked nothing, and defines all that
    it is to define, as functions or objects.

    The request: `libraries` that setup and tests need, `names` of the program that they use,
    `setup`, `tests` (sources), the `entry_point` that a test's `check` function is called with,
    `max_bytes` of an answer.
    """
    request = Reader(channel, _MAX_REQUEST_BYTES).message()
    link = _Link(program, request["max_bytes"])
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    space, entry_point, tests = module.__dict__, request["entry_point"], request["tests"]
    results: list[list[Any]] = []
    missing: list[str] = []
    unfit: Any = False
    try:
        for library in request["libraries"]:
            if importlib.util.find_spec(library) is None:
                raise ModuleNotFoundError(f"the sandbox has no library {library}")
        missing = _bind(request["names"], space, link)
        unfit = missing or any(not isinstance(space[name], Remote) for name in request["names"])
        sys.modules["solution"] = types.ModuleType("solution")
        sys.modules["solution"].__dict__.update(space)
        link.used = False
        exec(compile(request["setup"], "setup", "exec"), space)
        asked = link.used
        # A setup may contain the signature of the function with an empty body.
        _bind([entry_point] if entry_point else [], space, link)
        link.used = asked
        for source in tests:
            results += _run_test(source, space, entry_point, link)
            if not (link.used or unfit or all(passed for passed, _ in results)):
                raise RuntimeError(f"a test fails without the program: {results[-1][1]}")
    except CandidateGone as gone:
        results += [[False, str(gone)]] * max(len(tests) - len(results), 1)
    except BaseException as error:
        if not (link.used or unfit):
            send(channel, {"setup_error": _described(error)})
            return
        results += [[False, _described(error)]] * len(tests)
    if not link.used and all(passed for passed, _ in results):
        if not missing:
            send(channel, {"setup_error": "the tests ask nothing of the program"})
            return
        results = [[False, f"the program does not define {missing[0]}"]] * len(results)
    send(channel, {"results": results, "gone": link.gone})


def _bind(names: list[str], space: dict[str, Any], link: _Link) -> list[str]:
    """Bind the program's names; return those that it does not define, which stay undefined."""
    missing = []
    for name in names:
        try:
            space[name] = link.ask("name", name)
        except KeyError:
            space.pop(name, None)
            missing.append(name)
    return missing


def _run_test(source: str, space: dict[str, Any], entry_point: str, link: _Link) -> list[list[Any]]:
    """Return [passed, text] for the test, or for each method of the test cases that it defines.

    Functions whose names begin with "test" and that need no arguments are called, as pytest does.
    """
    before = dict(space)
    try:
        exec(compile(source, "test", "exec"), space)
        made = {name: value for name, value in space.items() if before.get(name) is not value}
        if entry_point and isinstance(made.get("check"), types.FunctionType):
            made["check"](space[entry_point])
        for function in _test_functions(made):
            function()
        cases = _test_cases(made)
        results = _run_cases(cases) if cases else [[True, ""]]
    except CandidateGone:
        raise
    except BaseException as error:
        results = [[False, _described(error)]]
    if link.gone:  # a test that caught CandidateGone has not passed
        raise CandidateGone(link.gone)
    return results


def _test_functions(made: dict[str, Any]) -> list[Any]:
    return [
        value for name, value in made.items()
        if name.startswith("test") and isinstance(value, types.FunctionType)
        and not value.__code__.co_argcount
    ]  # fmt: skip


def _test_cases(made: dict[str, Any]) -> list[Any]:
    unittest = sys.modules.get("unittest")
    if unittest is None:
        return []
    return [
        value for value in made.values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
        and value is not unittest.TestCase
    ]  # fmt: skip


def _run_cases(cases: list[Any]) -> list[list[Any]]:
    import unittest

    results: list[list[Any]] = []
    for case in cases:
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
            outcome = unittest.TestResult()
            test.run(outcome)
            problems = [*outcome.failures, *outcome.errors, *outcome.skipped]
            passed = outcome.wasSuccessful() and not problems
            last = problems[0][1].strip().splitlines()[-1][:_SHOWN] if problems else ""
            results.append([passed, last])
    return results or [[False, "the tests define a test case without tests"]]


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:_SHOWN]}".rstrip(": ")
