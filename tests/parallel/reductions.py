"""On every rank: gradients that leave during the backward pass, beside those that leave after it.

Grids are named as in `train_grids.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

import ernie_train  # noqa: F401
from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.parallel import GradientReducer, collectives, gradients
from ernie_train.train.supervised import PackedLoss
from tests.parallel.scenario import new_trainer, step_batches

gradients.BUCKET_ELEMENTS = 3000  # so that there are many
# Steps, of which a second one meets what the first has left, and the micro-batches of a step: two
# for each rank, or one of the ranks without a last one.
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "accumulated": (1, 2 * process_group.world_size(), ()),
    "idle": (2, 2 * process_group.world_size() - 1, ()),
    "frozen": (1, process_group.world_size(), (
        "layers.1.input_layernorm", "k_proj", "layers.2.mlp.experts.up_proj", "lm_head",
    )),
}  # fmt: skip


class Late:
    """Work that is not even started before somebody waits for it."""

    def __init__(self, work: Callable[[], paddle.Tensor]) -> None:
        self.wait = work


class LateCollectives:
    """The collectives of this grid, doing their work when they are waited for."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def all_to_all(self, rows: paddle.Tensor, counts: np.ndarray) -> Late:
        return Late(lambda: self.real.all_to_all(rows, counts).wait())

    def all_reduce(self, flat: paddle.Tensor, **keys: Any) -> Late:
        return Late(lambda: self.real.all_reduce(flat, **keys).wait())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Log:
    """What left during the backward pass and after it, and whether sums are right."""

    def __init__(self, reducer: GradientReducer, *, checks_sums: bool) -> None:
        self.checks_sums = checks_sums
        self.during: list[tuple[str, ...]] = []
        self.after: list[tuple[str, ...]] = []
        self.order: list[tuple[str, ...]] = []
        self.reducer = reducer
        self._here = self.during
        self._send, reducer._send = reducer._send, self._sent  # type: ignore[method-assign]
        self._finish, reducer.finish = reducer.finish, self._finished  # type: ignore

    def _sent(self, bucket: Any) -> None:
        self._here.append(bucket.names)
        self.order.append(bucket.names)
        self._send(bucket)

    def _finished(self) -> None:
        self._here = self.after
        before = self._arrays()
        self._finish()
        if self.checks_sums:
            self._check(before)
        self._here = self.during

    def _arrays(self) -> dict[str, np.ndarray]:
        named = self.reducer.parameters.items()
        return {n: p.grad.numpy().copy() for n, p in named if p.grad is not None}

    def _check(self, before: dict[str, np.ndarray]) -> None:
        """Compares with the sums of what all ranks had, in float64."""
        told = process_group.all_gather_objects(before)
        dense, experts = parallel.split_experts(self.reducer.parameters)
        holders = {
            False: range(len(told)),
            True: process_group.grid().replicas(process_group.rank()),
        }
        after = self._arrays()
        for kind, part in ((False, dense), (True, experts)):
            for name in part:
                parts = [
                    told[at][name].astype("float64") for at in holders[kind] if name in told[at]
                ]
                if name not in after:  # sharded: with its owner
                    continue
                total = np.sum(parts, axis=0)
                scale = float(np.abs(parts).max())
                np.testing.assert_allclose(after[name], total, rtol=1e-5, atol=1e-6 * scale)


def trained(grid: Grid, case: str, mode: str, **keys: Any) -> tuple[dict[str, Any], Log]:
    """Weights and norms after some steps; mode: after (the pass), during, late (collectives)."""
    steps, micro_batches, frozen = CASES[case]
    process_group.set_grid(grid)
    real = collectives.get_collectives()
    trainer = new_trainer(moe_num_experts=12, frozen=frozen, **keys)
    log = Log(trainer.optimizer._reducer, checks_sums=mode == "after")
    if mode == "after":
        trainer.optimizer.begin_last_backward = lambda: None  # type: ignore[method-assign]
    if mode == "late":
        collectives._of_grid[grid] = LateCollectives(real)  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for step in range(steps):
        batches = [b for more in range(2) for b in step_batches(2 * step + more)][:micro_batches]
        result = trainer.train_step(batches, PackedLoss("tokens"), steps)
        found |= {f"{step}: {name}": np.float64(v) for name, v in result.metrics.items()}
    collectives._of_grid[grid] = real
    return found | {n: t.numpy() for n, t in trainer.model.state_dict().items()}, log


def check(text: str, case: str) -> None:
    expert, data, sharding, recompute = map(int, text.split(","))
    grid = Grid(expert, data, sharding > 0)
    keys = {"recompute": bool(recompute), "shards_gradients": sharding == 2}
    runs = {mode: trained(grid, case, mode, **keys) for mode in ("after", "during", "late")}
    expected, after = runs["after"]
    assert not after.during
    for mode in ("during", "late"):
        found, log = runs[mode]
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(
                found[name], array, err_msg=f"{text} {case} {mode} {name}"
            )
        assert {*log.during, *log.after} == {*after.after}
        # Where all experts are on each rank an idle rank has no pass to be idle in.
        idle = (
            case == "idle"
            and expert == 1
            and process_group.rank() == process_group.world_size() - 1
        )
        print(text, case, mode, len(log.during), len(log.after), flush=True)
        assert not log.during if idle else len(log.during) > len(log.after)
        assert all(other == log.order for other in process_group.all_gather_objects(log.order))


if __name__ == "__main__":
    for text in sys.argv[2:]:
        for case in CASES:
            check(text, case)
    (Path(sys.argv[1]) / f"{process_group.rank()}-{process_group.world_size()}").touch()
