"""Grade programs: run the program of a completion against the row's tests, in the sandbox.

`tests` have one of three forms, in a list or as its JSON text, and a row may have `hidden_tests` of
the same form beside those that the problem shows; a program is correct if it passes all of both.

    [arguments, expected]             `entry_point` is called; plain JSON values
    "assert f(1) == 2"                statements, `check(candidate)`, or unittest cases, as source
    {"input": .., "output": ..}       the program as a script; output compared line by line,
                                      expected decimals to six digits

Arguments reach the program as copies: its changes to them are not seen by the tests, and functions
or objects of the tests cannot be passed.

Contests' tests with `testtype` "functional", or with an `entry_point` and one JSON value a line,
are calls too. Tests may stand in columns, {"inputs": [..], "outputs": [..]}, as in APPS; with
`fn_name` the inputs are arguments, and what is expected may be wrapped in a list of one.

For tests that are source, `setup` is run before them (it may use the program's names); names that
libraries have are the libraries' (`tested_names.py`). `preamble` precedes the program, and runs
before the setup too: its helpers and imports belong to the tests and cannot be replaced by the
program, except for the `entry_point`. `pass_rate` true gives the share of tests passed as the
value; the status is correct only if all are. `solution` is a program that must pass: if it fails,
the row is reported as bad_gold and completions are not blamed.
"""

import functools
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ernie_train.data.formats import json_value
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.sandbox.api import ProgramResult
from ernie_train.rewards.score import Score, read_response
from ernie_train.rewards.verifiers.programs import program_of
from ernie_train.rewards.verifiers.tested_names import BadTests, find_tested_names
from ernie_train.rewards.verifiers.tool_call import same_json

