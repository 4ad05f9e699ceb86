"""Run the programs of a model in the best sandbox of this machine and return plain values.

A warmed interpreter inside the sandbox forks a fresh process for each program (`pool.py`). The
process has limits on processor time, memory, file sizes, descriptors and output, and a filter of
system calls (`seccomp.py`): it can start no other process, so nothing outlives it, and it can
address none, so it reaches neither the interpreter that forked it nor its judge. It may write to
one temporary directory alone; if it changed anything there, the sandbox is replaced.

Results leave the sandbox as JSON alone, from which plain values are built here or in a judge. No
exit status, output or patched library of the program's process decides whether tests pass. A row's
own tests run in a judge: another process in another sandbox, which calls the program's functions
through proxies (`guest/test_judge.py`).

Programs have Python's own library, and numpy where the sandbox can read it.

Layers, best first; `layer_in_force` names the one in use:

bubblewrap    Own file system, process, network, IPC and user namespaces: of the machine's files it
              sees the interpreter's and /usr, read-only; no /proc, /etc or home; 16 MiB of /tmp in
              memory. Does not stop: bugs of the kernel; use of the processor up to the limits;
              reading the files under /usr.
Landlock      For machines that forbid namespaces. Kernel rules restrict files as above, the filter
              forbids sockets, and changes of modes, times and lengths by path. Does not stop:
              asking whether a path exists, its size and times (not its content); locks on files
              that it may read; filling the disk with many files of the permitted size until its
              time is over; threads up to its memory. Its directory is on disk.

Both stop network, new processes, signals and tracing, and drop root. If neither works, no program
is run: `SandboxUnavailable`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ernie_train.rewards.sandbox.backends import (
    Layer,
    LayerName,
    SandboxUnavailable,
    possible_layers,
)
from ernie_train.rewards.sandbox.pool import POOL, SandboxLost, SandboxPair
from ernie_train.rewards.sandbox.process import (
    Limits,
    NoAnswerInTime,
    ProgramResult,
    SandboxLostDuringProgram,
    Tests,
    exchange,
    judge_tests,
    script_output,
)

__all__ = [
    "DEFAULT_LIMITS",
    "Limits",
    "ProgramResult",
    "SandboxUnavailable",
    "Tests",
    "layer_in_force",
    "run_calls",
    "run_script",
    "run_tests",
]


DEFAULT_LIMITS = Limits()


def layer_in_force() -> LayerName:
    """Return the name of the layer that isolates programs; raises SandboxUnavailable."""
    return current_layer().name


@functools.cache
def current_layer() -> Layer:
    """Return the best layer that works here; layers are tried once per process.

    Raises SandboxUnavailable with the reason for each layer, if none works.
    """
    layers, reasons = possible_layers()
    for layer in [*layers, *layers]:  # twice: a failure may be an accident
        failure = trial(layer)
        if not failure:
            return layer
        reasons.append(f"{layer.name} does not work with {layer.interpreter}: {failure}")
    raise SandboxUnavailable(
        "programs of a model are never run without a sandbox, and none works here: "
        + "; ".join(dict.fromkeys(reasons))
        + ". Where namespaces are forbidden, as default profiles of containers do, allow them, or "
        "use a kernel with Landlock (5.13 or newer)"
    )


def trial(layer: Layer) -> str:
    """Run a known program in this layer; return the failure, or an empty text."""
    try:
        with POOL.borrow(layer) as pair:
            return _known_failure(pair)
    except (SandboxLost, SandboxLostDuringProgram, OSError) as lost:
        return str(lost)
    except NoAnswerInTime:
        return "a known program does not end"


def _known_failure(pair: SandboxPair) -> str:
    source = "f = abs" if pair.layer.numpy is None else "from numpy import abs as f"
    request = {"kind": "calls", "source": source, "entry_point": "f", "calls": [[-3]]}
    outcome = exchange(pair, request, Limits(cpu_s=10, wall_s=30))
    return "" if outcome.values == [["value", 3]] else outcome.detail or "it gives a wrong value"


def run_calls(
    source: str,
    entry_point: str,
    calls: Sequence[list[Any]],
    limits: Limits | None = None,
    *,
    pooled: bool = True,
) -> ProgramResult:
    """Define `source` in a fresh process and call `entry_point` with each list of arguments.

    The values are ["value", v] or ["error", text] for each call. `pooled=False` starts a sandbox
    for this program alone. Raises SandboxUnavailable if no sandbox works here.
    """
    limits = limits or DEFAULT_LIMITS
    request = {"kind": "calls", "source": source, "entry_point": entry_point, "calls": list(calls)}

    def run(pair: SandboxPair, limits: Limits) -> ProgramResult:
        outcome = exchange(pair, request, limits)
        if outcome.kind != "returned" or _are_pairs(outcome.values, len(calls)):
            return outcome
        return ProgramResult("failed", [], "the program sent back something else than its values")

    return _in_pair(run, limits, pooled)


def _are_pairs(values: Any, expected: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == expected
        and all(isinstance(v, list) and len(v) == 2 and v[0] in ("value", "error") for v in values)
    )


def run_script(
    source: str,
    stdin: str,
    limits: Limits | None = None,
    *,
    pooled: bool = True,
    more_time: bool = True,
) -> ProgramResult:
    """Run `source` as a script with this input; the one value is its standard output as text.

    A script that ends with a status other than 0 has failed. `more_time=False`: one that is not
    finished in time is a "timeout" at once, whether the machine was busy or not. Raises
    SandboxUnavailable if no sandbox works here.
    """

    def run(pair: SandboxPair, limits: Limits) -> ProgramResult:
        try:
            return script_output(pair, source, stdin, limits)
        except NoAnswerInTime:
            if more_time:
                raise
            return ProgramResult("timeout", [], f"not finished after {limits.wall_s:g} s")

    return _in_pair(run, limits or DEFAULT_LIMITS, pooled)


def run_tests(
    source: str, tests: Tests, limits: Limits | None = None, *, pooled: bool = True
) -> ProgramResult:
    """Run a row's own tests in a judge against `source` in a process of its own.

    The values are [passed, text] for each test, or for each method of a test case. Raises
    SandboxUnavailable if no sandbox works here.
    """
    limits = limits or DEFAULT_LIMITS
    return _in_pair(lambda pair, limits: judge_tests(pair, source, tests, limits), limits, pooled)


_Run = Callable[[SandboxPair, Limits], ProgramResult]


def _in_pair(run: _Run, limits: Limits, pooled: bool) -> ProgramResult:
    """Run a program in a pair, and once more if an accident may have been the cause of its end."""
    layer = current_layer()
    for last in (False, True):
        again: Limits | None = limits
        try:
            with POOL.borrow(layer, keep=pooled) as pair:
                result, again = _attempt(run, pair, limits)
        except (SandboxLost, SandboxLostDuringProgram, NoAnswerInTime, OSError) as lost:
            text = str(lost) or "a known program does not end"
            result = ProgramResult("infrastructure", [], text)
        if last or again is None:
            break
        limits = again
    return result


def _attempt(run: _Run, pair: SandboxPair, limits: Limits) -> tuple[ProgramResult, Limits | None]:
    """Return the result, and the limits of another try if it may be an accident's.

    So may a lost sandbox, and no answer in time: a small known program must then work in the same
    pair, or the machine was too busy. A program that worked, rather than slept, gets more time.
    """
    try:
        return run(pair, limits), None
    except NoAnswerInTime as late:
        worked = late.cpu_s > limits.cpu_s * _WORKED
        more = replace(limits, wall_s=limits.wall_s * _MORE_TIME) if worked else limits
        return _blame(pair, limits, worked), more
    except SandboxLostDuringProgram as lost:
        failure = _known_failure(pair)
        if failure:
            return ProgramResult("infrastructure", [], failure), limits
        return ProgramResult("failed", [], str(lost)), limits


_MORE_TIME = 2
# The share of its processor time that a program uses if it works and does not sleep: little, since
# other processes may have the rest.
_WORKED = 0.05
# Seconds for a known program to start.
_START_S = 0.1
_BUSY_S = 0.2
_KNOWN_PROGRAM = f"""
import time
def f(x):
    start = time.process_time()
    while time.process_time() < start + {_BUSY_S}:
        pass
    return x + 1
"""


def _blame(pair: SandboxPair, limits: Limits, worked: bool) -> ProgramResult:
    """Score a program that did not finish, by what the machine gives to a known one.

    If it `worked`, the known one must get the share of a core that the limits promise, `cpu_s` in
    `wall_s`; if it slept, as much as would have shown it to work.
    """
    request = {"kind": "calls", "source": _KNOWN_PROGRAM, "entry_point": "f", "calls": [[1]]}
    allowed_s = _START_S + _BUSY_S * limits.wall_s / limits.cpu_s
    if not worked:
        allowed_s = max(1.0, allowed_s / _WORKED)
    try:
        outcome = exchange(pair, request, Limits(wall_s=allowed_s))
    except NoAnswerInTime:
        return ProgramResult("timeout", [], "the machine is too busy: a known program does not end")
    if outcome.values == [["value", 2]]:
        return ProgramResult("failed", [], f"not finished after {limits.wall_s:g} s")
    return ProgramResult("infrastructure", [], f"a known program fails too: {outcome.detail}")
