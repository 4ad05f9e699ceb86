"""The one loop: batches in, terms of a loss summed over micro-batches, one update a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from paddle import Tensor

from ernie_train import distributed
from ernie_train.balance import BalanceConfig, Balancer, RouterLoad
from ernie_train.errors import Interrupted, NonFiniteError
from ernie_train.objective import BatchT, LossFn, ModelT, Term
from ernie_train.optim import Optimizer, learning_rate


@dataclass(frozen=True)
class StepResult:
    step: int
    metrics: dict[str, float]
    seconds: float
    tokens: int
    load: RouterLoad  # of the whole step, over all ranks


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
        self.balancer = Balancer(model, balance or BalanceConfig())
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
            if distributed.all_reduce_sum([float(stop_requested())])[0] > 0:
                raise Interrupted(f"stopped on a signal after step {self.step}")

    def train_step(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT], total_steps: int
    ) -> StepResult:
        """One optimizer step over `micro_batches`, at the rate that `total_steps` gives it."""
        started = time.perf_counter()
        counts = self._counts(micro_batches, loss_fn)
        sums: dict[str, float] = {}
        shown: dict[str, tuple[float, float]] = {}
        load = self.balancer.new_load()
        for batch in micro_batches:
            output = loss_fn(self.model, batch)
            terms = [*output.terms, *self.balancer.terms(output.router_stats)]
            if terms:
                _objective(terms, counts).backward()
            load.add(output.router_stats)
            for term in terms:
                sums[term.name] = sums.get(term.name, 0.0) + float(term.sum)
            for name, (value, count) in output.shown.items():
                before = shown.get(name, (0.0, 0.0))
                shown[name] = (before[0] + value, before[1] + count)
        lr = learning_rate(self.optimizer.config, self.step + 1, total_steps)
        metrics = self._metrics(sums, counts, shown)
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
            for batch in micro_batches:
                output = loss_fn(self.model, batch)
                terms = [*output.terms, *self.balancer.terms(output.router_stats)]
                if wanted := [term for term in terms if term.name == name]:
                    _objective(wanted, counts).backward()
            norms[name] = self.optimizer.gradient_norm()
            self.optimizer.clear_gradients()
        return norms

    def _counts(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT]
    ) -> dict[str, float]:
        return _global_counts(
            [{**loss_fn.counts(b), **self.balancer.counts(b.num_tokens)} for b in micro_batches]
        )

    def _metrics(
        self,
        sums: dict[str, float],
        counts: dict[str, float],
        shown: dict[str, tuple[float, float]],
    ) -> dict[str, float]:
        names = sorted(sums)
        reduced = distributed.all_reduce_sum([sums[name] for name in names])
        metrics = {n: v / max(counts[n], 1.0) for n, v in zip(names, reduced, strict=True)}
        for name in sorted(shown):
            value, count = distributed.all_reduce_sum(list(shown[name]))
            metrics[name] = value / max(count, 1.0)
        return metrics

    def _refuse_non_finite(self, metrics: dict[str, float]) -> None:
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if distributed.all_reduce_sum([float(bool(bad))])[0] > 0:
            self.optimizer.clear_gradients()
            listed = ", ".join(f"{name} = {value}" for name, value in bad.items()) or "another rank"
            raise NonFiniteError(
                f"step {self.step + 1} would not be finite ({listed}); nothing was updated. "
                "The last checkpoint is intact: lower optim.lr or look at this step's batch."
            )


def _global_counts(counts: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for micro in counts for name in micro})
    totals = [math.fsum(micro.get(name, 0.0) for micro in counts) for name in names]
    return dict(zip(names, distributed.all_reduce_sum(totals), strict=True))


def _objective(terms: list[Term], counts: dict[str, float]) -> Tensor:
    """sum over terms of coef * sum / global count: divided once, by what the whole step counts."""
    parts: list[Any] = [term.sum * (term.coef / max(counts[term.name], 1.0)) for term in terms]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
