"""On every rank: passes without the others, as each has all experts, and a stop on one of them."""

import sys
from pathlib import Path

import ernie_train  # noqa: F401
from ernie_train.core import process_group
from ernie_train.core.errors import Interrupted
from ernie_train.core.process_group import Grid
from ernie_train.generate.sharded import generate_sharded
from ernie_train.parallel import Lockstep
from tests.parallel.meetings import meetings_of
from tests.small_models import make_model


def run_passes(number: int) -> None:
    """Announce some passes and make none."""
    with Lockstep(make_model()) as lockstep:
        for _ in range(number):
            assert not lockstep.next_pass()


def generated(stop_on: int | None) -> list[list[int]] | None:
    """Completions, None where it was stopped; on one rank a stop is asked for after some passes."""
    asked = 0

    def stop_requested() -> bool:
        nonlocal asked
        asked += 1
        return process_group.rank() == stop_on and asked > 3

    prompts = [[5, 6, 7 + at] for at in range(5)]
    try:
        found = generate_sharded(
            make_model(), prompts, max_new_tokens=9, seed=1, stop_requested=stop_requested
        )
    except Interrupted:
        return None
    return [completion.ids for completion in found]


if __name__ == "__main__":
    process_group.set_grid(Grid(data=process_group.world_size()))
    assert meetings_of(lambda: run_passes(20 * (1 + process_group.rank()))) == 1
    assert [len(ids) for ids in generated(None) or []] == [9] * 5
    for rank in range(process_group.world_size()):
        assert generated(rank) is None
    process_group.barrier()
    (Path(sys.argv[1]) / str(process_group.rank())).touch()
