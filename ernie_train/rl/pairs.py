"""Preference pairs of an RL stage: own completions, the rows' solutions, a file.

Online pairs are of groups in which the policy gradient speaks; others are of groups in which it is
silent, since all their completions are wrong, or all are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_train.core import consensus
from ernie_train.core.errors import CheckpointError, UserError
from ernie_train.generate import SamplingConfig
from ernie_train.losses import PairCounts, choose_pairs
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.config import PreferenceConfig
from ernie_train.rl.preference_data import OfflinePairSource, TokenizedPair
from ernie_train.rl.report import pair_metrics
from ernie_train.rl.rollout import (
    Answer,
    PromptGroup,
    Rollout,
    RolloutSampler,
    ScoredCompletion,
    SecondReward,
    grade,
    read_rollout,
    write_rollout,
)

OFFLINE_PAIRS = "offline_pairs.jsonl"
_SHORTER = 0.9  # of the longest completion's tokens: pairs of nearly one length teach nothing
_REWARD_TOLERANCE = 1e-6  # as in choose_pairs


def best_worst_pairs(
    groups: Sequence[PromptGroup], rewards: Any, valid: Any, *, margin: float
) -> tuple[list[PromptGroup], PairCounts]:
    """Return best and worst completion of each group whose rewards differ by the margin; counts.

    rewards, valid [P,G] of the groups; see `choose_pairs`.
    """
    if not groups:
        return [], PairCounts()
    lengths = [[c.num_sampled for c in group] for group in groups]
    found, counts = choose_pairs(rewards, valid, lengths, margin=margin)
    return [[groups[p][chosen], groups[p][rejected]] for p, chosen, rejected in found], counts


def make_offline_pairs(
    sampler: RolloutSampler, prompts: int, margin: float, *, is_new: bool
) -> list[TokenizedPair]:
    """Let the starting policy make pairs, once; they are kept in the stage's directory.

    `is_new`: the stage has not been begun. Raises `UserError` where none of so many prompts gives a
    pair, and `CheckpointError` where the pairs that the stage began with are gone.
    """
    path = sampler.stage.directory / OFFLINE_PAIRS
    if not consensus.run_on_main(path.exists):
        if not is_new:
            raise CheckpointError(f"{path} is missing: the stage had begun with it")
        chosen = sampler.new_order().take(prompts, sampler.is_allowed)
        sampled = Rollout.of(sampler.sample(chosen, 0, 0), sampler.config.rollout)
        pairs, counts = best_worst_pairs(
            sampled.groups, sampled.rewards, sampled.valid, margin=margin
        )
        if not pairs:
            raise UserError(
                f"none of {prompts} prompts gave an offline pair ({counts.below_margin} below "
                "preference.margin): take more offline.prompts, or prompts of middling difficulty"
            )
        consensus.run_on_main(lambda: write_rollout(path, pairs))
    # Also where they were just made: what is compared must not depend on when a run was stopped.
    kept = consensus.run_on_main(lambda: read_rollout(path))
    return [TokenizedPair(chosen, rejected) for chosen, rejected in kept]


# ---- every source --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSources:
    """Finds the pairs of each iteration.

    `pair_reward` ranks online pairs in place of the stage's reward.
    """

    config: PreferenceConfig
    sampler: RolloutSampler
    offline: OfflinePairSource | None
    pair_reward: SecondReward | None

    def find(
        self, iteration: int, rollout: Rollout
    ) -> tuple[list[TokenizedPair], dict[str, float]]:
        """Return the pairs of an iteration, and how many each source of its rollout gave.

        Every rank must call it. Raises `Interrupted` when a stop is asked for.
        """
        pairs: list[TokenizedPair] = []
        metrics: dict[str, float] = {}
        for source in self.config.pairs:
            if source == "online":
                found, counts = self._online(iteration, rollout)
                metrics |= pair_metrics(counts)
            elif source == "offline":
                found = self.offline.take(iteration) if self.offline is not None else []
            elif source == "shorter":
                found = shorter_pairs(rollout)
                metrics["pairs/shorter"] = len(found)
            else:
                silent = all_wrong(rollout)
                better = (
                    self._solutions(silent) if source == "gold" else self._hinted(iteration, silent)
                )
                found = self._above(better, silent)
                metrics |= {f"pairs/{source}": len(found), "groups_all_wrong": len(silent)}
            pairs += found
        return pairs, metrics

    def _online(self, iteration: int, rollout: Rollout) -> tuple[list[TokenizedPair], PairCounts]:
        groups, rewards, valid = rollout.groups, rollout.rewards, rollout.valid
        if self.pair_reward is not None:
            first = (iteration - 1) * (self.sampler.config.rollout.prompts_per_iteration or 0)
            judged = self.pair_reward.places(first, len(groups))
            if not judged:
                return [], PairCounts()
            groups = [groups[at] for at in judged]
            scores = self.pair_reward.scores(groups)
            rewards = np.array([[one.value for one in row] for row in scores])
            valid = valid[judged] & [[one.score.trains for one in row] for row in scores]
        found, counts = best_worst_pairs(groups, rewards, valid, margin=self.config.margin)
        return [TokenizedPair(chosen, rejected) for chosen, rejected in found], counts

    # ---- groups that are all wrong ---------------------------------------------------------------

    def _solutions(self, silent: Sequence[_Wrong]) -> list[_Better]:
        """Return the rows' own solutions, as completions, with their rewards."""
        known = self.sampler.prepared.solutions
        answers = [(wrong.prompt, known[wrong.prompt]) for wrong in silent if wrong.prompt in known]
        return self._graded(answers)

    def _hinted(self, iteration: int, silent: Sequence[_Wrong]) -> list[_Better]:
        """Let the policy complete the beginnings of the rows' solutions."""
        sampler, hint, known = self.sampler, self.config.hint, self.sampler.prepared.solutions
        rollout, data = sampler.config.rollout, sampler.stage.data
        begun = []
        for prompt in dict.fromkeys(wrong.prompt for wrong in silent):
            if prompt in known and (size := int(len(known[prompt]) * hint.share)):
                begun += [(prompt, known[prompt][:size])] * hint.samples
        if not begun:
            return []
        limits = [rollout.max_new_tokens - len(given) for _, given in begun]
        seed = int(np.random.SeedSequence([data.seed, iteration, 0, 29]).generate_state(1)[0])
        sampler.engine.load_weights(sampler.stage.model, version=iteration)
        completions = sampler.engine.sample(
            [sampler.prepared.prompts[prompt].prompt_ids + given for prompt, given in begun],
            SamplingConfig(max(limits), rollout.temperature, rollout.top_p, rollout.top_k, seed),
            limits=limits,
            stop_requested=sampler.stage.stop_requested,
        )
        whole = [
            (prompt, given + completion.ids)
            for (prompt, given), completion in zip(begun, completions, strict=True)
            if completion.finished
        ]
        return self._graded(whole)

    def _graded(self, answers: Sequence[tuple[int, list[int]]]) -> list[_Better]:
        """Return finished completions, (prompt, token ids), with their rewards."""
        sampler = self.sampler
        prompts, tokenizer = sampler.prepared.prompts, sampler.stage.data.tokenizer
        texts = [Answer(at, tokenizer.decode(ids[:-1]), len(ids)) for at, ids in answers]
        scores = grade(sampler.reward, sampler.scorers, texts, prompts, sampler.stage)
        return [
            _Better(at, TokenizedCompletion(prompts[at].prompt_ids, ids), composed.value)
            for (at, ids), composed in zip(answers, scores, strict=True)
            if composed.score.trains
        ]

    def _above(self, better: Sequence[_Better], silent: Sequence[_Wrong]) -> list[TokenizedPair]:
        """Pair each group's best of `better` with the wrong completion nearest to it in length."""
        best: dict[int, _Better] = {}
        for one in better:
            if one.prompt not in best or one.reward > best[one.prompt].reward:
                best[one.prompt] = one
        pairs = []
        for group in silent:
            if (found := best.get(group.prompt)) is None:
                continue
            enough = found.reward - self.config.margin + _REWARD_TOLERANCE
            length = found.completion.num_sampled
            below = [
                c for c, r in zip(group.completions, group.rewards, strict=True) if r <= enough
            ]
            if below:
                nearest = min(below, key=lambda c: abs(c.num_sampled - length))
                pairs.append(TokenizedPair(found.completion, nearest))
        return pairs


