"""On every rank: tokens that reach some experts only, and ranks with nothing to run."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle

import ernie_train  # noqa: F401
from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.model.moe import MoE
from ernie_train.parallel import Lockstep
from ernie_train.parallel.collectives import get_collectives
from tests.parallel.scenario import RECOMPUTE, new_trainer, step_batches, whole
from tests.small_models import make_config

EXPERTS = 12  # over 3, 4 ranks
BIASES = {"one expert": [9, 9, *[0] * 10], "last": [*[0] * 10, 9, 9], "all": [0] * 12}


def layer_results(bias: list[float]) -> dict[str, np.ndarray]:
    """An MoE layer under a bias that sends every token to two experts; each rank has its tokens."""
    paddle.seed(3)
    config = make_config(moe_num_experts=EXPERTS, initializer_range=0.3)
    layer = MoE(config, parallel.expert_placement(config))
    for name, parameter in layer.named_parameters():
        random = np.random.default_rng(len(name))
        everywhere = (
            [EXPERTS, *parameter.shape[1:]] if ".experts." in f".{name}" else parameter.shape
        )
        values = random.normal(0, 0.3, everywhere).astype(np.float32)
        if parameter.shape != list(everywhere):
            here = parallel.expert_placement(config).experts
            values = values[here.start : here.stop]
        parameter.set_value(values)
    layer.moe_statics.e_score_correction_bias.set_value(np.array([bias], np.float32))
    random = np.random.default_rng(7)
    every = random.normal(size=(13, config.hidden_size)).astype(np.float32)
    ranks, rank = process_group.world_size(), process_group.rank()
    x = paddle.to_tensor(every[rank::ranks], stop_gradient=False)
    out, _, _, _ = layer(x)
    (out * paddle.to_tensor(np.cos(every[rank::ranks]))).sum().backward()
    parallel.GradientReducer(dict(layer.named_parameters(prefix="model.mlp"))).finish()
    grads = {f"x.mlp.{n}": p.grad.numpy() for n, p in layer.named_parameters()}
    rows = np.stack([out.numpy(), x.grad.numpy()], 1)
    parts = process_group.all_gather_objects(rows)
    joined = np.zeros((13, *rows.shape[1:]), np.float32)
    for at, part in enumerate(parts):
        joined[at::ranks] = part
    return {"rows": joined, **whole(grads)}


def fewer_batches_than_ranks(recompute: str, **keys: Any) -> dict[str, np.ndarray]:
    """A step of one micro-batch, and passes of which the first rank makes most."""
    trainer = new_trainer(RECOMPUTE[recompute], moe_num_experts=EXPERTS, **keys)
    from ernie_train.train.supervised import PackedLoss

    batch = step_batches(0)[1]
    result = trainer.train_step([batch], PackedLoss("tokens"), 9)
    metrics = {f"metric/{n}": np.float64(v) for n, v in result.metrics.items()}
    seen = []
    with Lockstep(trainer.model) as lockstep, paddle.no_grad():
        for _ in range(process_group.world_size() - process_group.rank()):
            assert not lockstep.next_pass()
            seen.append(trainer.model(paddle.to_tensor(batch.input_ids)).logits.numpy())
    assert all(np.allclose(seen[0], other, atol=1e-5) for other in seen)
    state = whole({n: t.numpy() for n, t in trainer.model.state_dict().items()})
    load = {"load": result.load.tokens_per_expert, "dropped": result.load.dropped}
    return {**load, "logits": seen[0], **metrics,
            **{f"weight/{n}": a for n, a in state.items()}}  # fmt: skip


def everything() -> dict[str, np.ndarray]:
    found = {
        f"{case}: {name}": array
        for case, bias in BIASES.items()
        for name, array in layer_results(bias).items()
    }
    found |= fewer_batches_than_ranks("none")
    again = fewer_batches_than_ranks("experts", moe_capacity_factor=0.7)
    assert again["dropped"].sum() > 0
    found |= {f"experts again: {name}": array for name, array in again.items()}
    in_chunks = fewer_batches_than_ranks("chunks")
    return found | {f"chunks: {name}": array for name, array in in_chunks.items()}


if __name__ == "__main__":
    process_group.set_grid(Grid(expert=process_group.world_size()))
    out = Path(sys.argv[1])
    np.savez(out / f"{process_group.world_size()}-{process_group.rank()}.npz", **everything())
    assert get_collectives().sent_bytes > 0
