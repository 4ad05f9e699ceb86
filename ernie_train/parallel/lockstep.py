"""Uneven numbers of passes over ranks, like torch's `Join`: ranks out of work run dummy passes.

Under expert parallelism every MoE layer of a pass makes all-to-alls, so every rank must run each
layer as often as the others. A rank without work runs a single token and discards its result.
Where every rank holds all experts a pass needs no other rank, and ranks agree once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted
from ernie_train.model import Ernie4_5_MoeModel


class HasDecoder(Protocol):
    """A model around a decoder: a policy or a critic."""

    model: Ernie4_5_MoeModel


def dummy_pass(model: HasDecoder) -> Tensor | None:
    """Take part in the all-to-alls of a forward pass that other ranks run, with a single token.

    Returns its hidden states, from which a backward pass of zeros can start. Does nothing where
    every rank holds all experts.
    """
    if process_group.grid().expert == 1:
        return None
    return model.model(paddle.zeros([1, 1], "int64")).hidden


class Lockstep:
    """Context of forward passes without gradient, of which each rank runs as many as it needs.

    Call `next_pass` before each of them. On exit a rank runs dummy passes until all ranks are done:

        with Lockstep(model, stop_requested) as lockstep:
            for batch in process_group.shard(batches):
                lockstep.next_pass()
                model(...)

    Raises `Interrupted` on all ranks when a stop was requested on one: under expert parallelism in
    the same pass, else on each rank after its own passes.
    """

    def __init__(
        self, model: HasDecoder, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.model, self.stop_requested = model, stop_requested

    def next_pass(self) -> bool:
        """Announce one more pass; return whether to stop instead.

        Under expert parallelism all ranks get the same answer.
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
            self._agree_on_stop(error)
        elif kind is None:
            self._run_dummy_passes()

    def _agree_on_stop(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Interrupted):
            return  # this rank ends with the error, and the supervisor ends the others
        process_group.wait_for_all_ranks()  # passes of a rank may outlast NCCL's half an hour
        stopped = process_group.any_rank(error is not None or self.stop_requested())
        if stopped and error is None:
            raise Interrupted("stopped on a signal, here or on another rank")

    def _run_dummy_passes(self) -> None:
        while True:
            others_working, stop = self._announce(working=False)
            if stop:
                raise Interrupted("stopped on a signal: another rank was still at work")
            if not others_working:
                return
            with paddle.no_grad():
                dummy_pass(self.model)

    def _announce(self, *, working: bool) -> tuple[bool, bool]:
        flags = [float(working), float(self.stop_requested())]
        workers, stopping = process_group.all_reduce_sum(flags)
        return workers > 0, stopping > 0
