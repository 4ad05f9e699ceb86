"""Run `math-verify` in a process that is killed if a comparison exceeds its limits.

`math-verify` has time-outs of its own, which work in the main thread only and cannot interrupt one
long operation. Here the kernel limits the processor time and the memory of each
comparison (`math_worker.py` sets the limits), so that a busy machine makes no answer wrong.
"""

import atexit
import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ernie_train.rewards.score import Score, mismatch

_START_S = 60.0
# Processor time is limited in math_worker.py; this ends waits that use no processor time.
_ANSWER_S = 30.0


TOO_MUCH = Score.wrong("the answer takes too much time or memory to compare")


class MathProcess:
    """Start the process at first use and replace it when it dies; one completion at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    @contextmanager
    def session(self) -> Iterator[Callable[[str, str], Score]]:
        """Yield verify(gold, answer) for the comparisons of one completion, which share its limits.

        A comparison that exceeds the limits is TOO_MUCH if the gold answer, compared with itself,
        does not, and the comparison does so again after that; else it is "bad_gold", or "timeout"
        if only the waiting time ran out.
        """
        fresh = True

        def verify(gold: str, answer: str) -> Score:
            nonlocal fresh
            reply = self._compare(gold, answer, fresh)
            fresh = False
            return reply

        with self._lock:
            yield verify

    def _compare(self, gold: str, answer: str, fresh: bool) -> Score:
        if (process := self._started()) is None:
            return Score.infrastructure("the math-verify process did not start")
        reply = self._ask(process, _request(gold, answer, fresh), _ANSWER_S)
        if reply is not None:
            return _as_score(json.loads(reply), gold, answer)
        self.stop()
        return self._whose_fault(gold, answer)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _whose_fault(self, gold: str, answer: str) -> Score:
        """Score a comparison that exceeded the limits: compare the gold answer with itself.

        If that goes well, the comparison is tried again: what ended the process may have been the
        machine.
        """
        if (process := self._started()) is None:
            return Score.infrastructure("the math-verify process did not start again")
        reply = self._ask(process, _request(gold, gold, True), _ANSWER_S)
        if reply is not None:
            reply = self._ask(process, _request(gold, answer, True), _ANSWER_S)
            if reply is not None:
                return _as_score(json.loads(reply), gold, answer)
            self.stop()
            return TOO_MUCH
        died = process.poll() is not None
        self.stop()
        if died:
            return Score.bad_gold(f"too much time or memory to read the answer {gold[:80]!r}")
        return Score.timeout("math-verify gets no time on this machine")

    def _started(self) -> subprocess.Popen[bytes] | None:
        if self._process is not None and self._process.poll() is None:
            return self._process
        script = Path(__file__).with_name("math_worker.py")
        # -P keeps this directory off sys.path: its code.py would hide that of the standard library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._ask(self._process, b"", _START_S) is None:
            self.stop()
        return self._process

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], request: bytes, limit_s: float) -> bytes | None:
        """Send a line, return the reply line; None if it is late or the process has died."""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        deadline, reply = time.monotonic() + limit_s, b""
        while not reply.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([process.stdout], [], [], left)[0]:
                return None
            part = process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not part:
                process.wait()
                return None
            reply += part
        return reply


def _request(gold: str, answer: str, fresh: bool) -> bytes:
    return json.dumps([gold, answer, fresh]).encode() + b"\n"


def _as_score(reply: str, gold: str, answer: str) -> Score:
    if reply == "equal":
        return Score.correct()
    if reply == "gold":
        return Score.bad_gold(f"math-verify reads nothing in the answer {gold[:80]!r}")
    if reply == "different":
        return mismatch(gold, answer)
    return Score.infrastructure(f"math-verify: {reply}")
