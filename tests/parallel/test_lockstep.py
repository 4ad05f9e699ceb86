"""Passes that ranks make together, or each for itself where all experts are on each rank."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted
from ernie_train.core.process_group import Grid
from ernie_train.model.moe import LOCAL_PLACEMENT
from ernie_train.model.token_dispatcher import Placement
from ernie_train.parallel import ExpertDispatcher, Lockstep, expert
from tests.parallel.ranks import start_on_ranks
from tests.small_models import make_config


def test_ranks_with_all_experts_meet_once_and_stop_together(tmp_path):
    start_on_ranks(2, "lockstep_ranks.py", tmp_path, timeout_s=300)
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two ranks with half of the experts each saw."""
    directory = tmp_path_factory.mktemp("shared")
    start_on_ranks(2, "expert_lockstep_ranks.py", directory, timeout_s=300)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_sampled_token_takes_the_collectives_of_its_moe_layers_and_no_other(shared):
    """Of a layer: the counts of rows, their dispatch and their combine."""
    config = make_config()
    a_pass = 3 * sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    for found in shared:
        meetings = {int(tokens): count for tokens, count in found["meetings"].items()}
        assert meetings[2] - meetings[1] == a_pass
        assert meetings[12] - meetings[2] == 10 * a_pass
        # Before, there was one more for each token. Now a pass that is a dummy on both ranks, the
        # agreement on a stop, and the exchange of the completions.
        assert meetings[1] == a_pass + a_pass + 2
        assert found["uneven"] == meetings[12]


def test_micro_batches_take_no_other_pass_as_their_number_is_known(shared):
    config = make_config()
    a_pass = 3 * sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    for found in shared:
        assert found["batches"] == [a_pass * passes + 1 for passes in (0, 1, 1, 2)]


def test_a_stop_on_one_rank_ends_both_after_the_next_pass(shared):
    """Also while one has no work: it is asked before each pass, and once at the end."""
    for found in shared:
        assert found["stopped"] == [3 + 2, 20 + 2] * 2


def test_an_error_on_one_rank_ends_both(shared):
    assert [found["failure"] for found in shared] == ["the connection to rank 1 is lost", "mine"]


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


@pytest.fixture
def peer(other_rank, monkeypatch):
    """A model with an MoE layer, whose other experts are on another rank, and what both tell.

    That rank says in each pass what is set.
    """
    process_group.set_grid(Grid(expert=2))
    told: list[int] = []
    says: list[int] = []

    def gather(values):
        told.append(int(values[-1]))
        return np.stack([values.numpy(), [7, 8, says.pop(0)]])

    monkeypatch.setattr(
        expert, "get_collectives", lambda: SimpleNamespace(gather=gather, group=[0, 1])
    )
    return SimpleNamespace(model=Decoder()), told, says


class Decoder:
    """Exchanges the counts of rows, as a decoder with one MoE layer does."""

    def __init__(self):
        self.placement = Placement(None, ExpertDispatcher())

    def __call__(self, token):
        counts = paddle.to_tensor([5, 6])
        assert self.placement.dispatcher.signals.gather(counts).tolist() == [[5, 6], [7, 8]]
        return SimpleNamespace(hidden=None)


WHOLE = SimpleNamespace(model=SimpleNamespace(placement=LOCAL_PLACEMENT))


WORKS, STOPS = 1, 2


def test_a_rank_without_work_runs_passes_until_nobody_has_any(peer):
    model, told, says = peer
    says += [WORKS, WORKS, WORKS, WORKS, 0]
    with Lockstep(model) as passes:
        for _ in range(2):
            assert not passes.next_pass()
            model.model(None)
    assert told == [WORKS, WORKS, 0, 0, 0] and says == []


