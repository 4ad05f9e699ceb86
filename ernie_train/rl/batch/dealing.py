"""Deal sequences and pairs out: into minibatches of a step each, and those into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ernie_train.data.packing import permutation
from ernie_train.rl.batch.sequences import (
    MicroBatch,
    PreferencePair,
    RolloutBatch,
    TokenArrays,
    TokenizedCompletion,
    length_order,
)


class Minibatch(NamedTuple):
    """The trained sequences, by index, and the pairs of one optimizer step."""

    trained: list[int]
    pairs: list[PreferencePair]


def minibatches(
    batch: RolloutBatch, count: int, *key: int, train_groups: bool = True
) -> list[Minibatch]:
    """Deal groups and pairs out into `count` minibatches, groups in an order that `key` gives.

    Groups without a trained completion or a pair are left out. A pair of a group's completions goes
    where its group goes; pairs of others in turn. Without `train_groups` only pairs are learnt
    from. Empty minibatches are left out.
    """
    places = [
        *filter(batch.is_trained, range(batch.num_in_groups)),
        *map(min, batch.pairs),  # a solution stands behind the groups, its partner in one
    ]
    teaching = np.unique([p // batch.group_size for p in places if p < batch.num_in_groups])
    order = teaching[permutation(len(teaching), *key)]
    group_home: dict[int, int] = {}
    found = [Minibatch([], []) for _ in range(count)]
    for home, groups in enumerate(np.array_split(order, count)):
        for group in groups:
            first = int(group) * batch.group_size
            members = range(first, first + batch.group_size)
            if train_groups:
                found[home].trained.extend(index for index in members if batch.is_trained(index))
            group_home[int(group)] = home
    unassigned = 0
    for pair in batch.pairs:
        if min(pair) < batch.num_in_groups:
            found[group_home[min(pair) // batch.group_size]].pairs.append(pair)
        else:
            found[unassigned % count].pairs.append(pair)
            unassigned += 1
    return [minibatch for minibatch in found if minibatch.trained or minibatch.pairs]


def fill_micro_batches(
    units: Sequence[Sequence[int]],
    sequences: Sequence[TokenizedCompletion],
    batch_size: int,
    batch_tokens: int | None,
    *,
    share_prompts: bool,
) -> Iterator[list[int]]:
    """Yield the units of each micro-batch, by number: as many, in order, as fit.

    A unit is the indices of sequences that stay together. At most `batch_size` sequences and
    `batch_tokens` tokens (None: any number) go through the model together; what is larger alone
    goes alone.
    """
    known: dict[tuple[int, ...], int] = {}  # a number for each different prompt
    prompts = [known.setdefault(tuple(s.prompt_ids), len(known)) for s in sequences]
    held: list[int] = []
    rows, tokens, computed = 0, 0, set[int]()  # of what is held; the prompts among it
    for number, unit in enumerate(units):
        completions = sum(len(sequences[index].completion_ids) - 1 for index in unit)
        lengths = [(prompts[index], len(sequences[index].prompt_ids)) for index in unit]
        if share_prompts:
            lengths = list(dict(lengths).items())
        more = completions + sum(size for prompt, size in lengths if prompt not in computed)
        fits = batch_tokens is None or tokens + more <= batch_tokens
        if held and not (fits and rows + len(unit) <= batch_size):
            yield held
            held, rows, tokens, computed = [], 0, 0, set()
            more = completions + sum(size for _, size in lengths)
        held.append(number)
        rows, tokens = rows + len(unit), tokens + more
        if share_prompts:
            computed.update(prompt for prompt, _ in lengths)
    if held:
        yield held


class _Member(NamedTuple):
    """A sequence on its way into a micro-batch; a copy is compared, not trained again."""

    sequence: int
    is_copy: bool


def micro_batches(
    batch: RolloutBatch,
    trained: Sequence[int],
    pairs: Sequence[PreferencePair],
    batch_size: int,
    batch_tokens: int | None = None,
) -> list[MicroBatch]:
    """Put sequences and pairs into micro-batches of at most so many sequences and tokens.

    `trained` are indices of sequences. The two of a pair go into the same micro-batch, whether
    among them or not; each sequence goes through the model once, unless it is in several pairs:
    then it comes again, to be compared only. Similar lengths go together.
    """
    placed: set[int] = set()
    units: list[tuple[list[_Member], list[PreferencePair]]] = []
    for pair in pairs:
        units.append(([_Member(index, index in placed) for index in pair], [PreferencePair(0, 1)]))
        placed |= set(pair)
    units += [([_Member(index, False)], []) for index in trained if index not in placed]
    key = length_order(batch.sequences, share_prompts=batch.share_prompts)
    units.sort(key=lambda u: max(key(m.sequence) for m in u[0]))
    indices = [[m.sequence for m in unit] for unit, _ in units]
    found: list[MicroBatch] = []
    for numbers in fill_micro_batches(
        indices, batch.sequences, batch_size, batch_tokens, share_prompts=batch.share_prompts
    ):
        members: list[_Member] = []
        held: list[PreferencePair] = []
        for unit, unit_pairs in (units[number] for number in numbers):
            held += [PreferencePair(a + len(members), b + len(members)) for a, b in unit_pairs]
            members += unit
        found.append(_micro_batch(batch, members, held))
    return found


def _micro_batch(
    batch: RolloutBatch, members: Sequence[_Member], pairs: Sequence[PreferencePair]
) -> MicroBatch:
    sequences = tuple(batch.sequences[m.sequence] for m in members)

    def gather(arrays: TokenArrays, *, for_copies: bool = False) -> np.ndarray | None:
        """Join the arrays of the members to one [N]; zeros for a member without one, or a copy."""
        if not arrays:
            return None
        parts = []
        for m, sequence in zip(members, sequences, strict=True):
            known = m.sequence < len(arrays) and (for_copies or not m.is_copy)
            array = arrays[m.sequence] if known else None
            parts.append(np.zeros(sequence.num_sampled, np.float32) if array is None else array)
        return np.concatenate(parts).astype(np.float32)

    return MicroBatch(
        sequences,
        tuple(not m.is_copy and batch.is_trained(m.sequence) for m in members),
        tuple(pairs),
        old_logprobs=gather(batch.old_logprobs),
        ref_logprobs=gather(batch.ref_logprobs, for_copies=True),
        pair_ref_logprobs=gather(batch.pair_ref_logprobs, for_copies=True),
        advantages=gather(batch.advantages),
        values=gather(batch.values),
        returns=gather(batch.returns),
        sampler_weights=gather(batch.sampler_weights),
        share_prompts=batch.share_prompts,
    )