_DECIMAL = re.compile(r"[+-]?\d{1,20}(?:\.\d{0,40})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_MAX_CHARACTERS = 50_000
# For the tests of a script together.
_ALL_SCRIPTS_S = 30.0
# True if a test was passed, and the message if not.
_Result = tuple[bool, str]
_Results = list[_Result] | Score


@dataclass(frozen=True)
class _Suite:
    """Run the tests of a row against the source of any program, which is to define `names`.

    `solution` is the row's own program, "" without one.
    """

    results_of: Callable[[str], _Results]
    names: list[str]
    preamble: str
    solution: str


def score(row: dict[str, Any], completion: str) -> Score:
    """Run the program of a completion against the row's tests; see the module for the fields.

    A failure that the program causes, such as exceeded limits, is wrong. Raises SandboxUnavailable
    if programs cannot be run safely.
    """
    try:
        suite = _suite(row)
    except BadTests as error:
        return Score.bad_gold(str(error))
    response = read_response(row, completion)
    if isinstance(response, Score):
        return response
    source = program_of(response, suite.names)
    graded = _graded(suite, source, whole=row.get("pass_rate") is not True)
    if graded.status not in ("wrong", "bad_gold") or not suite.solution:
        return graded
    # Only what fails with the row's own solution is the row's fault.
    reference = _solution_score(row, suite)
    if reference.status == "wrong":
        return Score.bad_gold(f"the row's own solution fails: {reference.detail}")
    if reference.status == "correct":
        return graded if graded.status == "wrong" else Score.wrong(graded.detail)
    # The reference could not be graded either: nothing is known about the completion.
    return reference


def _graded(suite: _Suite, source: str, *, whole: bool) -> Score:
    """Run the tests on `source`; with `whole` a program that fails any test has the value 0."""
    if len(source) > _MAX_CHARACTERS:
        return Score.wrong(f"a program of {len(source)} characters")
    if suite.preamble:
        source = f"{suite.preamble}\n{source}"
    results = suite.results_of(source)
    if isinstance(results, Score):
        return _unless_numpy_lacks(results)
    passed = sum(ok for ok, _ in results)
    if passed == len(results):
        return Score.correct()
    first = next(text for ok, text in results if not ok)
    detail = f"{passed} of {len(results)} tests passed: {first}"
    return _unless_numpy_lacks(Score(0.0 if whole else passed / len(results), "wrong", detail))


def _unless_numpy_lacks(score: Score) -> Score:
    """Return "infrastructure" for a program that failed for want of numpy, which most have."""
    if "No module named 'numpy'" in score.detail and api.current_layer().numpy is None:
        return Score.infrastructure(f"the sandbox cannot read numpy: {score.detail}")
    return score


_solution_scores: dict[str, Score] = {}
_MAX_SOLUTION_SCORES = 100_000


def _solution_score(row: dict[str, Any], suite: _Suite) -> Score:
    """Return the score of the row's own solution, computed once in a process."""
    fields = ("tests", "hidden_tests", "entry_point", "setup", "preamble", "solution")
    text = json.dumps([row.get(name) for name in fields], sort_keys=True, default=repr)
    key = hashlib.sha256(text.encode()).hexdigest()
    known = _solution_scores.get(key)
    if known is not None:
        return known
    reference = _graded(suite, suite.solution, whole=True)
    if reference.trains:
        if len(_solution_scores) >= _MAX_SOLUTION_SCORES:
            _solution_scores.clear()
        _solution_scores[key] = reference
    return reference


# ---- the three forms of tests -------------------------------------------------------------------


def _suite(row: dict[str, Any]) -> _Suite:
    (tests, called), (hidden, also) = map(_listed, (row.get("tests"), row.get("hidden_tests")))
    tests += hidden
    texts = {name: row.get(name, "") for name in ("entry_point", "setup", "preamble", "solution")}
    texts["entry_point"] = texts["entry_point"] or called or also
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadTests(f"{name} must be a text, not {text!r}"[:200])
    tests = [_as_call(test, texts["entry_point"]) for test in tests]
    names = [texts["entry_point"]] if texts["entry_point"] else []
    texts["solution"] = program_of(texts["solution"], names)
    if tests and all(isinstance(test, str) for test in tests):
        run, used = _source_tests(tests, texts)
        names = names or used
    elif tests and all(_is_call(test) for test in tests):
        if not texts["entry_point"]:
            raise BadTests("tests of the form [arguments, expected] need entry_point")
        run = functools.partial(_call_results, texts["entry_point"], tests)
    elif tests and all(_is_script(test) for test in tests):
        every = row.get("pass_rate") is True
        run, names = functools.partial(_script_results, tests, every), []
    else:
        raise BadTests(
            "needs tests, a list of [arguments, expected], of source texts, or of "
            '{"input", "output"}'
        )
    return _Suite(run, names, texts["preamble"], texts["solution"])


def _listed(tests: Any) -> tuple[list[Any], str]:
    """Return the tests of a field as a list, and the function that they call if they name it.

    A table holds values of several types as JSON text: all the tests, or each of them.
    """
    tests = json_value(tests)
    if tests is None:
        return [], ""
    if isinstance(tests, str):
        return ([tests] if tests.strip() else []), ""
    if isinstance(tests, dict):
        return _columns(tests)
    if not isinstance(tests, list):
        raise BadTests(f"tests must be a list or a text, not {tests!r}"[:200])
    return list(map(json_value, tests)), ""


def _columns(tests: dict[str, Any]) -> tuple[list[Any], str]:
    """Return the tests that stand in columns, and the name of their function."""
    inputs = tests.get("inputs", tests.get("input"))
    outputs = tests.get("outputs", tests.get("output"))
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise BadTests("tests in columns need inputs and as many outputs")
    name = tests.get("fn_name") or ""
    pairs = zip(inputs, outputs, strict=True)
    if not name:
        return [{"input": _text(given), "output": _text(told)} for given, told in pairs], ""
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise BadTests("with fn_name, each of the inputs must be a list of arguments")
    return [[arguments, _Returned(told)] for arguments, told in pairs], str(name)


def _text(value: Any) -> str:
    """Return what a script reads or writes; some data sets have it as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class _Returned:
    """Hold what a contest's function returns: the value, or the only one of a list."""

    value: Any

    def __str__(self) -> str:
        return str(self.value)


def _is_call(test: Any) -> bool:
    return isinstance(test, list) and len(test) == 2 and isinstance(test[0], list)


def _is_script(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output"))


def _as_call(test: Any, entry_point: str) -> Any:
    """Return a contest's functional test, JSON values as text, as [arguments, expected].

    Any other test is returned as it is. Raises BadTests if its values are no JSON.
    """
    if not _is_script(test) or test.get("testtype", "functional") != "functional":
        return test
    try:
        arguments = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
        expected = json.loads(test["output"])
    except (ValueError, RecursionError) as error:
        if "testtype" not in test:
            return test
        raise BadTests(f"a functional test's values must be JSON, one a line: {error}") from None
    return [arguments, expected] if entry_point or "testtype" in test else test


def _call_results(entry_point: str, tests: list[tuple[list[Any], Any]], source: str) -> _Results:
    outcome = api.run_calls(source, entry_point, [arguments for arguments, _ in tests])
    if outcome.kind != "returned":
        return _failure(outcome)
    results = []
    for (arguments, expected), (kind, value) in zip(tests, outcome.values, strict=True):
        call = f"{entry_point}{tuple(arguments)}"[:200]
        if kind != "value":
            results.append((False, f"{call}: {str(value)[:200]}"))
        elif not _equal(value, expected):
            shown = f"{str(value)[:80]}, expected {str(expected)[:80]}"
            results.append((False, f"{call} gives {shown}"))
        else:
            results.append((True, ""))
    return results


def _script_results(tests: list[dict[str, str]], every: bool, source: str) -> _Results:
    """Run a script on each test; without `every` the first failure fails all later tests too.

    All together have a bound, so that a script that sleeps a little on each holds no process up.
    """
    results: list[_Result] = []
    start, cpu_s = time.monotonic(), 0.0
    for test in tests:
        spent_s = time.monotonic() - start
        if spent_s > _ALL_SCRIPTS_S:
            late = f"{len(results)} of {len(tests)} tests took {spent_s:.0f} s"
            if cpu_s > spent_s / 10:  # it works and does not sleep: there are too many tests for it
                return Score.timeout(late)
            results.append((False, late))
        else:
            outcome = api.run_script(source, test["input"])
            cpu_s += outcome.cpu_s
            if outcome.kind not in ("returned", "failed"):
                return _failure(outcome)
            results.append(_script_result(outcome, test["output"]))
        if not results[-1][0] and not every:
            return results + [(False, "")] * (len(tests) - len(results))
    return results


def _script_result(outcome: ProgramResult, expected: str) -> _Result:
    if outcome.kind == "failed":
        return False, outcome.detail
    written = outcome.values[0]
    if _same_output(written, expected):
        return True, ""
    return False, f"it writes {written[:80]!r}, expected {expected[:80]!r}"


def _source_tests(
    tests: list[str], texts: dict[str, str]
) -> tuple[Callable[[str], _Results], list[str]]:
    """Return the run of these tests and the program's names that they use."""
    setup = f"{texts['preamble']}\n{texts['setup']}"
    names = find_tested_names(
        setup, tests, entry_point=texts["entry_point"], preamble=texts["preamble"],
        solution=texts["solution"],
    )  # fmt: skip
    prepared = api.Tests(
        tests=tests,
        names=names.program,
        setup="\n".join([*names.imports, setup]),
        entry_point=texts["entry_point"],
        libraries=names.libraries,
    )

    def results_of(source: str) -> _Results:
        outcome = api.run_tests(source, prepared)
        if outcome.kind != "returned":
            return _failure(outcome)
        # The statement of a short test explains more than the name of its exception.
        shown = tests if len(tests) == len(outcome.values) else [""] * len(outcome.values)
        return [
            (passed, f"{test.strip()[:200]}: {text}".strip(": "))
            for test, (passed, text) in zip(shown, outcome.values, strict=True)
        ]

    return results_of, names.program


def _failure(outcome: ProgramResult) -> Score:
    return {
        "failed": Score.wrong,
        "bad_tests": Score.bad_gold,
        "timeout": Score.timeout,
        "infrastructure": Score.infrastructure,
    }[outcome.kind](outcome.detail)


# ---- comparison ---------------------------------------------------------------------------------


def _equal(value: Any, expected: Any) -> bool:
    """Compare JSON values; floating-point numbers to within rounding."""
    if isinstance(expected, _Returned):
        told = expected.value
        alone = isinstance(told, list) and len(told) == 1
        return _equal(value, told) or (alone and _equal(value, told[0]))
    if isinstance(expected, float) and isinstance(value, int | float):
        if isinstance(value, bool) or abs(value) > sys.float_info.max:  # no float holds it
            return False
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    if isinstance(expected, dict) and isinstance(value, dict):
        same = value.keys() == expected.keys()
        return same and all(_equal(value[key], expected[key]) for key in expected)
    return same_json(value, expected)


def _same_output(written: str, expected: str) -> bool:
    """Compare output line by line; lines that differ, word by word with decimals rounded."""
    lines, wanted = _lines(written), _lines(expected)
    if len(lines) != len(wanted):
        return False
    for line, want in zip(lines, wanted, strict=True):
        if line == want:
            continue
        words, wants = line.split(" "), want.split(" ")
        if len(words) != len(wants) or not all(map(_same_word, words, wants)):
            return False
    return True


def _same_word(word: str, expected: str) -> bool:
    """Return True for equal texts, or a number within 1e-6 of an expected decimal."""
    if word == expected:
        return True
    decimal = "." in expected and _DECIMAL.fullmatch(expected) and _DECIMAL.fullmatch(word)
    if not decimal:
        return False
    given, wanted = Decimal(word), Decimal(expected)  # 1e999 is no infinity
    return abs(given - wanted) <= max(Decimal("1e-6") * abs(wanted), Decimal("1e-9"))


def _lines(text: str) -> list[str]:
    """Return lines without white space at their ends and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
