"""The one loop: batches in, terms of a loss summed over micro-batches, one update a step.

Every rank is given the micro-batches of the whole step and runs its share of them, so that a step
trains the same tokens on any number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from paddle import Tensor

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted, NonFiniteError
from ernie_train.train.loss_terms import BatchT, LossFn, LossTerm, ModelT
from ernie_train.train.moe_balance import BalanceConfig, MoeBalance, RouterStatsAccumulator
from ernie_train.train.optimizer import Optimizer, learning_rate


@dataclass(frozen=True)
class StepResult:
    step: int
    metrics: dict[str, float]
    seconds: float
    tokens: int
    load: RouterStatsAccumulator  # of the whole step, over all ranks


Hook = tuple[int, Callable[[StepResult], None]]  # every how many steps, and what


class Trainer(Generic[ModelT, BatchT]):
    """Trains one model. `step` is the number of finished optimizer steps."""

    def __init__(
        self,
        model: ModelT,
        optimizer: Optimizer,
        *,
        grad_accum_steps: int = 1,
        balance: BalanceConfig | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.balancer = MoeBalance(model, balance or BalanceConfig())
        self.grad_accum_steps = grad_accum_steps
        self.step = 0

    def fit(
        self,
        batches: Iterator[BatchT],
        loss_fn: LossFn[ModelT, BatchT],
        steps: int,
        *,
        before_step: Callable[[int], Mapping[str, float]] = lambda step: {},
        hooks: Sequence[Hook] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains until `steps` optimizer steps are done; hooks run at their multiples and the end.

        `before_step` is told the number of the step that comes and may change what depends on it;
        what it returns is logged with that step.

        Raises `NonFiniteError` before an update that would not be finite, and `Interrupted` after
        the step in which `stop_requested` became true on any rank; whoever calls saves.
        """
        while self.step < steps:
            scheduled = before_step(self.step + 1)
            micro_batches = [next(batches) for _ in range(self.grad_accum_steps)]
            result = self.train_step(micro_batches, loss_fn, steps)
            result.metrics.update(scheduled)
            for every, hook in hooks:
                if result.step % every == 0 or result.step == steps:
                    hook(result)
            if process_group.all_reduce_sum([float(stop_requested())])[0] > 0:
                raise Interrupted(f"stopped on a signal after step {self.step}")

    def train_step(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT], total_steps: int
    ) -> StepResult:
        """One optimizer step over `micro_batches`, at the rate that `total_steps` gives it.

        `micro_batches` are those of all ranks, the same on each.
        """
        started = time.perf_counter()
        counts = self._counts(micro_batches, loss_fn)
        sums: dict[str, float] = {}
        shown: dict[str, tuple[float, float]] = {}
        load = self.balancer.new_load()
        last = _passes(micro_batches) - 1
        for number, batch in enumerate(process_group.shard(micro_batches)):
            output = loss_fn(self.model, batch)
            terms = [*output.terms, *self.balancer.terms(output.router_stats)]
            if number == last:
                self.optimizer.begin_last_backward()
            _backward(terms, counts, output.last)
            load.add(output.router_stats)
            for term in terms:
                sums[term.name] = sums.get(term.name, 0.0) + float(term.sum)
            for name, (value, count) in output.shown.items():
                before = shown.get(name, (0.0, 0.0))
                shown[name] = (before[0] + value, before[1] + count)
        self._join_others(micro_batches, last_of_step=True)
        self.optimizer.reduce_gradients()
        lr = learning_rate(self.optimizer.config, self.step + 1, total_steps)
        metrics = _metrics(sums, counts, shown)
        metrics["grad_norm"] = self.optimizer.gradient_norm()
        metrics["lr"] = lr
        self._refuse_non_finite(metrics)
        self.optimizer.step(lr, metrics["grad_norm"])
        self.optimizer.clear_gradients()
        load.reduce()
        metrics.update(self.balancer.after_step(load))
        self.step += 1
        tokens = sum(batch.num_tokens for batch in micro_batches)
        return StepResult(self.step, metrics, time.perf_counter() - started, tokens, load)

    def term_gradient_norms(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT]
    ) -> dict[str, float]:
        """The gradient norm of each term alone, its coefficient included; updates nothing.

        Runs the model once for every term, so it is for now and then.
        """
        counts = self._counts(micro_batches, loss_fn)
        norms = {}
        for name in counts:
            for batch in process_group.shard(micro_batches):
                output = loss_fn(self.model, batch)
                terms = [*output.terms, *self.balancer.terms(output.router_stats)]
                wanted = [term for term in terms if term.name == name]
                _backward(wanted, counts, output.last)
            self._join_others(micro_batches, last_of_step=False)
            self.optimizer.reduce_gradients()
            norms[name] = self.optimizer.gradient_norm()
            self.optimizer.clear_gradients()
        return norms

    def _counts(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT]
    ) -> dict[str, float]:
        """What the terms of the whole step count, from the micro-batches of all ranks."""
        balancer = self.balancer
        counts = [{**loss_fn.counts(b), **balancer.counts(b.num_tokens)} for b in micro_batches]
        names = sorted({name for micro in counts for name in micro})
        return {n: math.fsum(micro.get(n, 0.0) for micro in counts) for n in names}

    def _join_others(self, micro_batches: Sequence[BatchT], *, last_of_step: bool) -> None:
        """Joins the pass of ranks that have a micro-batch more than this one."""
        if len(process_group.shard(micro_batches)) < _passes(micro_batches):
            if last_of_step:
                self.optimizer.begin_last_backward()
            parallel.dummy_pass(self.model, backward=True)

    def _refuse_non_finite(self, metrics: dict[str, float]) -> None:
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if process_group.all_reduce_sum([float(bool(bad))])[0] > 0:
            self.optimizer.clear_gradients()
            listed = ", ".join(f"{name} = {value}" for name, value in bad.items()) or "another rank"
            raise NonFiniteError(
                f"step {self.step + 1} would not be finite ({listed}); nothing was updated. "
                "The last checkpoint is intact: lower optim.lr or look at this step's batch."
            )


