"""A rank of `scaling.py`: trains `mini` and answers what it took."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tools.bench.protocol import random_batch, resident_bytes, serve

if TYPE_CHECKING:
    from ernie_train.train.loss_terms import LossOutput

ROWS, LENGTH, MICRO_BATCHES = 4, 512, 2
EXCHANGES = 4  # of a row: to its expert and back, forward and backward


class Rank:
    """Trains in this process; `build` and `steps` answer requests of the driver."""

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        from ernie_train import parallel  # before Paddle: it sets the processor up
        from ernie_train.core import process_group

        import paddle  # isort: skip
        from paddle.base import core  # isort: skip

        from ernie_train.model import Ernie4_5_MoeConfig
        from ernie_train.train.optimizer import OptimConfig, Optimizer
        from ernie_train.train.trainer import Trainer

        process_group.set_grid(process_group.Grid(request["expert"], request["data"]))
        paddle.seed(1)
        self.base = resident_bytes("VmRSS")
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        self.config = Ernie4_5_MoeConfig.preset("mini", moe_num_experts=request["experts"])
        model = parallel.new_model(self.config, "float32")
        model.train()
        optimizer = Optimizer(model, OptimConfig(lr=1e-4, schedule="constant"))
        self.trainer: Trainer[Any, Any] = Trainer(model, optimizer)
        self.loss = CountingLoss(process_group, self.config.moe_num_experts)
        self.random = np.random.default_rng(0)
        self.update_s = 0.0
        self._time_updates()
        return {}

    def steps(self, count: int) -> dict[str, Any]:
        self.loss.elsewhere, self.update_s, sent = 0, 0.0, sent_bytes()
        start, cpu_start = time.perf_counter(), time.process_time()
        losses = [self._step() for _ in range(count)]
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "update_seconds": self.update_s,
            "losses": losses,
            "sent": sent_bytes() - sent,
            "least": self.loss.elsewhere * self.config.hidden_size * 4 * EXCHANGES,
        }

    def memory(self, _: Any) -> dict[str, float]:
        """Return bytes: resident and tensors at the peak, and those of each kind of parameter."""
        from paddle.base import core

        from ernie_train.model import is_expert_parameter

        # Float32 weights, gradients and two moments, which the layouts here do not spread.
        kept = {n: 16 * p.size for n, p in self.trainer.optimizer.parameters.items()}
        experts = sum(size for name, size in kept.items() if is_expert_parameter(name))
        return {
            "resident": resident_bytes("VmHWM") - self.base,
            "tensors": core.host_memory_stat_peak_value("Allocated", 0),
            "experts": experts,
            "dense": sum(kept.values()) - experts,
        }

    def _step(self) -> float:
        batches = [
            random_batch(self.random, self.config.vocab_size, ROWS, LENGTH)
            for _ in range(MICRO_BATCHES)
        ]
        return self.trainer.train_step(batches, self.loss, sys.maxsize).metrics["loss"]

    def _time_updates(self) -> None:
        update = self.trainer.optimizer.step

        def timed(lr: float, gradient_norm: float) -> None:
            start = time.perf_counter()
            update(lr, gradient_norm)
            self.update_s += time.perf_counter() - start

        self.trainer.optimizer.step = timed  # type: ignore[method-assign]


class CountingLoss:
    """The loss of SFT; counts the experts on other ranks that this rank's tokens chose."""

    def __init__(self, process_group: Any, experts: int) -> None:
        from ernie_train.train.supervised import PackedLoss

        self.inner = PackedLoss("tokens")
        self.elsewhere = 0
        degree = process_group.grid().expert
        first = process_group.rank() % degree * (experts // degree)
        self.local_experts = range(first, first + experts // degree)

    def counts(self, batch: Any) -> dict[str, float]:
        return self.inner.counts(batch)

    def __call__(self, model: Any, batch: Any) -> LossOutput:
        output = self.inner(model, batch)
        for stats in output.router_stats:
            ids = stats.expert_ids.numpy()
            local = self.local_experts
            self.elsewhere += int(((ids < local.start) | (ids >= local.stop)).sum())
        return output


def sent_bytes() -> int:
    """Return the bytes of rows that have left this rank."""
    from ernie_train.core import process_group
    from ernie_train.parallel.collectives import get_collectives

    return get_collectives().sent_bytes if process_group.grid().expert > 1 else 0


if __name__ == "__main__":
    rank = Rank()
    serve({"build": rank.build, "steps": rank.steps, "memory": rank.memory}, unsupported=())
