"""Rollouts: groups of completions of prompts, sampled and scored.

A rollout can be written to a file and read from it instead of being sampled, which makes runs
comparable that differ in something else only. Shapes: P prompts, G completions of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, storage_errors
from ernie_train.core.foreign_files import open_regular, parse_json
from ernie_train.environments import Episode, EpisodeStart, Toolbox, play_episodes
from ernie_train.eval.prompts import problem_row
from ernie_train.generate import Completion, SamplingConfig, score_sharded
from ernie_train.generate.engines import Engine
from ernie_train.io.files import write_jsonl
from ernie_train.losses import varied_groups
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring import ComposedReward, ComposedScore
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.config import RolloutConfig, UpoConfig
from ernie_train.rl.data import (
    PreparedPrompts,
    Prompt,
    PromptOrder,
    SolvedPrompts,
    rollout_file,
)
from ernie_train.rl.reward import RewardModelScorer
from ernie_train.rl.routing import packed_experts, require_experts, unpacked_experts
from ernie_train.train.stage import StageRun

ROLLOUTS = "rollouts"


@dataclass(frozen=True)
class ScoredCompletion(TokenizedCompletion):
    """A completion of a prompt of the stage, with its verdict and what sampling knew of it.

    `raw_reward` is the sum of the reward's parts, without what the stage subtracts.
    """

    prompt: int  # index among the stage's prompts
    domain: str
    task: str
    text: str
    finished: bool
    score: Score
    raw_reward: float
    reward_parts: dict[str, float]
    turns: list[dict[str, Any]] | None = None  # and the results of tools; None without any
    sampled_logprobs: np.ndarray | None = None  # float32 [sampled tokens]


PromptGroup = Sequence[ScoredCompletion]


@dataclass(frozen=True)
class Rollout:
    """An iteration's groups with their rewards, and which of them the policy may learn from.

    rewards [P,G] is the raw reward less the penalty for length; marks [P,G] what the verifier alone
    gave; valid [P,G] says which completions have a verdict and are not masked; informative [P]
    which groups differ in the verifier's mark: a part that stands beside it, such as format, makes
    no group informative.
    """

    groups: list[PromptGroup]
    rewards: np.ndarray
    marks: np.ndarray
    valid: np.ndarray
    informative: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[PromptGroup], config: RolloutConfig) -> Rollout:
        """Judge groups once: penalties, masks, and which groups are worth an update."""
        shape = (len(groups), len(groups[0]) if groups else config.group_size)
        masks = config.truncated == "mask"
        flat = [c for group in groups for c in group]
        rewards = [
            c.raw_reward - config.length_penalty(c.num_sampled, finished=c.finished) for c in flat
        ]
        valid = [c.score.trains and not (masks and not c.finished) for c in flat]
        reward_table = np.array(rewards, np.float64).reshape(shape)
        marks = np.array([c.score.value for c in flat], np.float64).reshape(shape)
        valid_table = np.array(valid, bool).reshape(shape)
        if not groups:
            informative = np.zeros(0, bool)
        elif shape[1] == 1:
            informative = valid_table[:, 0]
        else:
            informative = np.asarray(varied_groups(marks, valid_table), bool)
        return cls(list(groups), reward_table, marks, valid_table, informative)

    def completions(self) -> list[ScoredCompletion]:
        """Return all completions, group after group."""
        return [completion for group in self.groups for completion in group]

    def trained(self, *, every_group: bool) -> np.ndarray:
        """Return which completions the policy learns from, bool [P,G].

        They are the valid ones of informative groups, or of `every_group`.
        """
        return self.valid & (self.informative[:, None] | every_group)


@dataclass
class RolloutSampler:
    """Samples and scores an iteration's groups: prompts in order, refills, curriculum, replay.

    `audit` judges some groups again, given how many came before; `seconds` adds up what sampling
    and scoring took since it was last cleared.
    """

    config: UpoConfig
    stage: StageRun
    prepared: PreparedPrompts
    reward: ComposedReward
    engine: Engine
    scorers: Mapping[str, RewardModelScorer] = field(default_factory=dict)
    audit: Callable[[Sequence[PromptGroup], int], list[PromptGroup]] | None = None
    toolbox: Toolbox | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        curriculum = self.config.curriculum
        self.level = curriculum.start if curriculum else None
        self.order = self.new_order()
        skip = self.config.rollout.skip_solved
        self.solved = SolvedPrompts(skip) if skip is not None else None
        self.passed: list[int] = []  # as solved, in the iteration
        self.clear_seconds()

    def clear_seconds(self) -> None:
        self.seconds = {"rollout_seconds": 0.0, "scoring_seconds": 0.0}
        if self.toolbox is not None:
            self.seconds["tool_seconds"] = 0.0

    def new_order(self) -> PromptOrder:
        """Return the stage's order of prompts, from its beginning."""
        return PromptOrder(self.prepared.sizes, self.prepared.weights, self.stage.data.seed)

    def rollout(self, iteration: int) -> Rollout:
        """Return the rollout of an iteration; without groups where the stage needs none."""
        config = self.config.rollout
        if not self.config.samples_each_iteration:
            return Rollout.of([], config)
        if config.replay is not None:
            path = rollout_file(self.stage.data.base_dir / config.replay, iteration)
            with consensus.fail_together():
                groups = _read_replay(path)
                self._require_experts(groups, str(path))
        else:
            groups = self._sample_until_informative(iteration)
            self._require_experts(groups, "the engine")
        if config.dump:
            with consensus.fail_together():
                if process_group.is_main():
                    path = rollout_file(self.stage.directory / ROLLOUTS, iteration)
                    write_rollout(path, groups)
        return Rollout.of(groups, config)

    def _require_experts(self, groups: Sequence[PromptGroup], source: str) -> None:
        if self.config.policy.router_replay:
            completions = (completion for group in groups for completion in group)
            require_experts(completions, self.stage.model, source)

    def _sample_until_informative(self, iteration: int) -> list[PromptGroup]:
        """Sample until enough groups are informative, at most `refill_rounds` rounds more."""
        config = self.config.rollout
        groups: list[PromptGroup] = []
        missing = config.prompts_per_iteration or 0
        self.passed = []
        for refill in range(config.refill_rounds + 1):
            chosen = self._next_prompts(missing, iteration)
            found = self.sample(chosen, iteration, refill)
            if self.audit is not None:
                asked = (iteration - 1) * (config.prompts_per_iteration or 0)
                found = self.audit(found, asked + len(groups))
            self._note_solved(found, iteration)
            groups += found
            missing -= int(Rollout.of(found, config).informative.sum())
            if missing == 0:
                break
        return groups

    def _next_prompts(self, count: int, iteration: int) -> list[int]:
        solved = self.solved
        if solved is None:
            return self.order.take(count, self.is_allowed)
        chosen = self.order.take(
            count, self.is_allowed, lambda prompt: solved.skips(prompt, iteration)
        )
        self.passed += self.order.passed
        return chosen

    def _note_solved(self, groups: Sequence[PromptGroup], iteration: int) -> None:
        if self.solved is None:
            return
        for group in groups:
            correct = [c.score.status == "correct" for c in group if c.score.trains]
            self.solved.note(group[0].prompt, correct, iteration)

    def solved_metrics(self, iteration: int) -> dict[str, float]:
        """Return how many prompts are skipped from now on, and were in this iteration."""
        if self.solved is None:
            return {}
        skipped = self.solved.count_skipped(range(len(self.prepared.prompts)), iteration + 1)
        return {
            "prompts/solved": skipped / len(self.prepared.prompts),
            "prompts/passed_over": len(self.passed),
        }

    def sample(self, chosen: Sequence[int], *key: int) -> list[PromptGroup]:
        """Sample and score `group_size` completions of each chosen prompt.

        key: the iteration, whose weights sample, and the round within it. The random numbers depend
            on it and on the stage's seed alone.

        Every rank must call it; each samples and scores a share, and all have the same groups then.
        Raises `Interrupted` when a stop is asked for.
        """
        size = self.config.rollout.group_size
        indices = [index for index in chosen for _ in range(size)]
        episodes = self._played(indices, key)
        started = time.perf_counter()
        scores = score_sharded(
            list(zip(indices, episodes, self._model_scores(indices, episodes), strict=True)),
            self._grade,
            stop_requested=lambda: self.stage.stop.requested,
        )
        self.reward.check_excluded([composed.score for composed in scores])
        self.seconds["scoring_seconds"] += time.perf_counter() - started
        scored = [self._scored(*item) for item in zip(indices, episodes, scores, strict=True)]
        return [scored[at : at + size] for at in range(0, len(scored), size)]

    def is_episode(self, prompt: Prompt) -> bool:
        """Return whether a prompt is answered in several turns, with tools."""
        return self.toolbox is not None and self.toolbox.serves(prompt.record)

    def _played(self, indices: Sequence[int], key: tuple[int, ...]) -> list[Episode]:
        prompts = [self.prepared.prompts[index] for index in indices]
        loading = time.perf_counter()
        self.engine.load_weights(self.stage.model, version=key[0])
        started = time.perf_counter()
        sampled_before = self.seconds["rollout_seconds"]
        episodes = play_episodes(
            [EpisodeStart(p.prompt_ids, p.record if self.is_episode(p) else None) for p in prompts],
            partial(self._sample_turn, key),
            self.stage.data.tokenizer,
            self.toolbox,
            max_new_tokens=self.config.rollout.max_new_tokens,
            stop_requested=lambda: self.stage.stop.requested,
        )
        if self.toolbox is not None:
            sampling = self.seconds["rollout_seconds"] - sampled_before
            self.seconds["tool_seconds"] += time.perf_counter() - started - sampling
        self.seconds["rollout_seconds"] += started - loading
        return episodes

    def _sample_turn(
        self,
        key: tuple[int, ...],
        prompts: Sequence[Sequence[int]],
        *,
        turn: int,
        episodes: Sequence[int],
        limits: Sequence[int],
    ) -> list[Completion]:
        started = time.perf_counter()
        config = self.config.rollout
        words = [self.stage.data.seed, *key, *([turn] if turn else [])]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        found = self.engine.sample(
            prompts,
            SamplingConfig(max(limits), config.temperature, config.top_p, config.top_k, seed),
            sequence_ids=episodes,
            limits=limits,
            stop_requested=lambda: self.stage.stop.requested,
        )
        self.seconds["rollout_seconds"] += time.perf_counter() - started
        return found

    def _model_scores(
        self, indices: Sequence[int], episodes: Sequence[Episode]
    ) -> list[dict[str, Score]]:
        """Return what reward models say of each last turn, by the label of their part."""
        records = [self.prepared.prompts[index].record for index in indices]
        rows = [problem_row(record, self.stage.data.tokenizer) for record in records]
        texts = [episode.text for episode in episodes]
        found: list[dict[str, Score]] = [{} for _ in texts]
        for label, scorer in self.scorers.items():
            scores = scorer.score(
                records, rows, texts, stop_requested=lambda: self.stage.stop.requested
            )
            for own, score in zip(found, scores, strict=True):
                own[label] = score
        return found

    def _scored(self, index: int, episode: Episode, composed: ComposedScore) -> ScoredCompletion:
        prompt = self.prepared.prompts[index]
        return ScoredCompletion(
            prompt_ids=prompt.prompt_ids,
            completion_ids=episode.completion_ids,
            sampled_mask=episode.sampled_mask,
            prompt=index,
            domain=prompt.domain,
            task=prompt.task,
            text=episode.text,
            finished=episode.finished,
            score=composed.score,
            raw_reward=composed.value,
            reward_parts=composed.parts,
            turns=episode.messages if self.is_episode(prompt) else None,
            sampled_logprobs=np.array(episode.logprobs, np.float32),
            expert_ids=episode.expert_ids,
            prompt_expert_ids=episode.prompt_expert_ids,
        )

    def _grade(
        self, items: Sequence[tuple[int, Episode, Mapping[str, Score]]]
    ) -> Sequence[ComposedScore]:
        prompts: list[Prompt] = [self.prepared.prompts[index] for index, _, _ in items]
        return self.reward.score_batch(
            [problem_row(prompt.record, self.stage.data.tokenizer) for prompt in prompts],
            [episode.text for _, episode, _ in items],
            [len(episode.logprobs) for _, episode, _ in items],
            of_models={label: [found[label] for _, _, found in items] for label in self.scorers},
            whole=False,
            stop_requested=lambda: self.stage.stop.requested,
        ).scores

    # ---- curriculum ------------------------------------------------------------------------------

    def is_allowed(self, prompt: int) -> bool:
        """Return whether the curriculum has reached a prompt's difficulty."""
        return self.level is None or self.prepared.prompts[prompt].difficulty <= self.level

    def raise_level(self, rollout: Rollout) -> None:
        """Raise the difficulty when the policy solves enough of the hardest prompts.

        Those that were passed over as solved count as solved.
        """
        if self.level is None or self.config.curriculum is None:
            return
        prompts = self.prepared.prompts
        hardest = [
            c.score.status == "correct"
            for c in rollout.completions()
            if c.score.trains and prompts[c.prompt].difficulty == self.level
        ]
        passed = sum(prompts[prompt].difficulty == self.level for prompt in self.passed)
        hardest += [True] * (passed * self.config.rollout.group_size)
        if hardest and np.mean(hardest) >= self.config.curriculum.raise_at:
            harder = {p.difficulty for p in prompts if p.difficulty > self.level}
            self.level = min(harder, default=self.level)

    def state_dict(self) -> dict[str, Any]:
        solved = {"solved": self.solved.state_dict()} if self.solved is not None else {}
        return {"order": self.order.state_dict(), "level": self.level, **solved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.level = state["level"]
        if self.solved is not None:
            self.solved.load_state_dict(state.get("solved", {}))


# ---- files ---------------------------------------------------------------------------------------


def write_rollout(path: Path, groups: Sequence[PromptGroup]) -> None:
    """Write groups as JSON lines, one a completion; logprobs keep their bits."""
    rows = []
    for number, group in enumerate(groups):
        for c in group:
            row = {
                "group": number, "prompt": c.prompt, "prompt_ids": c.prompt_ids,
                "completion_ids": c.completion_ids, "sampled_mask": c.sampled_mask,
                "turns": c.turns,
                "domain": c.domain, "task": c.task,
                "text": c.text, "finished": c.finished, "raw_reward": c.raw_reward,
                "reward_parts": c.reward_parts,
                "score": [c.score.value, c.score.status, c.score.detail],
                "logprobs": None if c.sampled_logprobs is None
                else [float(x) for x in c.sampled_logprobs],
            }  # fmt: skip
            if c.expert_ids is not None and c.prompt_expert_ids is not None:
                row |= packed_experts(c.prompt_expert_ids, c.expert_ids)
            rows.append(row)
    with storage_errors("cannot write the rollout", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def read_rollout(path: Path) -> list[PromptGroup]:
    """Read the groups of a file of `write_rollout`; `CheckpointError` for anything else."""
    groups: dict[int, list[ScoredCompletion]] = {}
    try:
        with open_regular(path) as stream:
            for line in stream:
                row = parse_json(line)
                groups.setdefault(row["group"], []).append(_read_completion(row))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a rollout that can be replayed: {error}") from None
    return [groups[number] for number in sorted(groups)]


def _read_completion(row: dict[str, Any]) -> ScoredCompletion:
    logprobs = row["logprobs"]
    names = (
        "prompt_ids", "completion_ids", "prompt", "domain", "task", "text", "finished",
        "raw_reward", "reward_parts",
    )  # fmt: skip
    read = ScoredCompletion(
        **{name: row[name] for name in names},
        sampled_mask=row.get("sampled_mask"),  # version 0.1.0 writes none, nor turns
        turns=row.get("turns"),
        score=Score(*row["score"]),
        sampled_logprobs=None if logprobs is None else np.array(logprobs, np.float32),
    )
    if "experts" in row:
        prompt, sampled = unpacked_experts(row, len(read.prompt_ids) - 1, read.num_sampled)
        read = replace(read, prompt_expert_ids=prompt, expert_ids=sampled)
    if logprobs is not None and len(logprobs) != read.num_sampled:
        raise ValueError(f"{len(logprobs)} logprobs for {read.num_sampled} sampled tokens")
    return read


def _read_replay(path: Path) -> list[PromptGroup]:
    """Read groups to train on; `CheckpointError` where nothing tells which policy sampled them."""
    groups = read_rollout(path)
    if any(c.sampled_logprobs is None for group in groups for c in group):
        raise CheckpointError(
            f"{path}: a completion has no logprobs, so that a replay cannot tell whether this "
            "policy sampled it or another one; dump rollouts of a sampler that gives them"
        )
    return groups
