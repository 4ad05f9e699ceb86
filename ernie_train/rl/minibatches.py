"""Deal an iteration's groups and pairs out into minibatches, one for each optimizer step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ernie_train.data.packing import permutation
from ernie_train.rl.batch import PreferencePair, RolloutBatch


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
