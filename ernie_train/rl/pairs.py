"""Preference pairs of an RL stage: own completions, a file, or the starting policy."""

from __future__ import annotations

import numpy as np

from ernie_train.core import consensus
from ernie_train.core.errors import CheckpointError, UserError
from ernie_train.losses import PairCounts, choose_pairs
from ernie_train.rl.batch import PreferencePair
from ernie_train.rl.config import PreferenceConfig
from ernie_train.rl.preference_data import TokenizedPair
from ernie_train.rl.rollout import Rollout, RolloutSampler, read_rollout, write_rollout

OFFLINE_PAIRS = "offline_pairs.jsonl"


def best_worst_pairs(rollout: Rollout, margin: float) -> tuple[list[PreferencePair], PairCounts]:
    """Pair the best with the worst completion of each group whose rewards differ by the margin.

    Pairs are by place among the rollout's completions, group after group.
    """
    if not rollout.groups:
        return [], PairCounts()
    lengths = np.array([[c.num_sampled for c in group] for group in rollout.groups])
    found, counts = choose_pairs(rollout.rewards, rollout.valid, lengths, margin=margin)
    size = lengths.shape[1]
    pairs = [
        PreferencePair(p.prompt * size + p.chosen, p.prompt * size + p.rejected) for p in found
    ]
    return pairs, counts


def make_offline_pairs(
    sampler: RolloutSampler, preference: PreferenceConfig, *, is_new: bool
) -> list[TokenizedPair]:
    """Let the starting policy make pairs, once; they are kept in the stage's directory.

    `is_new`: the stage has not been begun. Raises `UserError` where no prompt gives a pair, and
    `CheckpointError` where the pairs that the stage began with are gone.
    """
    prompts = preference.offline.prompts if preference.offline else None
    if prompts is None:
        raise ValueError("offline pairs of the policy need offline.prompts")
    path = sampler.stage.directory / OFFLINE_PAIRS
    if not consensus.run_on_main(path.exists):
        if not is_new:
            raise CheckpointError(f"{path} is missing: the stage had begun with it")
        chosen = sampler.new_order().take(prompts, sampler.is_allowed)
        rollout = Rollout.of(sampler.sample(chosen, 0, 0), sampler.config.rollout)
        pairs, counts = best_worst_pairs(rollout, preference.margin)
        if not pairs:
            raise UserError(
                f"none of {prompts} prompts gave an offline pair ({counts.below_margin} below "
                "preference.margin): take more offline.prompts, or prompts of middling difficulty"
            )
        all_completions = rollout.completions()
        groups = [[all_completions[at] for at in pair] for pair in pairs]
        consensus.run_on_main(lambda: write_rollout(path, groups))
    # Also where they were just made: what is compared must not depend on when a run was stopped.
    kept = consensus.run_on_main(lambda: read_rollout(path))
    return [TokenizedPair(chosen, rejected) for chosen, rejected in kept]
