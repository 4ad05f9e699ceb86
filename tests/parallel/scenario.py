"""One small training run, the same on any layout of ranks; what it gives, put together again."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.model import is_expert_parameter
from ernie_train.parallel.collectives import get_collectives
from ernie_train.train.moe_balance import BalanceConfig
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer
from tests.small_models import make_config
from tests.train.test_trainer import part, rows

STEPS = 3
MICRO_BATCHES = 4
BALANCE = {"orthogonal_coef": 1e-3, "z_loss_coef": 1e-3, "bias_update_rate": 1e-3}


def whole(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by parameter name, experts joined in their order.

    This rank's own arrays and those of its expert group, others' where these have none.
    """
    parts = process_group.all_gather_objects(named)
    grid, me = process_group.grid(), process_group.rank()

    def of_one(name: str, ranks: list[int]) -> np.ndarray:
        return next(parts[at][name] for at in ranks if name in parts[at])

    joined = {}
    for name in sorted({name for named in parts for name in named}):
        if is_expert_parameter(name):
            places = [[at, *grid.replicas(at)] for at in grid.expert_group(me)]
            joined[name] = np.concatenate([of_one(name, ranks) for ranks in places])
        else:
            joined[name] = of_one(name, [me, *range(len(parts))])
    return joined


RECOMPUTE: dict[str, parallel.Recompute] = {
    "none": False,
    "layers": True,
    "experts": parallel.RecomputeConfig(parts=("experts",)),
    "experts of 2": parallel.RecomputeConfig(parts=("experts",), layers=2),
    # Ranks have unequal numbers of tokens, so of chunks.
    "chunks": parallel.RecomputeConfig(chunk_tokens=10),
    "chunks of experts": parallel.RecomputeConfig(parts=("experts",), chunk_tokens=16),
}


def new_trainer(
    recompute: parallel.Recompute = False,
    shards_gradients: bool = False,
    frozen: tuple[str, ...] = (),
    balance: dict[str, Any] = BALANCE,
    **config_keys: Any,
) -> Trainer[Any, Any]:
    """`frozen`: parts of the names of parameters that are not trained."""
    paddle.seed(4)
    keys = {"initializer_range": 0.2, "num_hidden_layers": 3, "tie_word_embeddings": False}
    config = make_config(**keys | config_keys)
    model = parallel.new_model(config, "float32")
    parallel.enable_recompute(model, recompute)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = any(words in name for words in frozen)
    settings = OptimConfig(lr=1e-3, schedule="constant")
    optimizer = Optimizer(model, settings, shards_gradients=shards_gradients)
    return Trainer(model, optimizer, balance=BalanceConfig(**balance))


def step_batches(step: int, order: list[int] | None = None) -> list[Any]:
    """The micro-batches of a step, of unequal sizes, in the given order."""
    batch = rows(count=8, length=24, seed=step)
    cuts = (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 8))
    return [part(batch, cuts[at]) for at in order or range(MICRO_BATCHES)]


def train(
    grid: Grid,
    *,
    recompute: str = "none",
    shards_gradients: bool = False,
    order: list[int] | None = None,
    balance: dict[str, Any] = BALANCE,
) -> dict[str, Any]:
    """Trains `STEPS` steps; what the first one saw, the weights after the last, and bytes sent."""
    process_group.set_grid(grid)
    trainer = new_trainer(RECOMPUTE[recompute], shards_gradients, balance=balance)
    loss = PackedLoss("tokens")
    before = get_collectives().sent_bytes if grid.expert > 1 else 0
    first: dict[str, Any] = {}
    update = trainer.optimizer.step

    def step(lr: float, norm: float) -> None:
        held = {n: p for n, p in trainer.optimizer.parameters.items() if p.grad is not None}
        optimizer = trainer.optimizer
        assert held.keys() == (optimizer.owned if shards_gradients else optimizer.parameters).keys()
        grads = {n: p.grad.numpy().copy() for n, p in held.items()}
        first.update({f"gradient/{n}": a for n, a in whole(grads).items()})
        update(lr, norm)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    result = trainer.train_step(step_batches(0, order), loss, STEPS)
    trainer.optimizer.step = update  # type: ignore[method-assign]
    first |= {f"metric/{n}": np.float64(v) for n, v in result.metrics.items()}
    first["tokens"] = np.float64(result.tokens)
    first["load"] = result.load.tokens_per_expert
    state = {n: t.numpy() for n, t in trainer.model.state_dict().items()}
    first |= {f"bias/{n}": a for n, a in state.items() if n.endswith("correction_bias")}
    for number in range(1, STEPS):
        trainer.train_step(step_batches(number, order), loss, STEPS)
    weights = whole({n: t.numpy() for n, t in trainer.model.state_dict().items()})
    if grid.expert > 1:
        first["exchanged"] = np.float64(get_collectives().sent_bytes - before)
    return first | {f"weight/{n}": a for n, a in weights.items()}


def distance(one: dict[str, Any], other: dict[str, Any], kind: str) -> float:
    """The 2-norm of the difference of all arrays of a kind, over that of the first."""
    names = [name for name in one if name.startswith(kind)]
    gaps = [np.asarray(one[n] - other[n], np.float64) for n in names]
    total = sum(float(np.square(np.asarray(one[n], np.float64)).sum()) for n in names)
    return float(np.sqrt(sum(float(np.square(gap).sum()) for gap in gaps) / total))
