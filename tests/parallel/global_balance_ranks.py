"""On every rank: steps that balance experts among the tokens of all ranks, and a term's norm."""

import sys
from pathlib import Path

import numpy as np

import ernie_train  # noqa: F401
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.train.supervised import PackedLoss
from tests.parallel.scenario import new_trainer, step_batches, train

TERM = "balance/load_balance"
BALANCE = {"load_balance_coef": 0.5, "load_balance_type": "global_aux_loss"}
# Three micro-batches leave the second of two ranks without one in the last pass.
ORDERS = {"even": [0, 1, 2, 3], "uneven": [1, 0, 2]}
GRIDS = {"ep2": (Grid(expert=2), "none"), "ep2 again": (Grid(expert=2), "layers"),
         "dp2": (Grid(data=2), "none")}  # fmt: skip


def results(grid: Grid, order: list[int], recompute: str = "none") -> dict[str, np.ndarray]:
    """What `train` gives, and the gradient norm of the load-balance loss alone at its start."""
    process_group.set_grid(grid)
    trainer = new_trainer(balance=BALANCE)
    norm = trainer.gradient_norm_of({TERM}, step_batches(0, order), PackedLoss("tokens"))
    trained = train(grid, recompute=recompute, order=order, balance=BALANCE)
    return trained | {"norm": np.float64(norm)}


if __name__ == "__main__":
    for name, (grid, recompute) in GRIDS.items():
        for order in ORDERS:
            found = results(grid, ORDERS[order], recompute)
            out = Path(sys.argv[1]) / f"{name}, {order}-{process_group.rank()}.npz"
            np.savez(out, **found)
