"""All-to-all of rows: experts and ranks without a token, rounds of partners, NCCL's arguments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ernie_train.core import process_group
from ernie_train.core.errors import ConfigError
from ernie_train.core.process_group import Grid, set_grid
from ernie_train.model.moe import LOCAL_PLACEMENT
from ernie_train.parallel import check_expert_degree, collectives, expert_placement
from ernie_train.parallel.collectives import _partners
from ernie_train.parallel.expert import (
    _Combine,
    _expert_order,
    _StartDispatch,
    _Transfer,
    _WaitDispatch,
)
from tests.parallel.empty_ranks import everything
from tests.parallel.ranks import start_on_ranks
from tests.small_models import make_config


@pytest.fixture(scope="module")
def one() -> dict[str, np.ndarray]:
    """The results of one rank."""
    set_grid(Grid())
    return everything()


@pytest.mark.parametrize("ranks", [3, 4])
def test_experts_and_ranks_without_a_token_neither_hang_nor_skew(one, ranks, tmp_path):
    """With every token at two experts, the other ranks' experts get none.

    An odd number of ranks exchanges rows by padded gathering.
    """
    start_on_ranks(ranks, "empty_ranks.py", tmp_path, timeout_s=300)
    for rank in range(ranks):
        result = dict(np.load(tmp_path / f"{ranks}-{rank}.npz"))
        assert result.keys() == one.keys()
        for name, expected in one.items():
            scale = max(1e-3, float(np.abs(expected).max()))
            np.testing.assert_allclose(
                result[name], expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name
            )
        for name in ("load", "experts again: load", "experts again: dropped"):
            np.testing.assert_array_equal(result[name], one[name])


class Alone:
    """An all-to-all plan of one rank: what is sent comes back."""

    def start_dispatch(self, rows: paddle.Tensor) -> SimpleNamespace:
        return SimpleNamespace(wait=rows.clone)

    start_combine = start_dispatch

    def wait_dispatch(self, work: SimpleNamespace) -> paddle.Tensor:
        return work.wait()


def dispatched(rows: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
    transfer = _Transfer(Alone())
    dummy, _ = _StartDispatch.apply(rows, rows, weights, transfer)
    return _WaitDispatch.apply(dummy, None, transfer)[0]


def started(rows: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
    return _StartDispatch.apply(rows, rows, weights, _Transfer(Alone()))[1]


@pytest.mark.parametrize(
    "pass_rows", [dispatched, started, lambda rows, _: _Combine.apply(rows, Alone())]
)
def test_second_derivatives_of_an_exchange_are_refused_not_missing(pass_rows):
    rows, weights = (paddle.ones([3, n], "float32") for n in (4, 1))
    rows.stop_gradient = weights.stop_gradient = False
    # Paddle wraps what a backward pass raises.
    with pytest.raises(OSError, match="RuntimeError: this backward pass has no derivative"):
        paddle.grad(pass_rows(rows, weights).sum(), [rows], create_graph=True)


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_in_every_round_each_rank_has_one_partner_and_meets_all(size):
    rounds = list(zip(*(_partners(me, size) for me in range(size)), strict=True))
    assert len(rounds) == size - 1
    for partners in rounds:
        assert all(partners[partners[me]] == me != partners[me] for me in range(size))
    for me in range(size):
        assert {partners[me] for partners in rounds} == set(range(size)) - {me}


def test_nccl_is_told_what_goes_and_what_comes(monkeypatch):
    """The collective is played here; the arguments are those that Paddle documents."""
    told = {}
    task = SimpleNamespace(wait=lambda: told.update(waited=True))

    def all_to_all(out, rows, in_split_sizes, out_split_sizes, group, sync_op=True):
        told.update(sent=in_split_sizes, received=out_split_sizes, group=group, sync_op=sync_op)
        assert sum(in_split_sizes) == rows.shape[0]
        assert sum(out_split_sizes) == out.shape[0]
        return task

    def summed(flat, **keys):
        told.clear()
        told.update(keys)
        return task

    def gathered(parts, own, group):
        told.update(group=group)
        parts += [own, own + 1]

    made = []
    monkeypatch.setattr(
        collectives, "paddle_distributed",
        SimpleNamespace(new_group=lambda ranks: made.append(ranks) or tuple(ranks),
                        alltoall_single=all_to_all, all_reduce=summed, reduce=summed,
                        all_gather=gathered),
    )  # fmt: skip
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "3")
    nccl = collectives.NcclCollectives(Grid(expert=2, data=2))
    assert made == [[0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3]]
    pending = nccl.all_to_all(paddle.ones([5, 7]), np.array([[1, 2], [4, 1]]))
    assert told == {"sent": [4, 1], "received": [2, 1], "group": (2, 3), "sync_op": False}
    assert pending.wait().shape == [3, 7]
    assert told.pop("waited")
    told.clear()
    assert nccl.gather(paddle.to_tensor([3, 4])).tolist() == [[3, 4], [4, 5]]
    assert nccl.group == [0, 1]
    assert told == {"group": (2, 3)}  # an MoE layer does not wait for ranks of other groups
    everyone, replicas, flat = (0, 1, 2, 3), (1, 3), paddle.ones([2])
    for experts, dst, expected in (
        (False, None, {"group": everyone}),
        (True, None, {"group": replicas}),
        (False, 2, {"group": everyone, "dst": 2}),
        (True, 1, {"group": replicas, "dst": 3}),
    ):
        pending = nccl.all_reduce(flat, experts=experts, dst=dst)
        assert told == {**expected, "sync_op": False}
        assert pending.wait() is flat
        assert told["waited"]
    assert nccl.sent_bytes == 4 * 7 * 4


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_arrive_are_ordered_by_expert_then_by_rank(seed):
    arriving = np.random.default_rng(seed).integers(0, 4, (3, 4))
    rows = [(expert, rank) for rank in range(3) for expert in range(4)
            for _ in range(arriving[rank, expert])]  # fmt: skip
    order = _expert_order(arriving)
    assert [rows[at] for at in order] == sorted(rows)
    assert sorted(order) == list(range(len(rows)))


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(expert=2, data=2), [("sum", (2, 3)), ("sum", (1, 3)), ("sum", (0, 1, 2, 3)),
                                  ("rows", (2, 3))]),
        (Grid(expert=1, data=4), [("sum", (0, 1, 2, 3)), ("sum", (0, 1, 2, 3))]),
    ],
)  # fmt: skip
def test_nccl_takes_its_memory_before_there_is_a_model_s_work_to_do(monkeypatch, grid, expected):
    """Paddle connects a group in its first collective, and a group of one has none."""
    seen = []
    monkeypatch.setattr(
        collectives, "paddle_distributed",
        SimpleNamespace(
            new_group=lambda ranks: tuple(ranks),
            all_reduce=lambda flat, group: seen.append(("sum", group)),
            alltoall_single=lambda out, rows, sent, got, group: seen.append(("rows", group)),
        ),
    )  # fmt: skip
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "3")
    collectives.NcclCollectives(grid)
    assert seen == expected


@pytest.mark.parametrize(("degree", "keys", "message"), [
    (3, {}, "parallel.expert=3 must divide moe_num_experts=4"),
    (8, {}, "parallel.expert=8 must divide moe_num_experts=4"),
])  # fmt: skip
def test_a_degree_that_does_not_fit_the_experts(degree, keys, message):
    with pytest.raises(ConfigError, match=message):
        check_expert_degree(degree, make_config(**keys))


def test_a_model_without_experts_is_whole_on_every_rank(monkeypatch):
    """As a dense reward model beside a policy whose experts are spread."""
    monkeypatch.setattr(process_group, "_grid", Grid(expert=2))
    dense = make_config(moe_num_experts=0)
    assert expert_placement(dense) is LOCAL_PLACEMENT
    assert expert_placement(make_config()).experts == range(2)


def test_degrees_that_do_not_make_the_ranks():
    with pytest.raises(ConfigError, match=r"parallel.expert=2 x parallel.data=2 needs 4 ranks"):
        set_grid(Grid(expert=2, data=2))
