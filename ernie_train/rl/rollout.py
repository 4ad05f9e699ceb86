"""Rollouts: prompts in order, completions sampled in groups, their rewards.

A rollout can be written to a file and taken from it instead of being sampled, which makes runs
comparable that differ in something else only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import CheckpointError, ConfigError, DataError, storage_errors
from ernie_train.data import Record, Tokenizer
from ernie_train.data.mixing import epoch_order
from ernie_train.eval.prompts import completion_text, encode_prompt, problem_row
from ernie_train.generate.engine import Completion
from ernie_train.generate.sharded import generate_sharded, score_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring import ComposedReward, ComposedScore


@dataclass(frozen=True)
class Problem:
    """A prompt with what its verifier needs."""

    record: Record
    prompt_ids: list[int]
    domain: str
    task: str
    difficulty: int


@dataclass
class Sample:
    """One completion of a problem, and what is known about its tokens.

    The arrays have one entry for each token of `completion_ids`; those that are None have not been
    computed. `trained` says whether the policy learns from the tokens.
    """

    problem: int
    prompt_ids: list[int]
    completion_ids: list[int]
    domain: str = ""
    task: str = ""
    text: str = ""
    finished: bool = True
    score: Score = field(default_factory=Score.correct)
    value: float = 0.0  # what the reward's parts add up to
    reward: float = 0.0  # the value less what the stage subtracts
    parts: dict[str, float] = field(default_factory=dict)
    sampled_logprobs: np.ndarray | None = None
    expert_ids: np.ndarray | None = None  # [tokens, MoE layers, K], as sampled
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    values: np.ndarray | None = None
    advantages: np.ndarray | None = None
    returns: np.ndarray | None = None
    trained: bool = True


Group = list[Sample]


class PromptOrder:
    """Problems without end, each epoch in another order; resumable at every problem."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes, self._weights, self._seed = list(sizes), list(weights), seed
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._epoch = self._position = 0

    def take(self, count: int, allowed: Callable[[int], bool]) -> list[int]:
        """The next `count` problems that `allowed` lets through, by their number over all sources.

        Raises `ConfigError` where a whole epoch holds none.
        """
        taken: list[int] = []
        seen = 0
        while len(taken) < count:
            sources, rows = epoch_order(self._sizes, self._weights, self._seed, self._epoch)
            while self._position < len(sources) and len(taken) < count:
                at = int(self._first[sources[self._position]] + rows[self._position])
                self._position += 1
                seen += 1
                if allowed(at):
                    taken.append(at)
            if self._position == len(sources):
                self._epoch, self._position = self._epoch + 1, 0
                if not taken and seen >= len(sources):
                    raise ConfigError("no prompt is left to sample from: check data and curriculum")
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position = int(state["epoch"]), int(state["position"])


@dataclass(frozen=True)
class SamplingSettings:
    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    batch_size: int


