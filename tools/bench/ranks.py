"""A side of several processes that work together, a rank each, asked as if it were one."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tools.bench.protocol import ROOT, Side


class Ranks:
    """Processes that run `serve` and get every request together; a context manager."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        """Prepare one process for each of `environments`; they start when it is entered."""
        self._command, self._environments = command, environments
        self._held = ExitStack()
        self._sides: list[Side] = []

    def __enter__(self) -> Ranks:
        self._threads = self._held.enter_context(ThreadPoolExecutor(len(self._environments)))
        for environment in self._environments:
            self._sides.append(self._held.enter_context(Side(self._command, environment)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def try_ask_all(self, **request: Any) -> list[dict[str, Any]]:
        """Send {name: argument} to all ranks; return their answers, maybe {"error": reason}.

        Where a rank has ended the others are ended too, since they may wait for it.
        """
        asked = [self._threads.submit(side.try_ask, **request) for side in self._sides]
        wait(asked, return_when=FIRST_EXCEPTION)
        if failed := [one for one in asked if one.done() and one.exception()]:
            for side in self._sides:
                side.process.terminate()
            failed[0].result()
        return [one.result() for one in asked]

    def ask_all(self, **request: Any) -> list[dict[str, Any]]:
        """Ask like `try_ask_all`; an error of a rank is a `RuntimeError` here."""
        answers = self.try_ask_all(**request)
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"{request}: {answer['error']}")
        return answers

    def try_ask(self, **request: Any) -> dict[str, Any]:
        """Return the first rank's answer, or the first error.

        Its seconds are those of the slowest rank, its processor seconds those of all.
        """
        answers = self.try_ask_all(**request)
        for answer in answers:
            if "error" in answer:
                return answer
        merged = {
            name: fold(a[name] for a in answers) for name, fold in FOLDS if name in answers[0]
        }
        return {**answers[0], **merged}

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask like `try_ask`; an error is a `RuntimeError` here."""
        answer = self.try_ask(**request)
        if "error" in answer:
            raise RuntimeError(f"{request}: {answer['error']}")
        return answer


FOLDS = (("seconds", max), ("cpu_seconds", sum))


def paddle_environments(ranks: int, threads: int = 1) -> list[dict[str, str]]:
    """Return the environment that Paddle's launcher gives each rank."""
    common = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    if ranks == 1:
        return [common | {"PADDLE_TRAINERS_NUM": "1"}]
    ports = [free_port() for _ in range(ranks + 1)]
    endpoints = [f"127.0.0.1:{port}" for port in ports[1:]]
    common |= {
        "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
        "PADDLE_TRAINERS_NUM": str(ranks),
        "PADDLE_LOCAL_SIZE": str(ranks),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_DISTRI_BACKEND": "gloo",
        "GLOG_minloglevel": "1",
    }
    return [
        common | {"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": endpoint}
        for rank, endpoint in enumerate(endpoints)
    ]


def torch_environments(ranks: int, threads: int) -> list[dict[str, str]]:
    """Return the environment that torchrun gives each rank, with that many threads."""
    common = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [common | {"WORLD_SIZE": str(ranks), "RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    """Return a port of this machine on which nothing listens.

    `ernie_train` has a function for it, but its import would set up the processor for the peer too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
