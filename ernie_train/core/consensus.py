"""Agreement between ranks: errors that end all of them, work of rank 0, equal inputs.

On a single process every function is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ernie_train.core.errors import ConfigError, ErnieTrainError, FailedElsewhere
from ernie_train.core.process_group import (
    T,
    all_gather_objects,
    any_rank,
    broadcast_object,
    is_main,
    over_gloo,
    rank,
    wait_for_all_ranks,
    world_size,
)


@contextmanager
def fail_together() -> Iterator[None]:
    """Run a block without communication; an `ErnieTrainError` on one rank ends it on all.

    The lowest rank that failed raises its own error. The others raise the same one if it is one of
    all ranks, which save before they end; else `FailedElsewhere`, so that one message is printed.
    Other ranks wait without a time limit while one has work.
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
        # In a collective of NCCL a rank would wait at full load, and for ever for one that died.
        wait_for_all_ranks()
    if not any_rank(failure is not None):
        return
    own = failure if failure is None or failure.on_all_ranks else failure.exit_status
    found = all_gather_objects(own)
    first = next(at for at, one in enumerate(found) if one is not None)
    if failure is not None and rank() == first:
        raise failure
    told = found[first]
    raise told if isinstance(told, ErnieTrainError) else FailedElsewhere(first, int(told or 1))


def run_on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone and return its result, which must be picklable, on all ranks.

    So ranks agree on what is on the disk, although a shared file system may show it to them at
    different moments. An `ErnieTrainError` there ends all ranks.
    """
    found: T | None = None
    with fail_together():
        if is_main():
            found = work()
    return broadcast_object(found)


def require_same(facts: Mapping[str, str]) -> None:
    """Raise `ConfigError` that names the facts that differ between ranks, and those ranks."""
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
