"""The training loop of every stage: batches and a loss in, optimizer steps out.

A step runs forward and backward over its micro-batches, one reduction over ranks and one update.
Every rank is given the micro-batches of the whole step and runs its share of them, so that a step
trains the same tokens on any number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

import paddle
from paddle import Tensor

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted, NonFiniteError
from ernie_train.model.partial import set_dropout_key
from ernie_train.train.loss_terms import BatchT, LossFn, LossOutput, LossTerm, Mean, ModelT
from ernie_train.train.moe_balance import (
    BalanceConfig,
    GlobalCounts,
    MoeBalance,
    RouterStatsAccumulator,
)
from ernie_train.train.optimizer import Optimizer, learning_rate


@dataclass(frozen=True)
class StepResult:
    """Metrics of one optimizer step over all ranks.

    phases: seconds of this rank's forward and backward passes and of the rest, reduction and
        update. A GPU works on while the processor goes ahead, so there they say little.
    """

    step: int
    metrics: dict[str, float]
    seconds: float
    tokens: int
    load: RouterStatsAccumulator
    phases: Mapping[str, float] = field(default_factory=dict)


class _Laps:
    """A stopwatch that adds the time since its last reading to a phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class Throughput:
    """Timings to log with a step: of the step itself, and of all that a user waits for.

    Tokens are real ones, padding left out. `seconds` and `tokens_per_second` are of the optimizer
    step alone, from the first forward pass to the update; `tokens_per_second_overall` is the mean
    since `Throughput` was made, reading of batches, validation and checkpoints included.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began, self._tokens = clock(), 0

    def timings(self, result: StepResult) -> dict[str, float]:
        self._tokens += result.tokens
        return {
            "seconds": result.seconds,
            **result.phases,
            "tokens_per_second": result.tokens / result.seconds,
            "tokens_per_second_overall": self._tokens / (self._clock() - self._began),
        }


Hook = tuple[int, Callable[[StepResult], None]]  # (every so many steps, function)


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
        is_over: Callable[[], bool] = lambda: False,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until `steps` optimizer steps are done; hooks run at their multiples and the end.

        `is_over`, alike on all ranks, ends training before that.

        `before_step` gets the number of the next step, may change what depends on it, and returns
        metrics to log with that step.

        Raises `NonFiniteError` before an update that would not be finite, and `Interrupted` after
        the step in which `stop_requested` became true on any rank; the caller saves.
        """
        while self.step < steps and not is_over():
            scheduled = before_step(self.step + 1)
            micro_batches = [next(batches) for _ in range(self.grad_accum_steps)]
            result = self.train_step(micro_batches, loss_fn, steps)
            result.metrics.update(scheduled)
            for every, hook in hooks:
                if result.step % every == 0 or result.step == steps:
                    hook(result)
            # A signal may reach one rank alone, and all must leave at the same step.
            if process_group.any_rank(stop_requested()):
                raise Interrupted(f"stopped on a signal after step {self.step}")

    def train_step(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT], total_steps: int
    ) -> StepResult:
        """Run one optimizer step over `micro_batches`, at the learning rate of `total_steps`.

        `micro_batches` are those of all ranks, the same on each.
        """
        laps = _Laps()
        # Every rank has all micro-batches, so counts of the whole step need no reduction, and a
        # loss is divided by them before its backward pass.
        counts = self._counts(micro_batches, loss_fn)
        sums: dict[str, float] = {}
        means: dict[str, Mean] = {}
        load, so_far = self.balancer.new_load(), self.balancer.new_global_counts()
        passes = _passes(micro_batches)
        for number, batch in enumerate(passes):
            place = number * process_group.world_size() + process_group.rank()
            set_dropout_key(self.model, self.step, place)
            output = self._forward(batch, loss_fn, so_far)
            laps.end("forward_seconds")
            if number == len(passes) - 1:
                self.optimizer.begin_last_backward()
            _backward(output.terms, counts, output.grad_anchor)
            laps.end("backward_seconds")
            load.add(output.router_stats)
            for term in output.terms:
                sums[term.name] = sums.get(term.name, 0.0) + float(term.sum)
            for name, mean in output.metrics.items():
                means[name] = means[name].joined(mean) if name in means else mean
        self.optimizer.reduce_gradients()
        lr = learning_rate(self.optimizer.config, self.step + 1, total_steps)
        metrics = _reduce_metrics(sums, counts, means)
        metrics["grad_norm"] = self.optimizer.gradient_norm()
        metrics["lr"] = lr
        # Before the update: a NaN in weights or moments could not be undone.
        self._refuse_non_finite(metrics)
        self.optimizer.step(lr, metrics["grad_norm"])
        self.optimizer.clear_gradients()
        load.reduce()
        metrics.update(self.balancer.after_step(load))
        self.step += 1
        tokens = sum(batch.num_tokens for batch in micro_batches)
        laps.end("update_seconds")
        seconds = sum(laps.seconds.values())
        return StepResult(self.step, metrics, seconds, tokens, load, laps.seconds)

    def term_gradient_norms(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT]
    ) -> dict[str, float]:
        """Return the gradient norm of each term alone, its coefficient included; update nothing.

        It costs as many forward and backward passes as there are terms.
        """
        names = self._counts(micro_batches, loss_fn)
        return {name: self.gradient_norm_of({name}, micro_batches, loss_fn) for name in names}

    def gradient_norm_of(
        self,
        names: Container[str],
        micro_batches: Sequence[BatchT],
        loss_fn: LossFn[ModelT, BatchT],
    ) -> float:
        """Return the gradient norm of the sum of the named terms; update nothing."""
        counts, so_far = self._counts(micro_batches, loss_fn), self.balancer.new_global_counts()
        for batch in _passes(micro_batches):
            output = self._forward(batch, loss_fn, so_far)
            wanted = [term for term in output.terms if term.name in names]
            _backward(wanted, counts, output.grad_anchor)
        self.optimizer.reduce_gradients()
        norm = self.optimizer.gradient_norm()
        self.optimizer.clear_gradients()
        return norm

    def _counts(
        self, micro_batches: Sequence[BatchT], loss_fn: LossFn[ModelT, BatchT]
    ) -> dict[str, float]:
        """Return the count of each term over the micro-batches of all ranks."""
        balancer = self.balancer
        counts = [{**loss_fn.counts(b), **balancer.counts(b.num_tokens)} for b in micro_batches]
        names = sorted({name for micro in counts for name in micro})
        return {n: math.fsum(micro.get(n, 0.0) for micro in counts) for n in names}

    def _forward(
        self, batch: BatchT | None, loss_fn: LossFn[ModelT, BatchT], so_far: GlobalCounts | None
    ) -> LossOutput:
        """Return the output of a micro-batch with the balance terms; of None that of a dummy pass.

        Ranks with a micro-batch wait for that pass, under expert parallelism in the all-to-alls of
        each layer, and where `so_far` counts over all ranks.
        """
        if batch is not None:
            output = loss_fn(self.model, batch)
            of_routers = self.balancer.terms(output.router_stats, so_far)
            return replace(output, terms=[*output.terms, *of_routers])
        hidden = parallel.dummy_pass(self.model)
        if so_far is not None:
            so_far.add(None)
        return LossOutput([], grad_anchor=hidden)

    def has_finite_weights(self) -> bool:
        """Return whether an absurd rate has not made weights infinite; every rank must call it."""
        finite = all(bool(paddle.isfinite(p).all()) for p in self.optimizer.parameters.values())
        return not process_group.any_rank(not finite)

    def _refuse_non_finite(self, metrics: dict[str, float]) -> None:
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if process_group.any_rank(bool(bad)):
            self.optimizer.clear_gradients()
            listed = ", ".join(f"{name} = {value}" for name, value in bad.items()) or "another rank"
            raise NonFiniteError(
                f"step {self.step + 1} would not be finite ({listed}); nothing was updated: "
                "look at its batch, or lower optim.lr, which --extend allows"
            )


