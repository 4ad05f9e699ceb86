"""Run one program in a pair of sandboxes: its limits, its request and the result."""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ernie_train.rewards.sandbox.backends import Layer
from ernie_train.rewards.sandbox.guest.server import SETUP_FAILED
from ernie_train.rewards.sandbox.pool import ProcessExit, Sandbox, SandboxLost, SandboxPair


class NoAnswerInTime(Exception):
    """Signal that nothing was received before the deadline; `cpu_s` is what was used until then."""

    cpu_s = 0.0


class SandboxLostDuringProgram(Exception):
    """Signal that the sandbox ended while a program ran in it."""


@dataclass(frozen=True)
class Limits:
    """Limit the resources of one program. Sizes are in bytes, times in seconds.

    Processor time is the limit that counts: contests allow Python 2 to 6 s. The wall limit stops
    programs that sleep; one that works gets more, so that a busy machine fails nobody.
    """

    cpu_s: int = 6
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20
    threads: int = 16
    file_bytes: int = 1 << 20
    open_files: int = 32
    output_bytes: int = 8 << 20

    def resources(self, layer: Layer) -> dict[str, tuple[int, int]]:
        """Return name in setrlimit(2) -> (soft, hard) limit."""
        limits = {
            "CPU": (self.cpu_s, self.cpu_s + 1),
            "AS": (self.memory_bytes, self.memory_bytes),
            "FSIZE": (self.file_bytes, self.file_bytes),
            "NOFILE": (self.open_files, self.open_files),
            "CORE": (0, 0),
        }
        return limits | ({"NPROC": (self.threads, self.threads)} if layer.has_namespaces else {})


@dataclass(frozen=True)
class ProgramResult:
    """Hold the result of running a program.

    kind: "returned": `values` are those that the caller asked for; "failed": the program exceeded
    its limits or ended its process, `detail` says how; "bad_tests": the row's tests fail without
    the program; "timeout": the machine was too busy to give the program its time;
    "infrastructure": the sandbox failed. The last three say nothing about the program. `cpu_s` is
    the processor time of a script.
    """

    kind: Literal["returned", "failed", "bad_tests", "timeout", "infrastructure"]
    values: list[Any]
    detail: str = ""
    cpu_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Tests:
    """Hold a row's own tests, for a judge.

    `tests` are sources: statements with `assert`, a function `check(candidate)`, or unittest
    cases. `setup` is run once before them. `names` are the program's names that they use;
    `entry_point` is the name of the function that `check` is called with, "" for none.
    `libraries` are the modules that setup and tests need.
    """

    tests: list[str]
    names: list[str]
    setup: str = ""
    entry_point: str = ""
    libraries: Sequence[str] = ()
    __test__ = False  # for pytest, which collects classes of this name


@dataclass
class _Process:
    """Control the process of a program or a judge: this end of its channel, and its deadline."""

    sandbox: Sandbox
    limits: Limits
    channel: socket.socket
    deadline: float  # of time.monotonic()
    ended: ProcessExit | None = None

    def tell(self, request: dict[str, Any]) -> None:
        """Send a request; that the process has ended is noticed when its answer is read."""
        self.channel.settimeout(max(self.deadline - time.monotonic(), 0.01))
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError as error:
            raise NoAnswerInTime from error
        except (BrokenPipeError, ConnectionResetError):
            return

    def line(self) -> tuple[bytes, str]:
        """Return the bytes up to a newline, and "" or the reason why there is no whole line."""
        return _read(self.channel.fileno(), self.deadline, self.limits.output_bytes, line=True)

    def stop(self, *, ending: bool = False) -> ProcessExit:
        """End the process; with `ending` it gets a moment to end by itself."""
        if self.ended is None:
            try:
                self.ended = self.sandbox.stop(ending=ending)
            except SandboxLost as lost:
                raise SandboxLostDuringProgram(str(lost)) from lost
        return self.ended

    def fate(self, otherwise: str) -> ProgramResult:
        """Return the result of a process that closed its channel without the answer."""
        ended = self.stop(ending=True)
        if ended.status is not None and os.waitstatus_to_exitcode(ended.status) == SETUP_FAILED:
            raise SandboxLostDuringProgram("the process could not be made ready for the program")
        # A process that catches SIGXCPU gets SIGKILL a second later. For the limit the kernel
        # counts ticks, which on a busy virtual machine run ahead of the time that it reports.
        caught = ended.killed_by == signal.SIGKILL and ended.cpu_s >= self.limits.cpu_s / 2
        if ended.killed_by == signal.SIGXCPU or caught:
            return ProgramResult("failed", [], f"more than {self.limits.cpu_s} s of processor time")
        if ended.killed_by == signal.SIGKILL:  # it cannot do so itself: the filter forbids it
            return ProgramResult("infrastructure", [], "something outside killed the program")
        if ended.killed_by:
            otherwise += f" ({signal.Signals(ended.killed_by).name})"
        return ProgramResult("failed", [], otherwise)


