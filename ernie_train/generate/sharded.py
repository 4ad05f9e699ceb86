"""Generate and score on all ranks: each takes a share of the same work and gets all results."""

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
    sequence_ids: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    **settings: Any,
) -> list[Completion]:
    """Run `generate` with `settings` on all ranks, each for a part of the prompts.

    Equal prompts stay on one rank, and a sequence has the same random numbers on any number of
    ranks. Raises `Interrupted` on all ranks when a stop is requested on one.
    """
    ranks = process_group.world_size()
    if ranks == 1:
        return generate(
            model,
            prompts,
            sequence_ids=sequence_ids,
            limits=limits,
            stop_requested=stop_requested,
            on_progress=on_progress,
            **settings,
        )
    mine = _partition(prompts, ranks)[process_group.rank()]
    with Lockstep(model, stop_requested) as lockstep:
        completions = generate(
            model,
            [prompts[i] for i in mine],
            sequence_ids=mine if sequence_ids is None else [sequence_ids[i] for i in mine],
            limits=None if limits is None else [limits[i] for i in mine],
            stop_requested=lockstep.next_pass,  # called once before each forward pass
            on_progress=lambda done: on_progress(min(len(prompts), done * ranks)),
            **settings,
        )
    by_prompt: dict[int, Completion] = {}
    for part in process_group.all_gather_objects(dict(zip(mine, completions, strict=True))):
        by_prompt |= part
    return [by_prompt[i] for i in range(len(prompts))]


def _partition(prompts: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """Return the prompt indices of each rank, balanced by prompt tokens."""
    equal: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(i)
    groups = list(equal.values())
    # The length of a completion is not known before it is sampled, so all count alike.
    sizes = [sum(len(prompts[i]) for i in group) for group in groups]
    parts = process_group.partition_by_size(sizes, ranks)
    return [[i for group in part for i in groups[group]] for part in parts]


def score_sharded(
    items: Sequence[T],
    score: Callable[[Sequence[T]], Sequence[R]],
    *,
    stop_requested: Callable[[], bool],
) -> list[R]:
    """Apply `score` to all items, each rank to its share; return the scores in item order.

    Raises `Interrupted` on all ranks when a stop is requested on one: scores of items that were
    skipped after it must not be taken for results.
    """
    scores: Sequence[R] = []
    with consensus.fail_together():
        mine = process_group.shard(items)
        scores = score(mine) if mine else []
    if process_group.any_rank(stop_requested()):
        raise Interrupted("stopped on a signal while scoring")
    return process_group.gather_shards(scores)
