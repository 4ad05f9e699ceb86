"""What a rank reads of a checkpoint's optimizer state: its own share, one array after another."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.config import parse_config
from ernie_train.core.process_group import Grid
from ernie_train.io.safetensors import TensorFiles, array_entries, write_tensor_files
from ernie_train.parallel import gradients
from ernie_train.rl.critic import Critic
from ernie_train.train.optimizer import OptimConfig, Optimizer, optimizer_arrays, restore_optimizer
from ernie_train.weights.adapters import from_disk, to_disk
from tests.small_models import make_config

EXPERTS = 8
CONFIG = make_config(
    hidden_size=128, moe_intermediate_size=128, moe_num_experts=EXPERTS, head_dim=32
)
SETTINGS = parse_config(OptimConfig, {"lr": 1e-3}, "test")


class Saved(SimpleNamespace):
    """A model's moments after a step, by name, and the directory that they were written to.

    files: the open files; reads: how often each of their tensors was read since.
    """


def new_model(kind: str):
    policy = parallel.new_model(CONFIG, "float32")
    if kind == "policy":
        return policy, lambda named: to_disk(policy, named), lambda named: from_disk(policy, named)
    critic = Critic(policy)
    return critic, critic.to_disk, critic.from_disk


@pytest.fixture(params=["policy", "critic"])
def saved(request, tmp_path, monkeypatch):
    model, renamed, _ = new_model(request.param)
    optimizer = Optimizer(model, SETTINGS)
    for at, parameter in enumerate(optimizer.parameters.values()):
        parameter.grad = paddle.randn(parameter.shape) * (at + 1)
    optimizer.step(1e-3, optimizer.gradient_norm())
    moments = {s: {n: t.numpy() for n, t in ts.items()} for s, ts in optimizer.moments().items()}
    arrays = optimizer_arrays(optimizer, renamed)
    write_tensor_files(tmp_path, "optimizer", array_entries(arrays), "1MB")
    reads: Counter[str] = Counter()
    bits = TensorFiles.bits

    def counted(files, name):
        reads[name] += 1
        return bits(files, name)

    monkeypatch.setattr(TensorFiles, "bits", counted)
    monkeypatch.setattr(gradients, "get_collectives", lambda: None)  # they are only connected
    yield Saved(
        kind=request.param, moments=moments, files=TensorFiles(tmp_path, "optimizer"), reads=reads,
        sizes={name: array.nbytes for name, array in arrays.items()}, path=tmp_path,
        powers=optimizer.beta_powers(),
    )  # fmt: skip
    process_group._grid = Grid()


def restored(saved, rank, monkeypatch):
    """Return what a rank restores, by (slot, name); `saved.reads` starts anew."""
    monkeypatch.setenv("PADDLE_TRAINER_ID", str(rank))
    model, _, renamed = new_model(saved.kind)
    optimizer = Optimizer(model, SETTINGS)
    found = {}
    monkeypatch.setattr(
        paddle.optimizer.AdamW, "set_state_dict", lambda self, state: found.update(state)
    )
    saved.reads.clear()
    tracemalloc.start()
    restore_optimizer(optimizer, saved.files, saved.powers, renamed, checkpoint=saved.path, steps=1)
    _, saved.peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        (slot, name): found[f"{parameter.name}_{slot}_0"].numpy()
        for slot in saved.moments
        for name, parameter in optimizer.updated.items()
    }


GRIDS = {
    "one": Grid(),
    "data": Grid(data=2),
    "expert": Grid(expert=2),
    "data, sharded": Grid(data=3, sharding=True),
    "expert, sharded": Grid(expert=2, data=2, sharding=True),
    "16 ranks": Grid(expert=4, data=4, sharding=True),
}


@pytest.mark.parametrize("layout", GRIDS)
def test_a_rank_reads_the_state_that_it_keeps_once_and_no_other(layout, saved, monkeypatch):
    grid = GRIDS[layout]
    ranks = grid.expert * grid.data
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(ranks))
    process_group.set_grid(grid)
    total, largest = (
        sum(saved.sizes.values()),
        max(a.nbytes for a in saved.moments["moment1"].values()),
    )
    of_all: Counter[str] = Counter()
    for rank in range(ranks):
        found = restored(saved, rank, monkeypatch)
        local = EXPERTS // grid.expert
        first = rank % grid.expert * local
        for (slot, name), array in found.items():
            expected = saved.moments[slot][name]
            if ".mlp.experts." in name:
                expected = expected[first : first + local]
            np.testing.assert_array_equal(array, expected, err_msg=name)
        assert set(saved.reads.values()) <= {1}
        assert sum(saved.sizes[name] for name in saved.reads) == sum(
            a.nbytes for a in found.values()
        )
        assert saved.peak < 3 * largest < total / 4
        of_all += saved.reads
    copies = 1 if grid.sharding else grid.data
    shared = [n for n in saved.sizes if grid.sharding or ".mlp.experts." in n]
    assert of_all.keys() == saved.sizes.keys()
    assert {of_all[name] for name in shared} == {copies}
    dense = [n for n in saved.sizes if ".mlp.experts." not in n]
    assert {of_all[name] for name in dense} == {1 if grid.sharding else ranks}
