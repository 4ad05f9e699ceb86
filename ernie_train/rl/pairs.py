"""The pairs of an RL stage: of its own completions, from a file, or of its starting policy."""

from __future__ import annotations

import numpy as np

from ernie_train.core import consensus
from ernie_train.core.errors import CheckpointError, UserError
from ernie_train.data.mixing import permutation
from ernie_train.losses import PairCounts, choose_pairs
from ernie_train.rl.batch import Pairing, reward_table
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.data import PreparedPrompts
from ernie_train.rl.groups import GroupSource
from ernie_train.rl.rollout import Group, PromptOrder, read_rollout, write_rollout
from ernie_train.train.stage import StageRun

OFFLINE_PAIRS = "offline_pairs.jsonl"


def best_against_worst(groups: list[Group], margin: float) -> tuple[list[Pairing], PairCounts]:
    """A pair of each group whose rewards differ by the margin, and what became of the others."""
    if not groups:
        return [], PairCounts()
    rewards, valid = reward_table(groups, normalize=False)
    lengths = np.array([[len(s.completion_ids) for s in group] for group in groups])
    found, counts = choose_pairs(rewards, valid, lengths, margin=margin)
    return [(groups[p.prompt][p.chosen], groups[p.prompt][p.rejected]) for p in found], counts


class OfflineSource:
    """Deals out offline pairs, each epoch over them in another order."""

    def __init__(self, config: UpoConfig, seed: int, pairs: list[Pairing]) -> None:
        self.per_iteration = config.offline.per_iteration if config.offline else 0
        self.seed, self.all = seed, pairs
        for sample in (s for pair in pairs for s in pair):
            sample.trained = False  # they are compared, not reinforced

    def pairs(self, number: int) -> list[Pairing]:
        """The pairs of iteration `number`, counted from 1."""
        chosen, size = [], len(self.all)
        for at in range((number - 1) * self.per_iteration, number * self.per_iteration):
            order = permutation(size, self.seed, at // size, 7)
            chosen.append(self.all[int(order[at % size])])
        return chosen


def offline_source(
    config: UpoConfig, stage: StageRun, prepared: PreparedPrompts, groups: GroupSource, *, new: bool
) -> OfflineSource | None:
    """The stage's offline pairs; the starting policy makes them, once, if the recipe says so.

    `new` says that the stage has not been begun. Raises `UserError` where no prompt gives a pair,
    and `CheckpointError` where the pairs that the stage began with are gone.
    """
    settings, seed = config.offline, stage.data.seed
    if not config.uses_offline_pairs or settings is None:
        return None
    if settings.prompts is None:
        return OfflineSource(config, seed, prepared.offline)
    path = stage.directory / OFFLINE_PAIRS
    if not consensus.run_on_main(path.exists):
        if not new:
            raise CheckpointError(f"{path} is missing: the stage had begun with it")
        order = PromptOrder(prepared.sizes, prepared.weights, seed)
        sampled = groups.collector.collect(order.take(settings.prompts, groups.allowed), 0, 0)
        groups.settle(sampled)
        pairs, counts = best_against_worst(sampled, config.pair_margin)
        if not pairs:
            raise UserError(
                f"none of {settings.prompts} prompts gave an offline pair ({counts.below_margin} "
                "below pair_margin): take more offline.prompts, or prompts of middling difficulty"
            )
        consensus.run_on_main(lambda: write_rollout(path, [list(pair) for pair in pairs]))
    # Also where they were just made: what is compared must not depend on when a run was stopped.
    kept = consensus.run_on_main(lambda: read_rollout(path))
    return OfflineSource(config, seed, [(pair[0], pair[1]) for pair in kept])