@pytest.mark.parametrize(("items", "own", "says"), [(5, 3, 3), (4, 2, 2), (1, 1, 1), (0, 0, 0)])
def test_a_known_number_of_passes_needs_no_dummy_on_all_ranks(peer, items, own, says):
    model, told, others = peer
    others += [0] * says
    with Lockstep(model) as passes:
        for _ in passes.shard(range(items)):
            model.model(None)
    assert told == [WORKS] * own and others == []


def test_a_last_pass_of_other_ranks_alone_is_joined(peer, monkeypatch):
    monkeypatch.setattr(process_group, "rank", lambda: 1)
    model, told, says = peer
    says += [WORKS, WORKS]
    with Lockstep(model) as passes:
        for _ in passes.shard(range(3)):
            model.model(None)
    assert told == [WORKS, 0] and says == []


def test_a_stop_is_told_with_a_pass_and_obeyed_after_it(peer, other_rank):
    model, told, says = peer
    says += [WORKS, WORKS]
    asked = iter([False, True, True, True])
    with pytest.raises(Interrupted, match="mine"), Lockstep(model, lambda: next(asked)) as passes:
        for _ in range(2):
            assert not passes.next_pass()
            model.model(None)
        assert passes.next_pass()
        raise Interrupted("mine")
    assert told == [WORKS, WORKS | STOPS]
    assert other_rank[0] == ["without limit", [1.0]]


@pytest.mark.parametrize("own", [0, 1])
def test_a_stop_elsewhere_ends_passes_and_dummies(peer, other_rank, own):
    model, told, says = peer
    says += [WORKS, WORKS | STOPS]
    other_rank[1][1] = 1.0
    with pytest.raises(Interrupted), Lockstep(model) as passes:
        for _ in range(own):
            assert not passes.next_pass()
            model.model(None)
    assert told == [WORKS] * own + [0] * (2 - own)


def test_what_a_last_pass_told_does_not_stop_the_next_ones(peer):
    """That rank says at the end, when all meet, whether it stops."""
    model, _, says = peer
    says += [WORKS | STOPS, WORKS]
    for _ in range(2):
        with Lockstep(model) as passes:
            for _ in passes.shard(range(2)):
                model.model(None)
    assert says == []


def test_passes_of_another_model_between_tell_and_hear_nothing(peer):
    model, told, says = peer
    other = SimpleNamespace(model=Decoder())
    says += [WORKS, STOPS, WORKS]
    with Lockstep(model) as passes:
        for _ in passes.shard(range(4)):
            model.model(None)
            if len(told) == 1:
                other.model(None)
    assert told == [WORKS, 0, WORKS] and says == []


def test_a_model_without_experts_elsewhere_takes_no_dummy_pass(peer, other_rank):
    """Say a dense reward model beside a policy whose experts are on several ranks."""
    with pytest.raises(Interrupted, match="mine"), Lockstep(WHOLE, lambda: True) as passes:
        assert passes.next_pass()
        raise Interrupted("mine")
    with Lockstep(WHOLE):
        pass
    assert peer[1] == [] and other_rank[0] == ["without limit", [1.0], "without limit", [0.0]]


def test_with_all_experts_here_a_stop_elsewhere_is_known_at_the_end(other_rank):
    process_group.set_grid(Grid(data=2))
    told, adds = other_rank
    adds[1] = 1.0
    with pytest.raises(Interrupted), Lockstep(WHOLE) as lockstep:
        for _ in range(3):
            assert not lockstep.next_pass()
    assert told == ["without limit", [0.0]], "NCCL would not wait for longer than half an hour"


def test_one_s_own_stop_is_told_to_the_others_and_a_failure_is_not(other_rank):
    process_group.set_grid(Grid(data=2))
    told, _ = other_rank
    with pytest.raises(Interrupted, match="mine"), Lockstep(WHOLE, lambda: True) as lockstep:
        assert lockstep.next_pass()
        raise Interrupted("mine")
    assert told == ["without limit", [1.0]]
    with pytest.raises(ZeroDivisionError), Lockstep(WHOLE):
        raise ZeroDivisionError
    assert told == ["without limit", [1.0]]
