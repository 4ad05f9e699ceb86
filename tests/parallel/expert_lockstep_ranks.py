"""On every rank of an expert group: how often ranks meet, and how a stop or an error ends them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import paddle

import ernie_train  # noqa: F401
from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.errors import ErnieTrainError, Interrupted
from ernie_train.core.process_group import Grid
from ernie_train.generate.sharded import generate_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Lockstep
from tests.parallel.meetings import meetings_of
from tests.small_models import make_config

PROMPTS = [[5, 6, 7 + at] for at in range(6)]
LONG = 40


def new_model() -> Ernie4_5_MoeForCausalLM:
    return parallel.new_model(make_config(), "float32")


def sample(limits: list[int], stop_requested: Callable[[], bool] = lambda: False) -> None:
    """Sample completions of the given lengths."""
    found = generate_sharded(
        new_model(), PROMPTS, max_new_tokens=LONG, limits=limits, stop_requested=stop_requested
    )
    assert [len(completion.ids) for completion in found] == limits


def score(batches: int) -> None:
    """Run some micro-batches, each on one rank."""
    model = new_model()
    with Lockstep(model) as lockstep, paddle.no_grad():
        for batch in lockstep.shard(PROMPTS[:batches]):
            model(paddle.to_tensor([batch]))


def passes_until_stopped(rank: int, after: int) -> int:
    """How often this rank was asked whether to stop: once a pass, and once at the end."""
    asked = 0

    def stop_requested() -> bool:
        nonlocal asked
        asked += 1
        return process_group.rank() == rank and asked > after

    try:
        sample([LONG, 3] * 3, stop_requested)
    except Interrupted:
        return asked
    raise AssertionError("not interrupted")


def message_of_a_failure(rank: int) -> str:
    """What ends this rank where one fails after some passes."""
    asked = 0

    def fail() -> bool:
        nonlocal asked
        asked += 1
        if process_group.rank() == rank and asked > 3:
            raise ZeroDivisionError("mine")
        return False

    try:
        sample([LONG] * 6, fail)
    except (ErnieTrainError, ZeroDivisionError) as error:
        return str(error)
    raise AssertionError("sampled to the end")


if __name__ == "__main__":
    process_group.set_grid(Grid(expert=process_group.world_size()))
    found = {
        "meetings": {n: meetings_of(lambda n=n: sample([n] * 6)) for n in (1, 2, 12)},
        # One rank has the long completion.
        "uneven": meetings_of(lambda: sample([12, 2, 2, 2, 2, 2])),
        "batches": [meetings_of(lambda n=n: score(n)) for n in (0, 1, 2, 3)],
        "stopped": [passes_until_stopped(rank, after) for rank in (0, 1) for after in (3, 20)],
    }
    # The last, since a rank ends with it.
    found["failure"] = message_of_a_failure(1)
    rank = process_group.rank()
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
