"""On every rank: trains pairs under a grid `expert,data,sharding`, saves, and reads back.

    lora_ranks.py BASE OUT METHOD:GRID ...

METHOD is `lora` or `dora`.
"""

import sys
from pathlib import Path

import numpy as np

import ernie_train  # noqa: F401
from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.model.lora import LoraConfig
from ernie_train.model.partial import begin_partial_training, select, trained_parameters
from ernie_train.train.optimizer import OptimConfig, Optimizer, optimizer_arrays
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer
from ernie_train.weights import CheckpointStore, load_pretrained, save_pretrained
from ernie_train.weights.adapters import describe_base, to_disk
from ernie_train.weights.layout import parameter_shapes
from tests.parallel.scenario import step_batches

STEPS = 2


def train(base: Path, out: Path, grid: Grid, *, dora: bool) -> None:
    """Writes `out`/step_000002, pairs and AdamW's moments after some steps, and `out`/merged."""
    process_group.set_grid(grid)
    model = load_pretrained(base)
    parallel.enable_recompute(model)
    lora = LoraConfig(rank=3, targets=["all-linear", "lm_head"], dora=dora)
    selection = select(parameter_shapes(model.config), lora, ["model.norm"], [])
    begin_partial_training(model, selection, lora, describe_base(base), seed=7)
    model.train()
    optimizer = Optimizer(model, OptimConfig(lr=1e-2, schedule="constant"))
    trainer = Trainer(model, optimizer)
    for step in range(STEPS):
        trainer.train_step(step_batches(step), PackedLoss("tokens"), STEPS)
    store = CheckpointStore(out)
    arrays = optimizer_arrays(optimizer, lambda named: to_disk(model, named))
    path = store.save(STEPS, model=model, optimizer=arrays, state={})
    before = {name: p.numpy() for name, p in trained_parameters(model).items()}
    for matrix in trained_parameters(model).values():
        matrix.set_value(np.zeros(matrix.shape, np.float32))
    store.load(path).load_model(model)
    for name, matrix in trained_parameters(model).items():
        np.testing.assert_array_equal(matrix.numpy(), before[name], err_msg=name)
    save_pretrained(model, out / "merged")


if __name__ == "__main__":
    for text in sys.argv[3:]:
        method, _, sizes = text.partition(":")
        expert, data, sharding = map(int, sizes.split(","))
        grid = Grid(expert, data, sharding > 0)
        train(Path(sys.argv[1]), Path(sys.argv[2]) / text, grid, dora=method == "dora")
