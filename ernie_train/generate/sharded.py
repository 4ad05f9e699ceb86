"""Work that all ranks know, done by each for its share; every rank has all results then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import Interrupted
from ernie_train.generate.engine import Completion, generate
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Lockstep

T = TypeVar("T")
R = TypeVar("R")


def generate_sharded(
    model: Ernie4_5_MoeForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    stop_requested: Callable[[], bool],
    on_progress: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> list[Completion]:
    """`generation.generate`, whose `settings` these are, with the prompts dealt out by length.

    Equal prompts stay together, and each sequence has the random numbers that it has on one rank.
    Raises `Interrupted` on all ranks when a stop is asked for on one.
    """
    ranks = process_group.world_size()
    if ranks == 1:
        return generate(
            model, prompts, stop_requested=stop_requested, on_progress=on_progress, **settings
        )
    mine = _hands(prompts, ranks)[process_group.rank()]
    with Lockstep(model, stop_requested) as lockstep:
        found = generate(
            model,
            [prompts[at] for at in mine],
            numbers=mine,
            stop_requested=lockstep.next_pass,  # asked once before each forward pass
            on_progress=lambda done: on_progress(min(len(prompts), done * ranks)),
            **settings,
        )
    by_number: dict[int, Completion] = {}
    for part in process_group.all_gather_objects(dict(zip(mine, found, strict=True))):
        by_number |= part
    return [by_number[at] for at in range(len(prompts))]


def _hands(prompts: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """The prompts of each rank by number; those that are equal in one hand."""
    same: dict[tuple[int, ...], list[int]] = {}
    for at, prompt in enumerate(prompts):
        same.setdefault(tuple(prompt), []).append(at)
    groups = list(same.values())
    # What a sequence costs beyond its prompt is not known before it is sampled: each counts alike.
    sizes = [sum(len(prompts[at]) for at in group) for group in groups]
    hands = process_group.partition_by_size(sizes, ranks)
    return [[at for group in hand for at in groups[group]] for hand in hands]


def score_sharded(
    items: Sequence[T],
    score: Callable[[Sequence[T]], Sequence[R]],
    *,
    stop_requested: Callable[[], bool],
) -> list[R]:
    """`score` of all items, in their order; each rank grades its share.

    Raises `Interrupted` on all ranks when a stop is asked for on one: what was not scored any more
    must not pass for a result.
    """
    scores: Sequence[R] = []
    with consensus.fail_together():
        mine = process_group.shard(items)
        scores = score(mine) if mine else []
    if process_group.any_rank(stop_requested()):
        raise Interrupted("stopped on a signal while scoring")
    return process_group.gather_shards(scores)