@contextmanager
def _process(
    sandbox: Sandbox, limits: Limits, deadline: float, *more: int, judge: bool = False
) -> Iterator[_Process]:
    """Yield a fresh process with a channel and the descriptors `more`; end it afterwards."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            sandbox.start([theirs.fileno(), *more], limits.resources(sandbox.layer), judge=judge)
        process = _Process(sandbox, limits, ours, deadline)
        try:
            yield process
        except NoAnswerInTime as late:
            late.cpu_s += process.stop().cpu_s
            raise
        finally:
            process.stop()


def exchange(pair: SandboxPair, request: dict[str, Any], limits: Limits) -> ProgramResult:
    """Send one request to a fresh process and return its answer as the values.

    Raises NoAnswerInTime if there is no answer in time, SandboxLostDuringProgram if the sandbox
    ends meanwhile, and SandboxLost if it does not start.
    """
    with _process(pair.programs, limits, time.monotonic() + limits.wall_s) as process:
        process.tell(request)
        line, problem = process.line()
        if problem:
            return process.fate(problem)
    return _parsed(line)


def _parsed(line: bytes) -> ProgramResult:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return ProgramResult("failed", [], "the program sent back something else than JSON")
    return ProgramResult("returned", values if isinstance(values, list) else [values])


def script_output(pair: SandboxPair, source: str, stdin: str, limits: Limits) -> ProgramResult:
    """Return the standard output of a script as one text. Raises the errors of `exchange`."""
    # The input is a file in memory: writing it into a pipe could block on a script that does not
    # read.
    given = os.memfd_create("stdin")
    reading, writing = os.pipe()
    deadline = time.monotonic() + limits.wall_s
    try:
        os.write(given, stdin.encode(errors="surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        with _process(pair.programs, limits, deadline, given, writing) as process:
            os.close(writing)
            writing = -1
            process.tell({"kind": "script", "source": source})
            output, problem = _read(reading, deadline, limits.output_bytes, line=False)
            if problem:
                return ProgramResult("failed", [], problem)
            ended = process.stop(ending=True)
            if ended.status != 0:
                failure = _text(process.line()[0])
                return process.fate(failure or "the script ended with a status other than 0")
    finally:
        for descriptor in (given, reading, *([writing] if writing >= 0 else [])):
            os.close(descriptor)
    text = output.decode(errors="replace")
    return ProgramResult("returned", [text], cpu_s=ended.cpu_s)


def _text(line: bytes) -> str:
    try:
        return str(json.loads(line))[:300]
    except (ValueError, RecursionError):
        return ""


def judge_tests(pair: SandboxPair, source: str, tests: Tests, limits: Limits) -> ProgramResult:
    """Return [passed, text] for each of a row's tests. Raises the errors of `exchange`."""
    deadline = time.monotonic() + limits.wall_s
    with _process(pair.programs, limits, deadline) as program:
        program.tell({"kind": "objects", "source": source})
        line, problem = program.line()
        if problem:
            return program.fate(problem)
        defined = _parsed(line).values
        if defined[:1] != ["value"]:
            return ProgramResult("failed", [], ": ".join(map(str, defined[1:]))[:300])
        verdict = _judged(pair.judges, program, tests)
        if isinstance(verdict, ProgramResult):
            return verdict
        if "setup_error" in verdict:
            return ProgramResult("bad_tests", [], f"bad tests: {verdict['setup_error']}")
        if verdict["gone"]:
            fate = program.fate(verdict["gone"])
            return fate if fate.kind != "failed" else ProgramResult("returned", verdict["results"])
    return ProgramResult("returned", verdict["results"])


def _judged(sandbox: Sandbox, program: _Process, tests: Tests) -> dict[str, Any] | ProgramResult:
    """Return the judge's reply; the program's channel is handed to the judge."""
    limits, way = program.limits, program.channel.fileno()
    program.channel.setblocking(True)  # the judge shares the mode of the channel
    with _process(sandbox, limits, program.deadline, way, judge=True) as judge:
        judge.tell({
            "setup": tests.setup, "tests": tests.tests, "names": tests.names,
            "entry_point": tests.entry_point, "libraries": list(tests.libraries),
            "max_bytes": limits.output_bytes,
        })  # fmt: skip
        program.channel.close()
        line, problem = judge.line()
        if problem:
            return judge.fate("the tests themselves broke the limits")
    verdict: dict[str, Any] = json.loads(line)
    return verdict


def _read(source: int, deadline: float, max_bytes: int, *, line: bool) -> tuple[bytes, str]:
    """Return the bytes up to a newline (`line`) or to the end, and "" or why neither was reached.

    Raises NoAnswerInTime at the deadline.
    """
    poll = select.poll()
    poll.register(source, select.POLLIN)
    data = bytearray()
    while True:
        left_ms = (deadline - time.monotonic()) * 1000
        if left_ms <= 0 or not poll.poll(left_ms):
            raise NoAnswerInTime
        try:
            part = os.read(source, 1 << 16)
        except ConnectionResetError:  # the process ended with unread data
            part = b""
        if not part:
            return bytes(data), "the program ended without returning values" if line else ""
        data += part
        if line and b"\n" in part:
            return bytes(data[: data.index(b"\n")]), ""
        if len(data) > max_bytes:
            return bytes(data), f"more than {max_bytes} bytes of output"