def _passes(micro_batches: Sequence[BatchT]) -> list[BatchT | None]:
    """Return this rank's micro-batches; a last None where other ranks have one more."""
    own: list[BatchT | None] = [*process_group.shard(micro_batches)]
    most = -(-len(micro_batches) // process_group.world_size())
    return own if len(own) == most else [*own, None]


def _reduce_metrics(
    sums: dict[str, float], counts: dict[str, float], metrics: dict[str, Mean]
) -> dict[str, float]:
    """Return means over the whole step and all ranks: of terms, and of the losses' metrics.

    All go in one reduction by name, because ranks may have different terms.
    """
    own = {("term", name): value for name, value in sums.items()}
    own |= {("sum", name): mean.sum for name, mean in metrics.items()}
    own |= {("count", name): mean.count for name, mean in metrics.items()}
    total = process_group.all_reduce_named(own)
    names = sorted(total)
    terms = {n: Mean(total["term", n], counts[n]).value for kind, n in names if kind == "term"}
    means = {
        n: Mean(total["sum", n], total["count", n]).value for kind, n in names if kind == "sum"
    }
    return terms | means


def _backward(terms: list[LossTerm], counts: dict[str, float], grad_anchor: Tensor | None) -> None:
    """Add the gradient of the sum over terms of coef * sum / global count.

    Divided by the count of the whole step, gradients of micro-batches and ranks simply add up.
    """
    on_parameters: list[Tensor] = []
    on_outputs: list[Tensor] = []
    for term in terms:
        part = term.sum * (term.coef / max(counts[term.name], 1.0))
        (on_parameters if term.on_parameters else on_outputs).append(part)
    if grad_anchor is not None and process_group.grid().expert > 1:
        # All ranks must run the all-to-alls of every layer backward, also where no term of this
        # micro-batch depends on a layer.
        on_outputs.append(grad_anchor.sum().astype("float32") * 0.0)
    # Terms on parameters have a backward pass of their own, before the other: so gradients are
    # summed in one order, whether layers are recomputed in the backward pass or not.
    for parts in filter(None, (on_parameters, on_outputs)):
        sum(parts[1:], parts[0]).backward()