class Collector:
    """Samples and scores groups of completions. `seconds` adds up what each part took."""

    def __init__(
        self,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        problems: Sequence[Problem],
        reward: ComposedReward | None,
        settings: SamplingSettings,
        *,
        seed: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.tokenizer, self.problems = model, tokenizer, problems
        self.reward, self.settings, self.seed = reward, settings, seed
        self.stop_requested = stop_requested
        self.seconds = {"rollout_seconds": 0.0, "scoring_seconds": 0.0}

    def collect(self, chosen: Sequence[int], *key: int) -> list[Group]:
        """`group_size` completions of each chosen problem, scored.

        The random numbers depend on the stage's seed and on `key` alone. Every rank must call it;
        each samples and scores a share, and all have the same groups then. Raises `Interrupted`
        when a stop is asked for.
        """
        started = time.perf_counter()
        size = self.settings.group_size
        owners = [index for index in chosen for _ in range(size)]
        completions = generate_sharded(
            self.model,
            [self.problems[index].prompt_ids for index in owners],
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            top_k=self.settings.top_k,
            seed=int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0]),
            eos_token_id=self.tokenizer.stop_token_ids,
            batch_size=self.settings.batch_size,
            stop_requested=self.stop_requested,
            record_experts=True,
        )
        sampled = time.perf_counter()
        samples = [self._sample(i, c) for i, c in zip(owners, completions, strict=True)]
        self._score(samples)
        self.seconds["rollout_seconds"] += sampled - started
        self.seconds["scoring_seconds"] += time.perf_counter() - sampled
        return [samples[at : at + size] for at in range(0, len(samples), size)]

    def _sample(self, index: int, completion: Completion) -> Sample:
        problem = self.problems[index]
        return Sample(
            problem=index,
            prompt_ids=problem.prompt_ids,
            completion_ids=completion.ids,
            domain=problem.domain,
            task=problem.task,
            text=completion_text(self.tokenizer, completion),
            finished=completion.finished,
            sampled_logprobs=np.array(completion.logprobs, np.float32),
            expert_ids=completion.expert_ids,
        )

    def _score(self, samples: Sequence[Sample]) -> None:
        reward = self.reward
        if reward is None:
            raise ValueError("completions are to be scored without a reward")
        scored = score_sharded(
            samples, lambda mine: self._graded(reward, mine), stop_requested=self.stop_requested
        )
        reward.check_excluded([composed.score for composed in scored])
        for sample, composed in zip(samples, scored, strict=True):
            sample.score, sample.parts = composed.score, composed.parts
            sample.value = sample.reward = composed.value

    def _graded(self, reward: ComposedReward, samples: Sequence[Sample]) -> list[ComposedScore]:
        return reward.score_batch(
            [problem_row(self.problems[s.problem].record, thinking=True) for s in samples],
            [s.text for s in samples],
            [len(s.completion_ids) for s in samples],
            whole=False,
            stop_requested=self.stop_requested,
        ).scores


def encode_problems(
    records: Sequence[Record], tokenizer: Tokenizer, *, longest: int
) -> tuple[list[Problem], int]:
    """Problems whose prompts have at most `longest` tokens, and how many were longer."""
    problems, dropped = [], 0
    for record in records:
        ids = encode_prompt(tokenizer, record, thinking=True)
        if len(ids) > longest:
            dropped += 1
            continue
        fields = record.fields
        difficulty = fields.get("difficulty", 1)
        if not isinstance(difficulty, int) or isinstance(difficulty, bool):
            raise DataError(f"{record.source}: difficulty must be a whole number: {difficulty!r}")
        problems.append(
            Problem(record, ids, str(fields["domain"]), str(fields["task"]), difficulty)
        )
    return problems, dropped


# ---- files ---------------------------------------------------------------------------------------


def rollout_file(directory: Path, number: int) -> Path:
    """Where the rollout of iteration `number` lies."""
    return directory / f"{number:06d}.jsonl"


def write_rollout(path: Path, groups: Sequence[Group]) -> None:
    """Writes groups as JSON lines, one a completion; logprobs keep their bits."""
    lines = []
    for number, group in enumerate(groups):
        for s in group:
            row = {
                "group": number, "problem": s.problem, "prompt_ids": s.prompt_ids,
                "completion_ids": s.completion_ids, "domain": s.domain, "task": s.task,
                "text": s.text, "finished": s.finished, "value": s.value, "parts": s.parts,
                "score": [s.score.value, s.score.status, s.score.detail],
                "logprobs": None if s.sampled_logprobs is None
                else [float(x) for x in s.sampled_logprobs],
            }  # fmt: skip
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors("cannot write the rollout", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(path)


def read_rollout(path: Path) -> list[Group]:
    """The groups of a file of `write_rollout`; `CheckpointError` for anything else."""
    groups: dict[int, Group] = {}
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                groups.setdefault(row["group"], []).append(_read_sample(row))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a rollout that can be replayed: {error}") from None
    return [groups[number] for number in sorted(groups)]


def _read_sample(row: dict[str, Any]) -> Sample:
    logprobs = row["logprobs"]
    return Sample(
        problem=row["problem"],
        prompt_ids=row["prompt_ids"],
        completion_ids=row["completion_ids"],
        domain=row["domain"],
        task=row["task"],
        text=row["text"],
        finished=row["finished"],
        score=Score(*row["score"]),
        value=row["value"],
        reward=row["value"],
        parts=row["parts"],
        sampled_logprobs=None if logprobs is None else np.array(logprobs, np.float32),
    )
