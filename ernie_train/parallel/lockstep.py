"""Uneven numbers of passes over ranks, like torch's `Join`: ranks out of work run dummy passes.

Under expert parallelism every MoE layer of a pass makes all-to-alls, so every rank must run each
layer as often as the others. A rank without work runs a single token and discards its result.
Whether ranks have work, or were asked to stop, travels with the numbers of rows that the layers
exchange anyway: to agree takes no collective, and waits for no rank of another expert group. Where
every rank holds all experts a pass needs no other rank. All ranks meet once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted
from ernie_train.model import Ernie4_5_MoeModel
from ernie_train.parallel.expert import ExpertDispatcher, Signals

T = TypeVar("T")

# Bits of `Signals`.
_WORKS, _STOPS = 1, 2


class HasDecoder(Protocol):
    """A model around a decoder: a policy or a critic."""

    model: Ernie4_5_MoeModel


def _signals_of(model: HasDecoder) -> Signals | None:
    """Return the signals that the model's layers exchange; None where it needs no other rank."""
    dispatcher = model.model.placement.dispatcher
    return dispatcher.signals if isinstance(dispatcher, ExpertDispatcher) else None


def dummy_pass(model: HasDecoder) -> Tensor | None:
    """Take part in the all-to-alls of a forward pass that other ranks run, with a single token.

    Returns its hidden states, from which a backward pass of zeros can start. Does nothing where
    every rank holds all experts.
    """
    if _signals_of(model) is None:
        return None
    return model.model(paddle.zeros([1, 1], "int64")).hidden


class Lockstep:
    """Context of forward passes without gradient, of which each rank runs as many as it needs.

    Take their inputs from `shard`, or call `next_pass` before each. On exit a rank runs dummy
    passes until all ranks that it exchanges rows with are done:

        with Lockstep(model, stop_requested) as lockstep:
            for batch in lockstep.shard(batches):
                model(...)

    Raises `Interrupted` on all ranks when a stop was requested on one: those that share experts
    leave after the pass that told them, others after their own passes.
    """

    def __init__(
        self, model: HasDecoder, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.model, self.stop_requested = model, stop_requested
        self._signals = _signals_of(model)
        self._left: int | None = None  # passes until all ranks are done, where that is known

    def shard(self, items: Sequence[T]) -> Iterator[T]:
        """Yield this rank's part of items that all ranks have, each for one pass."""
        self._left = -(-len(items) // process_group.world_size())
        for item in process_group.shard(items):
            if self.next_pass():
                raise Interrupted("stopped on a signal in a forward pass")
            yield item

    def next_pass(self) -> bool:
        """Announce one more pass; return whether to stop instead.

        Ranks that share experts get the same answer: whether one was asked before the last pass.
        """
        if self._signals is None:
            return self.stop_requested()
        return self._signal(self._signals, _WORKS)

    def __enter__(self) -> Lockstep:
        if self._signals is not None:
            self._signals.heard = 0
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if process_group.world_size() == 1 or not isinstance(error, Interrupted | None):
            return  # a rank with another error ends, and its supervisor ends the others
        if error is None and self._signals is not None:
            self._run_dummy_passes(self._signals)
        process_group.wait_for_all_ranks()  # in a collective of NCCL ranks would wait at full load
        stopped = process_group.any_rank(error is not None or self.stop_requested())
        if stopped and error is None:
            raise Interrupted("stopped on a signal, here or on another rank")

    def _run_dummy_passes(self, signals: Signals) -> None:
        while self._left != 0 and not self._signal(signals, 0):
            with paddle.no_grad():
                dummy_pass(self.model)
            if not signals.heard & _WORKS:
                return  # it was a dummy on all ranks

    def _signal(self, signals: Signals, works: int) -> bool:
        """Set what the next pass tells; return whether the last one told to stop."""
        self._left = None if self._left is None else self._left - 1
        stop = bool(signals.heard & _STOPS)
        signals.own, signals.heard = works | (_STOPS if self.stop_requested() else 0), 0
        return stop
