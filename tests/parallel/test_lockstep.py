"""Passes that ranks make together, or each for itself where all experts are on each rank."""

from __future__ import annotations

import pytest

from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted
from ernie_train.core.process_group import Grid
from ernie_train.parallel import Lockstep
from tests.parallel.ranks import start_on_ranks


def test_ranks_with_all_experts_meet_once_and_stop_together(tmp_path):
    start_on_ranks(2, "lockstep_ranks.py", tmp_path, timeout_s=300)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.fixture
def other_rank(monkeypatch):
    """Two ranks, this being the first: what it tells is listed, what the other adds is set."""
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    told: list[list[float] | str] = []
    adds = [0.0, 0.0]

    def all_reduce_sum(values):
        told.append(list(values))
        return [value + more for value, more in zip(values, adds[-len(values) :], strict=True)]

    monkeypatch.setattr(process_group, "all_reduce_sum", all_reduce_sum)
    monkeypatch.setattr(process_group, "wait_for_all_ranks", lambda: told.append("without limit"))
    yield told, adds
    process_group._grid = Grid()


def test_with_experts_on_other_ranks_every_pass_is_announced(other_rank):
    process_group.set_grid(Grid(expert=2))
    told, _ = other_rank
    with Lockstep(None) as lockstep:
        for _ in range(3):
            assert not lockstep.next_pass()
    assert told == [[1.0, 0.0]] * 3 + [[0.0, 0.0]]


def test_with_all_experts_here_a_stop_elsewhere_is_known_at_the_end(other_rank):
    process_group.set_grid(Grid(data=2))
    told, adds = other_rank
    adds[1] = 1.0
    with pytest.raises(Interrupted), Lockstep(None) as lockstep:
        for _ in range(3):
            assert not lockstep.next_pass()
    assert told == ["without limit", [0.0]], "NCCL would not wait for longer than half an hour"


def test_one_s_own_stop_is_told_to_the_others_and_a_failure_is_not(other_rank):
    process_group.set_grid(Grid(data=2))
    told, _ = other_rank
    with pytest.raises(Interrupted, match="mine"), Lockstep(None, lambda: True) as lockstep:
        assert lockstep.next_pass()
        raise Interrupted("mine")
    assert told == ["without limit", [1.0]]
    with pytest.raises(ZeroDivisionError), Lockstep(None):
        raise ZeroDivisionError
    assert told == ["without limit", [1.0]]
