"""`global_aux_loss`: experts are balanced among the tokens of a step so far, on all ranks.

Referee: counts, loss and its gradient to the probabilities in float64, from their definition; the
model hands that gradient on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from pydantic import ValidationError

from ernie_train.core.process_group import Grid, set_grid
from ernie_train.train.moe_balance import BalanceConfig
from ernie_train.train.supervised import PackedLoss
from tests.parallel.global_balance_ranks import BALANCE, GRIDS, ORDERS, TERM, results
from tests.parallel.ranks import start_on_ranks
from tests.parallel.scenario import distance, new_trainer, step_batches
from tests.small_models import assert_same, state

TOP_K, EXPERTS = 2, 4
COEF = float(BALANCE["load_balance_coef"])
RELATIVE = 1e-5
LOSS = PackedLoss("tokens")


def chosen(stats: list[Any]) -> np.ndarray:
    """Tokens per layer and expert, [L,E]."""
    found = np.zeros((len(stats), EXPERTS))
    for at, layer in enumerate(stats):
        for token in layer.router_probs.numpy():
            found[at, np.argsort(-token)[:TOP_K]] += 1
    return found


def by_hand(order: list[int], ranks: int, *, objective: bool = True) -> dict[str, Any]:
    """The first gradient and the loss of a step of which so many micro-batches run at a time."""
    set_grid(Grid())
    model, batches = new_trainer().model, step_batches(0, order)
    trained = sum(LOSS.counts(batch)["objective"] for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    so_far, value = 0.0, 0.0
    for first in range(0, len(batches), ranks):
        outputs = [LOSS(model, batch) for batch in batches[first : first + ranks]]
        so_far = so_far + sum(chosen(output.router_stats) for output in outputs)
        share = so_far * TOP_K / so_far.sum(1, keepdims=True)
        for output in outputs:
            total = output.terms[0].sum * (float(objective) / trained)
            for layer, of_layer in zip(output.router_stats, share, strict=True):
                gradient = np.broadcast_to(EXPERTS * of_layer / tokens, layer.router_probs.shape)
                value += (layer.router_probs.numpy().astype(np.float64) * gradient).sum()
                seed = paddle.to_tensor((COEF * gradient).astype(np.float32))
                total = total + (layer.router_probs * seed).sum()
            total.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return {"metric": value / len(share), **{f"gradient/{n}": a for n, a in grads.items()}}


def assert_by_hand(found: dict[str, Any], order: list[int], ranks: int) -> None:
    expected, alone = by_hand(order, ranks), by_hand(order, ranks, objective=False)
    assert float(found[f"metric/{TERM}"]) == pytest.approx(expected.pop("metric"), rel=RELATIVE)
    assert distance(expected, found, "gradient/") < RELATIVE
    squares = [float(np.square(a).sum()) for n, a in alone.items() if n != "metric"]
    assert float(found["norm"]) == pytest.approx(np.sqrt(sum(squares)), rel=RELATIVE)


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_on_one_rank_the_counts_of_micro_batches_add_up(recompute):
    found = results(Grid(), ORDERS["even"], recompute)
    assert_by_hand(found, ORDERS["even"], 1)
    at_once = by_hand(ORDERS["even"], 4)
    assert distance(at_once, found, "gradient/") > 100 * RELATIVE, "this test cannot tell them"


def test_on_two_ranks_those_of_a_pass_are_added_first(tmp_path):
    """Also where a rank has no micro-batch left, and other ranks wait for its counts."""
    start_on_ranks(2, "global_balance_ranks.py", tmp_path, timeout_s=300)
    for order, numbers in ORDERS.items():
        for grid in GRIDS:
            first, second = (
                dict(np.load(tmp_path / f"{grid}, {order}-{rank}.npz")) for rank in range(2)
            )
            assert_by_hand(first, numbers, 2)
            for name in (n for n in first if n.startswith(("weight/", "metric/", "norm"))):
                np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_one_micro_batch_on_one_rank_is_the_bits_of_the_loss_of_each_by_itself():
    set_grid(Grid())
    ends = []
    for kind in ("aux_loss", "global_aux_loss"):
        trainer = new_trainer(balance=BALANCE | {"load_balance_type": kind})
        metrics = [trainer.train_step(step_batches(s, [2]), LOSS, 9).metrics for s in range(3)]
        ends.append((metrics, state(trainer.model)))
    assert ends[0][0] == ends[1][0]
    assert_same(ends[0][1], ends[1][1])


def test_a_step_leaves_no_counts_to_the_next():
    """So a run goes on from a checkpoint to the same bits."""
    set_grid(Grid())
    trainer = new_trainer(balance=BALANCE)
    trainer.optimizer.step = lambda lr, norm: None
    metrics = [trainer.train_step(step_batches(0), LOSS, 9).metrics for _ in range(2)]
    assert metrics[0] == metrics[1]


def test_a_type_without_a_coefficient_is_refused():
    with pytest.raises(ValidationError, match="no effect without load_balance_coef"):
        BalanceConfig(load_balance_type="global_aux_loss")