def _passes(micro_batches: Sequence[Any]) -> int:
    """Backward passes of a step, as many on each rank."""
    return -(-len(micro_batches) // process_group.world_size())


def _metrics(
    sums: dict[str, float], counts: dict[str, float], shown: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """The means over the whole step of what this rank and the others summed up."""
    own = {f"{n}/sum": value for n, (value, _) in shown.items()}
    own |= {f"{n}/count": count for n, (_, count) in shown.items()}
    total = process_group.all_reduce_named(
        {**{f"{n}/term": value for n, value in sums.items()}, **own}
    )

    def names(kind: str) -> list[str]:
        return sorted(n.removesuffix(kind) for n in total if n.endswith(kind))

    metrics = {n: total[f"{n}/term"] / max(counts[n], 1.0) for n in names("/term")}
    means = {n: total[f"{n}/sum"] / max(total[f"{n}/count"], 1.0) for n in names("/sum")}
    return metrics | means


def _backward(terms: list[LossTerm], counts: dict[str, float], last: Tensor | None) -> None:
    """Adds the gradient of sum over terms of coef * sum / global count.

    So it is divided once, by what the whole step counts. Where ranks exchange rows in the backward
    pass, zero times `last` makes it go through every layer. Terms of weights go back apart from
    those of the pass, and before them, so that sums of gradients are taken in one order whether
    layers are run again in the backward pass or not.
    """
    of_weights: list[Tensor] = []
    of_pass: list[Tensor] = []
    for term in terms:
        part = term.sum * (term.coef / max(counts[term.name], 1.0))
        (of_weights if term.of_weights else of_pass).append(part)
    if last is not None and process_group.grid().expert > 1:
        of_pass.append(last.sum().astype("float32") * 0.0)
    for parts in filter(None, (of_weights, of_pass)):
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        total.backward()
