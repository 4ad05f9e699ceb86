"""Generate and score on all ranks: each takes a share of the same work and gets all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import Interrupted
from ernie_train.generate.engine import Completion, generate
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.parallel import Lockstep

# A group is dealt to several ranks where each may sample so many times as many tokens for it as its
# prompt has. A token takes at least twice as long to sample as one of a prompt to compute
# (SmolLM2-135M's shape at batch 32: 5.0 and 2.8 ms), so that, if completions are half as long as
# they may be, computing the prompt again adds up to a sixteenth.
_SAMPLED_PER_PROMPT = 16

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

    The completions of a prompt are dealt to several ranks where they may be long, as those of a
    hard prompt are, and a sequence has the same random numbers on any number of ranks. Raises
    `Interrupted` on all ranks when a stop is requested on one.
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
    most = [settings["max_new_tokens"]] * len(prompts) if limits is None else limits
    mine = _partition(prompts, most, ranks)[process_group.rank()]
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
    found = [by_prompt[i] for i in range(len(prompts))]
    share_prompt_experts(prompts, found)
    return found


def pieces_of(group_size: int, prompt_tokens: int, new_tokens: int, ranks: int) -> int:
    """Return the ranks over which a prompt's completions are dealt.

    new_tokens: the most of all of them. Each rank computes the prompt for itself.
    """
    worth = new_tokens // (_SAMPLED_PER_PROMPT * prompt_tokens)
    return max(1, min(worth, group_size, ranks))


def _partition(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], ranks: int
) -> list[list[int]]:
    """Return the prompt indices of each rank, balanced by the tokens that they may have."""
    equal: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(i)

    def tokens(members: Sequence[int]) -> int:
        return sum(len(prompts[i]) + limits[i] for i in members)

    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for group in sorted(equal.values(), key=tokens, reverse=True):
        new_tokens = sum(limits[i] for i in group)
        pieces = pieces_of(len(group), len(prompts[group[0]]), new_tokens, ranks)
        lightest = sorted(range(ranks), key=lambda rank: loads[rank])[:pieces]
        for first, rank in enumerate(lightest):
            parts[rank] += group[first::pieces]
            loads[rank] += tokens(group[first::pieces])
    return parts


def share_prompt_experts(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
) -> None:
    """Let equal prompts share the array of their experts where ranks chose the same ones."""
    first: dict[tuple[int, ...], np.ndarray] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        if (own := completion.prompt_expert_ids) is not None:
            known = first.setdefault(tuple(prompt), own)
            if known is not own and np.array_equal(known, own):
                completion.prompt_expert_ids = known


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