@dataclass(frozen=True)
class _Wrong:
    """A group that is all wrong: its valid completions with their rewards."""

    prompt: int
    completions: list[ScoredCompletion]
    rewards: list[float]


@dataclass(frozen=True)
class _Better:
    """A completion that may be better than those of its prompt's group."""

    prompt: int
    completion: TokenizedCompletion
    reward: float


def all_wrong(rollout: Rollout) -> list[_Wrong]:
    """Return the groups without a correct completion, and with at least one that is wrong."""
    found = []
    for at, group in enumerate(rollout.groups):
        valid = np.flatnonzero(rollout.valid[at])
        if len(valid) and all(group[i].score.status == "wrong" for i in valid):
            rewards = [float(rollout.rewards[at, i]) for i in valid]
            found.append(_Wrong(group[0].prompt, [group[i] for i in valid], rewards))
    return found


def shorter_pairs(rollout: Rollout) -> list[TokenizedPair]:
    """Pair the shortest with the longest completion of each group whose completions are all right.

    Groups with a completion without a verdict, or cut off, give none, nor do those in which the
    shortest has more than 90 % of the longest one's tokens.
    """
    return [
        TokenizedPair(shortest, longest)
        for group in rollout.groups
        if all(c.finished and c.score.status == "correct" for c in group)
        for shortest, longest in [_by_length(group)]
        if shortest.num_sampled <= _SHORTER * longest.num_sampled
    ]


def _by_length(group: PromptGroup) -> tuple[ScoredCompletion, ScoredCompletion]:
    ordered = sorted(group, key=lambda c: c.num_sampled)
    return ordered[0], ordered[-1]
