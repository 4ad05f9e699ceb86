"""On every rank: passes without the others, as each has all experts, and a stop on one of them."""

import sys
from pathlib import Path

import ernie_train  # noqa: F401
from ernie_train import distributed
from ernie_train.distributed import Grid
from ernie_train.errors import Interrupted
from ernie_train.parallel import Pace
from ernie_train.spread import generate_spread
from tests.small_models import make_model


def meetings_of(passes: int) -> int:
    """How often ranks meet while this one makes some passes."""
    met = 0
    ready = distributed.ready

    def counted() -> None:
        nonlocal met
        met += 1
        ready()

    distributed.ready = counted
    with Pace(None) as pace:
        for _ in range(passes):
            assert not pace.more()
    distributed.ready = ready
    return met


def generated(stop_on: int | None) -> list[list[int]] | None:
    """Completions, None where it was stopped; on one rank a stop is asked for after some passes."""
    asked = 0

    def stop_requested() -> bool:
        nonlocal asked
        asked += 1
        return distributed.rank() == stop_on and asked > 3

    prompts = [[5, 6, 7 + at] for at in range(5)]
    try:
        found = generate_spread(
            make_model(), prompts, max_new_tokens=9, seed=1, stop_requested=stop_requested
        )
    except Interrupted:
        return None
    return [completion.ids for completion in found]


if __name__ == "__main__":
    distributed.set_grid(Grid(data=distributed.world_size()))
    assert meetings_of(20 * (1 + distributed.rank())) == 1
    assert [len(ids) for ids in generated(None) or []] == [9] * 5
    for rank in range(distributed.world_size()):
        assert generated(rank) is None
    distributed.barrier()
    (Path(sys.argv[1]) / str(distributed.rank())).touch()
