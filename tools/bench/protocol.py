"""Two programs that take turns: JSON objects, one a line, over standard input and output.

Only the standard library is imported here: both sides of a benchmark import this, each from its own
virtual environment.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.random import Generator

    from ernie_train.data import Batch

ROOT = Path(__file__).resolve().parents[2]
Handler = Callable[[Any], dict[str, Any]]


def serve(handlers: Mapping[str, Handler], unsupported: tuple[type[Exception], ...]) -> None:
    """Answer requests {"name of a handler": argument} until standard input ends.

    An exception in `unsupported` is answered as {"error": reason}; any other ends the process.
    """
    # Nothing that a library prints, from Python or below it, may enter the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        try:
            answer = handlers[name](argument)
        except unsupported as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        print(json.dumps(answer), file=answers, flush=True)


def timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the answer of `work` with its `seconds` and `cpu_seconds`."""
    start, cpu_start = time.perf_counter(), processor_seconds()
    answer = work()
    cpu_s, wall_s = processor_seconds() - cpu_start, time.perf_counter() - start
    return {**answer, "seconds": wall_s, "cpu_seconds": cpu_s}


def processor_seconds() -> float:
    """Return those of this process and of those that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def begin_peak() -> None:
    """Make the memory that is resident now the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Return the most memory that was resident since `begin_peak`, in GB."""
    return resident_bytes("VmHWM") / 1e9


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Side:
    """A process that runs `serve`, idle between requests; a context manager that ends it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = " ".join(command)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            cwd=ROOT,
        )

    def try_ask(self, **request: Any) -> dict[str, Any]:
        """Send {name: argument} and wait for the answer, which may be {"error": reason}."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        with suppress(BrokenPipeError):  # it has ended, and no line will come
            print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}; see its messages")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask like `try_ask`; an error of the other side is a `RuntimeError` here."""
        answer = self.try_ask(**request)
        if "error" in answer:
            raise RuntimeError(f"{request}: {answer['error']}")
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # what an ended process has not read is lost
                self.process.stdin.close()
        if kind is not None:
            self.process.terminate()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def document_lengths(seed: int, tokens: int, mean: int) -> list[int]:
    """Return lengths of documents, from a quarter of the mean to seven, that sum to `tokens`."""
    chosen, lengths = random.Random(seed), []
    while tokens > 0:
        length = min(7 * mean, mean // 4 + round(chosen.expovariate(1 / (0.75 * mean))))
        lengths.append(min(tokens, length))
        tokens -= lengths[-1]
    return lengths


def share_documents(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the documents of each rank, by index: the longest first, to the lightest rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        min(shares, key=lambda share: sum(lengths[at] for at in share)).append(item)
    return shares


def random_documents(
    random: Generator, vocab_size: int, lengths: list[int], ranks: int = 1
) -> list[Batch]:
    """Return a row of documents of random tokens for each rank that gets any."""
    documents = [random.integers(1, vocab_size, n) for n in lengths]
    shares = share_documents(lengths, ranks)
    return [_packed_row([documents[at] for at in share]) for share in shares if share]


def _packed_row(documents: list[Any]) -> Batch:
    """Return one row of documents [S], the last token of each without a label."""
    import numpy as np

    from ernie_train.data import Batch

    lengths = [len(document) for document in documents]
    ids = np.concatenate(documents)
    ends = np.cumsum(lengths) - 1
    mask = np.ones(len(ids), np.float32)
    mask[ends] = 0.0
    return Batch(
        input_ids=ids[None],
        labels=np.append(ids[1:], 0)[None],
        position_ids=np.concatenate([np.arange(n) for n in lengths])[None],
        document_ids=np.repeat(np.arange(1, len(lengths) + 1), lengths)[None],
        loss_mask=mask[None],
    )


def random_batch(
    random: Generator, vocab_size: int, rows: int, length: int, document: int | None = None
) -> Batch:
    """Return rows of random tokens for our side, packed from documents of `document` tokens."""
    import numpy as np

    from ernie_train.data import Batch

    ids = random.integers(1, vocab_size, (rows, length + 1))
    places = np.tile(np.arange(length), (rows, 1))
    document = document or length
    return Batch(
        input_ids=ids[:, :-1],
        labels=ids[:, 1:],
        position_ids=places % document,
        document_ids=places // document + 1,
        loss_mask=np.ones((rows, length), np.float32),
    )


def split_rows(batch: Batch, ranks: int) -> list[Batch]:
    """Return the rows of a batch in as many equal batches."""
    from ernie_train.data import Batch

    parts = {name: value.reshape(ranks, -1, value.shape[1]) for name, value in vars(batch).items()}
    return [Batch(**{name: part[rank] for name, part in parts.items()}) for rank in range(ranks)]
