"""Grade many completions in parallel, in processes of their own.

Scores come in the order of the items and do not depend on it. An item that fails (its verifier
raises, takes too long or ends its process) affects no other item, and is tried again: machines fail
too. If it keeps failing, the row's own answer is graded between two tries. A completion is wrong
only if it failed before and after its row's answer was found correct, and not by an error of the
machine; else the score is "timeout" or "infrastructure", which says nothing about the completion.
"""

import atexit
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from ernie_train.core.cpu import local_rank_count
from ernie_train.rewards.registry import RewardFn, reward_named
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring.reference_completion import build_reference_completion
from ernie_train.rewards.scoring.worker_process import WorkerLost, WorkerProcess

# A reward by name, or an object that can be pickled for another process.
Reward = str | RewardFn
Item = tuple[Reward, dict[str, Any], str]

_POLL_S = 0.1
_MAX_FAILED_STARTS = 3
# How often an item is graded before its failure is looked into.
_TRIES = 2
# A function of the user's that hangs this often in a row would hold up the whole batch.
_MOST_LATE = 16


@dataclass(frozen=True)
class ScoringReport:
    """Count a graded batch: `statuses` by status, `workers_lost` the processes that died."""

    items: int
    seconds: float
    statuses: dict[str, int]
    workers_lost: int = 0


@dataclass(frozen=True)
class _Task:
    """Hold an item to grade, or with `reference` its row's answer in its place.

    `fault` is how the item failed last. `failures` counts the failures of what is graded now;
    `cleared`: the row's answer was found correct after the item had failed.
    """

    index: int
    fault: Score | None = None
    failures: int = 0
    reference: bool = False
    cleared: bool = False


@dataclass
class _Batch:
    items: Sequence[Item]
    scores: list[Score | None]
    todo: deque[_Task]
    lost: int = 0
    # How often each reward of the user's was too slow since it last gave a score.
    late: Counter[Reward] = field(default_factory=Counter)
    open: int = field(init=False)

    def __post_init__(self) -> None:
        self.open = len(self.items)

    def settle(self, task: _Task, score: Score) -> None:
        self.scores[task.index] = score
        self.open -= 1

    def failed(self, task: _Task, fault: Score, *, tries: int, machine: bool = False) -> None:
        """Try again what failed; after `tries` grade the row's answer, and then the item once more.

        `machine`: no completion causes an error of this kind.
        """
        if task.failures + 1 < tries:
            again = replace(task, failures=task.failures + 1)
            self.todo.appendleft(again if task.reference else replace(again, fault=fault))
        elif task.reference and task.fault is not None:
            self.settle(task, task.fault)
        elif task.cleared:
            self.settle(task, fault if machine else Score.wrong(fault.detail))
        elif machine or self.reference_of(task) is None:
            self.settle(task, fault)
        else:
            self.todo.appendleft(_Task(task.index, fault, reference=True))

    def graded(self, task: _Task, score: Score) -> None:
        """Take the score of an item; the row's own answer, if correct, lets its item try again."""
        self.late.pop(self.items[task.index][0], None)
        if not task.reference:
            self.settle(task, score)
        elif score.status == "correct":
            self.todo.appendleft(_Task(task.index, task.fault, cleared=True))
        elif task.fault is not None:
            self.settle(task, task.fault)

    def reference_of(self, task: _Task) -> str | None:
        """Return the completion that gives the row's own answer; None for a user's function."""
        reward, row, _ = self.items[task.index]
        return build_reference_completion(reward, row) if isinstance(reward, str) else None

    def give_up(self, score: Score) -> None:
        self.scores = [score if old is None else old for old in self.scores]
        self.open = 0


