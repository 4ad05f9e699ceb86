"""The ranks of this job: who this process is, how they are laid out, and what they tell each other.

Ranks = `expert` x `data`. The experts of every layer are dealt out over the `expert` consecutive
ranks of an expert group; ranks that hold the same experts, one of each expert group, are replicas.
Dense parameters are on all ranks.

On a single process everything is the identity and Paddle's distributed package is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ernie_train.core.errors import ConfigError, ErnieTrainError, FailedElsewhere
from ernie_train.core.process_group import (
    T,
    all_gather_objects,
    any_rank,
    is_main,
    over_gloo,
    rank,
    wait_for_all_ranks,
    world_size,
)


# ---- agreeing ------------------------------------------------------------------------------------
@contextmanager
def fail_together() -> Iterator[None]:
    """Runs a part without communication; an error of ours on one rank ends it on all.

    The lowest rank that failed raises its own error, the others `FailedElsewhere`, so that one
    message is printed. It may take as long as it takes, also where only one rank has work.
    """
    if world_size() == 1:
        yield
        return
    failure: ErnieTrainError | None = None
    try:
        yield
    except ErnieTrainError as error:
        failure = error
    if not over_gloo():
        # NCCL gives up after half an hour, and one rank may have work for longer.
        wait_for_all_ranks()
    if not any_rank(failure is not None):
        return
    statuses = all_gather_objects(None if failure is None else failure.exit_status)
    failed = [at for at, status in enumerate(statuses) if status is not None]
    if failure is not None and rank() == failed[0]:
        raise failure
    if failed:
        raise FailedElsewhere(failed[0], int(statuses[failed[0]] or 1))


def run_on_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, which alone does it; an error of ours there ends all ranks.

    So ranks agree on what is on the disk, although they may see it at different moments. The result
    must be something that can be pickled.
    """
    found: list[T] = []
    with fail_together():
        if is_main():
            found.append(work())
    return all_gather_objects(found)[0][0]


def require_same(facts: Mapping[str, str]) -> None:
    """Raises `ConfigError` that names what differs between ranks, with the ranks that differ."""
    if world_size() == 1:
        return
    found = all_gather_objects(dict(facts))
    with fail_together():
        problems = []
        for name in facts:
            other = [at for at, theirs in enumerate(found) if theirs[name] != found[0][name]]
            if other:
                ranks = ", ".join(map(str, other))
                problems.append(f"{name} differs between the ranks: rank {ranks} from rank 0")
        if problems:
            raise ConfigError(problems)
