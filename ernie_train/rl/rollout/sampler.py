"""Sampling of an iteration's groups: prompts in order, refills, curriculum, replay."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core import consensus
from ernie_train.core.errors import CheckpointError
from ernie_train.environments import Episode, EpisodeStart, Toolbox, play_episodes
from ernie_train.generate import Completion, SamplingConfig
from ernie_train.generate.engines import Engine
from ernie_train.rewards.scoring import ComposedReward, ComposedScore
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.data import PreparedPrompts, Prompt, rollout_file
from ernie_train.rl.reward import RewardModelScorer
from ernie_train.rl.rollout.files import read_replay, write_rollout
from ernie_train.rl.rollout.grading import Answer, grade
from ernie_train.rl.rollout.prompt_order import PromptOrder, SolvedPrompts
from ernie_train.rl.rollout.records import PromptGroup, Rollout, ScoredCompletion
from ernie_train.rl.routing import require_experts
from ernie_train.train.stage import StageRun

ROLLOUTS = "rollouts"


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
                groups = read_replay(path)
                self._require_prompts(groups, path)
                self._require_experts(groups, str(path))
        else:
            groups = self._sample_until_informative(iteration)
            self._require_experts(groups, "the engine")
        if config.dump:
            path = rollout_file(self.stage.directory / ROLLOUTS, iteration)
            consensus.run_on_main(lambda: write_rollout(path, groups))
        return Rollout.of(groups, config)

    def _require_prompts(self, groups: Sequence[PromptGroup], path: Path) -> None:
        """Refuse a replay of other prompts than the stage has by number, or of other groups."""
        prompts, size = self.prepared.prompts, self.config.rollout.group_size
        for group in groups:
            if len(group) != size:
                raise CheckpointError(
                    f"{path}: a group of {len(group)} completions, though "
                    f"rollout.group_size={size}: give that of the recipe that sampled them"
                )
            for c in group:
                known = 0 <= c.prompt < len(prompts)
                if not known or prompts[c.prompt].prompt_ids != c.prompt_ids:
                    raise CheckpointError(
                        f"{path}: its prompt {c.prompt} is not that of this stage: a replay needs "
                        "the data, the lengths and the chat format that it was sampled with"
                    )

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
        answers = [
            Answer(index, episode.text, len(episode.logprobs))
            for index, episode in zip(indices, episodes, strict=True)
        ]
        scores = grade(self.reward, self.scorers, answers, self.prepared.prompts, self.stage)
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
            stop_requested=self.stage.stop_requested,
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
            stop_requested=self.stage.stop_requested,
        )
        self.seconds["rollout_seconds"] += time.perf_counter() - started
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
        return {
            "order": self.order.state_dict(), "level": self.level, "passed": self.passed, **solved,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.level, self.passed = state["level"], list(state.get("passed", []))
        if self.solved is not None:
            self.solved.load_state_dict(state.get("solved", {}))