class ScoringService:
    """Grade with a pool of processes that is kept between batches; `close` ends them.

    pebble 5.2.3 on spawned processes starts as fast (2.0 s against 1.8 s on two busy cores), but it
    unpickles replies of processes that read hostile completions.

    workers: number of processes, by default one per core of this process. item_s: seconds for one
    item, unless its reward has a `deadline_s`; batch_s: seconds for a batch.
    """

    def __init__(
        self, workers: int | None = None, *, item_s: float = 90.0, batch_s: float = 3600.0
    ) -> None:
        self.workers = workers or max(
            1, len(os.sched_getaffinity(0)) // local_rank_count(os.environ)
        )
        self.item_s = item_s
        self.batch_s = batch_s
        self._pool: list[WorkerProcess] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._owner = os.getpid()
        atexit.register(self.close)

    def score(
        self,
        items: Sequence[Item],
        *,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> tuple[list[Score], ScoringReport]:
        """Grade (reward, row, completion) items; scores come in the order of the items.

        `stop_requested` is called at least every 0.2 s; once it returns True, items without a score
        get "infrastructure"; once the batch's time is over, they get "timeout". Raises UserError
        for an unknown name before anything is graded, and SandboxUnavailable if there are programs
        to run and no sandbox.
        """
        for reward, _, _ in items:
            if isinstance(reward, str):
                reward_named(reward)
        start = time.monotonic()
        batch = _Batch(items, [None] * len(items), deque(map(_Task, range(len(items)))))
        with self._lock:
            self._failed_starts = 0
            try:
                self._run(batch, start + self.batch_s, stop_requested)
            finally:
                for worker in [w for w in self._pool if w.task is not None]:
                    self._drop(worker)
        scores = [score for score in batch.scores if score is not None]
        counts = Counter(str(score.status) for score in scores)
        seconds = time.monotonic() - start
        return scores, ScoringReport(len(scores), seconds, dict(counts), batch.lost)

    def close(self) -> None:
        """End the processes; the next batch starts new ones."""
        if os.getpid() != self._owner:  # a fork of the process that owns them
            return
        with self._lock:
            for worker in self._pool:
                worker.close()
            self._pool.clear()

    def _run(self, batch: _Batch, end: float, stop_requested: Callable[[], bool]) -> None:
        while batch.open:
            if stop_requested():
                return batch.give_up(Score.infrastructure("stopped before it was graded"))
            if time.monotonic() >= end:
                return batch.give_up(Score.timeout(f"not graded within {self.batch_s:g} s"))
            if self._failed_starts >= _MAX_FAILED_STARTS:
                return batch.give_up(Score.infrastructure("the scoring processes do not start"))
            while len(self._pool) < min(self.workers, batch.open):
                self._pool.append(WorkerProcess())
            for worker in self._pool:
                if worker.ready and worker.task is None and batch.todo:
                    self._hand_out(batch, worker, batch.todo.popleft())
            answered = wait([worker.fileno() for worker in self._pool], timeout=_POLL_S)
            for worker in [w for w in self._pool if w.fileno() in answered]:
                self._receive(batch, worker)
            now = time.monotonic()
            for worker in [w for w in self._pool if _waited_for(w) and now >= w.deadline]:
                self._too_slow(batch, worker)

    def _hand_out(self, batch: _Batch, worker: WorkerProcess, task: _Task) -> None:
        reward, row, completion = batch.items[task.index]
        if batch.late[reward] >= _MOST_LATE and not isinstance(reward, str):
            told = f"not tried: the reward was too slow {_MOST_LATE} times in a row"
            return batch.settle(task, Score.timeout(told))
        if task.reference:
            completion = batch.reference_of(task) or ""
        limit_s = self._limit_s(reward)
        try:
            worker.ask(task, (reward, row, completion), limit_s)
        except WorkerLost:  # the process ended while idle: not the item's fault
            self._drop(worker)
            batch.todo.appendleft(task)

    def _receive(self, batch: _Batch, worker: WorkerProcess) -> None:
        try:
            kind, *told = worker.answer()
        except WorkerLost:
            self._died(batch, worker)
            return
        task, worker.task = worker.task, None
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
        elif kind == "unavailable":
            raise api.SandboxUnavailable(told[0])
        elif kind == "raised":
            text, machine = told
            fault = Score.infrastructure(f"the verifier failed: {text}")
            batch.failed(task, fault, tries=_TRIES, machine=machine)
        elif told[1] == "infrastructure" and isinstance(batch.items[task.index][0], str):
            batch.failed(task, Score(*told), tries=_TRIES, machine=True)
        else:
            batch.graded(task, Score(*told))

    def _died(self, batch: _Batch, worker: WorkerProcess) -> None:
        task = worker.task
        if not worker.ready:
            self._failed_starts += 1
        self._drop(worker)
        if task is None:
            return
        batch.lost += 1
        fault = Score.infrastructure("it ended the process that graded it")
        batch.failed(task, fault, tries=_TRIES)

    def _too_slow(self, batch: _Batch, worker: WorkerProcess) -> None:
        task = worker.task
        self._drop(worker)
        if task is None:
            self._failed_starts += 1
            return
        batch.lost += 1
        reward = batch.items[task.index][0]
        batch.late[reward] += 1
        limit_s = self._limit_s(reward)
        # One try costs the whole time, so the row's own answer comes next.
        batch.failed(task, Score.timeout(f"not graded within {limit_s:g} s"), tries=1)

    def _limit_s(self, reward: Reward) -> float:
        return getattr(reward, "deadline_s", None) or self.item_s

    def _drop(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._pool.remove(worker)


def _waited_for(worker: WorkerProcess) -> bool:
    return worker.task is not None or not worker.ready


def score_batch(
    items: Sequence[Item],
    *,
    workers: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Score]:
    """Grade (reward, row, completion) items with processes shared by the whole program.

    Raises the errors of `ScoringService.score`. Another number of `workers` than in the last call
    starts new processes.
    """
    return shared_service(workers).score(items, stop_requested=stop_requested)[0]


def shared_service(workers: int | None = None) -> ScoringService:
    """Return the service of this process; a new one for another number of workers."""
    global _shared
    if _shared is None or (workers is not None and workers != _shared.workers):
        if _shared is not None:
            _shared.close()
        _shared = ScoringService(workers)
    return _shared


_shared: ScoringService | None = None
