"""Keeping ranks in step: under expert parallelism every rank must run each layer as often as all.

A rank that has nothing to run while others do runs one token whose result is thrown away. Where all
experts are on each rank nobody needs the others in a pass, and ranks meet once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import paddle

from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted
from ernie_train.model import Ernie4_5_MoeModel


class HasDecoder(Protocol):
    model: Ernie4_5_MoeModel


def dummy_pass(model: HasDecoder, *, backward: bool) -> None:
    """Joins the exchanges of a pass that other ranks make; gradients it leaves are zeros.

    Does nothing where all experts are on each rank: there is nothing to join.
    """
    if process_group.grid().expert == 1:
        return
    token = paddle.zeros([1, 1], "int64")
    if backward:
        (model.model(token).hidden.sum() * 0.0).backward()
        return
    with paddle.no_grad():
        model.model(token)


class Lockstep:
    """Forward passes without gradient, of which each rank makes as many as it needs.

    `more` is called before each pass; those that are through go on joining until all are.

        with Lockstep(model, stop_requested) as lockstep:
            for batch in distributed.share(batches):
                lockstep.next_pass()
                model(...)

    Raises `Interrupted` on all ranks when a stop was asked for on one: with experts spread over
    ranks in the same pass, else on each when it has made its passes, or was asked itself.
    """

    def __init__(
        self, model: HasDecoder, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.model, self.stop_requested = model, stop_requested

    def next_pass(self) -> bool:
        """Announces one more pass; returns whether to stop instead.

        The answer is the same on all ranks where they run passes together.
        """
        if process_group.grid().expert == 1:
            return self.stop_requested()
        return self._announce(working=True)[1]

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if process_group.world_size() == 1:
            return
        if process_group.grid().expert == 1:
            self._meet_once(error)
        elif kind is None:
            self._join_until_all_are_through()

    def _meet_once(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Interrupted):
            return  # this rank ends, and others see that
        stopped = process_group.any_rank(error is not None or self.stop_requested())
        if stopped and error is None:
            raise Interrupted("stopped on a signal, here or on another rank")

    def _join_until_all_are_through(self) -> None:
        while True:
            others_work, stop = self._announce(working=False)
            if stop:
                raise Interrupted("stopped on a signal: another rank was still at work")
            if not others_work:
                return
            dummy_pass(self.model, backward=False)

    def _announce(self, *, working: bool) -> tuple[bool, bool]:
        numbers = [float(working), float(self.stop_requested())]
        workers, stopping = process_group.all_reduce_sum(numbers)
        return workers > 0, stopping > 0
