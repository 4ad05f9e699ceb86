"""Evaluation on held-out problems: complete them, score them, report by task and domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ernie_train.data import Record, Tokenizer, require_chat_template
from ernie_train.data.completion_format import parse_completion
from ernie_train.environments import Episode, EpisodeStart, Toolbox, play_episodes
from ernie_train.eval.estimates import Estimate, estimates
from ernie_train.eval.prompts import (
    FewShot,
    encode_problems,
    is_episode,
    problem_row,
    user_prompt,
)
from ernie_train.generate.engine import Completion
from ernie_train.generate.engines import Engine
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.generate.sharded import generate_sharded, score_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rewards import Score, score_batch
from ernie_train.rewards.registry import ANSWER_FORMS, answer_form

# Shows that of so many problems more are completed, as often as it is told.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
MAX_NEW_TOKENS = 1024  # by default: with fewer, nearly every answer of a reasoning model is cut


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation: `samples` completions per problem, greedy at temperature 0.

    max_new_tokens: every prompt must leave room for them; None takes MAX_NEW_TOKENS, or what the
        model's context leaves to a prompt.
    k: the sizes for which pass@k is estimated; 1 and `samples` if it is empty.
    """

    max_new_tokens: int | None = None
    batch_size: int = 256
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    k: tuple[int, ...] = ()

    @property
    def ks(self) -> list[int]:
        return sorted(set(self.k or (1, self.samples)))

    @property
    def most_new_tokens(self) -> int:
        return MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class TaskResult:
    """Result of one task.

    `accuracy` is over the completions that could be scored; `excluded` counts the others by status.
    `estimates` holds pass@k and maj@n over all problems, in which those others count as wrong.
    """

    domain: str
    task: str
    problems: int
    accuracy: float  # of single completions
    pass_at_k: float  # share of problems with a correct one among `samples`
    baseline: float | None  # accuracy of always giving the most frequent `answer`, if rows have one
    truncated: float  # share of completions without a stop token
    excluded: dict[str, int]
    completions: int = 0
    unclosed: int = 0  # completions without an end of the thinking part: they are never right
    episodes: int = 0  # completions that could call tools
    estimates: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Results by task, and the samples behind them."""

    tasks: list[TaskResult]
    samples: list[dict[str, Any]]  # a row per completion: prompt, completion, score

    def domains(self) -> dict[str, tuple[float, float | None]]:
        """Return domain -> mean accuracy over its tasks, and mean baseline of those that have one.

        The baseline is None where no task has one.
        """
        grouped: dict[str, list[TaskResult]] = {}
        for task in self.tasks:
            grouped.setdefault(task.domain, []).append(task)
        found: dict[str, tuple[float, float | None]] = {}
        for domain, tasks in grouped.items():
            baselines = [task.baseline for task in tasks if task.baseline is not None]
            found[domain] = (
                sum(task.accuracy for task in tasks) / len(tasks),
                sum(baselines) / len(baselines) if baselines else None,
            )
        return found

    @property
    def mean_accuracy(self) -> float:
        """Return the unweighted mean over tasks."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        domains = {d: {"accuracy": a, "baseline": b} for d, (a, b) in self.domains().items()}
        return {
            "mean_accuracy": self.mean_accuracy,
            "domains": domains,
            "tasks": [asdict(task) for task in self.tasks],
        }


def evaluate(
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[Record],
    config: EvalConfig,
    *,
    progress: Progress | None = None,
    few_shot: FewShot | None = None,
    toolbox: Toolbox | None = None,
    engine: Engine | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Complete every problem and score the completions with the problems' own verifiers.

    With `few_shot` worked examples stand before each problem; with a `toolbox` problems are
    episodes, in which its tools may be called. An `engine`, which has loaded the model, samples in
    its place. `progress` shows how many problems are completed. Every rank must call it; each does
    a share of the work and returns the whole result. Raises `Interrupted` when asked to stop.
    """
    positions = model.config.max_position_embeddings
    problems = [toolbox.offer(problem) if toolbox else problem for problem in problems]
    prompts = encode_problems(
        tokenizer, problems, positions - (config.max_new_tokens or 1), few_shot
    )
    starts = [
        EpisodeStart(
            ids,
            record if toolbox and toolbox.serves(record) else None,
            min(config.most_new_tokens, positions - len(ids)),
        )
        for ids, record in zip(prompts, problems, strict=True)
        for _ in range(config.samples)
    ]
    with progress(len(starts)) if progress else nullcontext(_ignore) as update:
        episodes = _played(
            model, tokenizer, starts, config, toolbox=toolbox, engine=engine, update=update,
            stop_requested=stop_requested,
        )  # fmt: skip
    owners = [record for record in problems for _ in range(config.samples)]
    graded = [
        (str(record.fields["reward"]), problem_row(record, tokenizer), episode.text)
        for record, episode in zip(owners, episodes, strict=True)
    ]
    scores = score_sharded(
        graded,
        lambda items: score_batch(items, stop_requested=stop_requested),
        stop_requested=stop_requested,
    )
    answers = [answer_form(*one) if one[0] in ANSWER_FORMS else None for one in graded]
    offered = [toolbox is not None and is_episode(toolbox, record) for record in owners]
    rows = list(map(_Row, owners, episodes, scores, answers, offered))
    tasks: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        tasks.setdefault((row.record.fields["domain"], row.record.fields["task"]), []).append(row)
    thinking = require_chat_template(tokenizer).opens_thinking
    results = [_task_result(*key, tasks[key], config, thinking) for key in sorted(tasks)]
    return Evaluation(results, list(map(_sample, rows)))


def _played(
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    starts: Sequence[EpisodeStart],
    config: EvalConfig,
    *,
    toolbox: Toolbox | None,
    engine: Engine | None,
    update: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> list[Episode]:
    def sample(
        prompts: Sequence[Sequence[int]],
        *,
        turn: int,
        episodes: Sequence[int],
        limits: Sequence[int],
    ) -> list[Completion]:
        seeds = np.random.SeedSequence([config.seed, turn])
        seed = int(seeds.generate_state(1)[0]) if turn else config.seed
        if engine is not None:
            found = engine.sample(
                prompts, SamplingConfig(max(limits), config.temperature, seed=seed),
                sequence_ids=episodes, limits=limits, stop_requested=stop_requested,
            )  # fmt: skip
            update(0 if turn else len(found))
            return found
        return generate_sharded(
            model,
            prompts,
            max_new_tokens=max(limits),
            temperature=config.temperature,
            seed=seed,
            eos_token_id=tokenizer.stop_token_ids,
            batch_size=config.batch_size,
            sequence_ids=episodes,
            limits=limits,
            on_progress=_ignore if turn else update,
            stop_requested=stop_requested,
        )

    return play_episodes(
        starts,
        sample,
        tokenizer,
        toolbox,
        max_new_tokens=config.most_new_tokens,
        stop_requested=stop_requested,
    )


class _Row(NamedTuple):
    """One completion of a problem, or an episode of it, and what its verifier found."""

    record: Record
    episode: Episode
    score: Score
    answer: str | None
    could_call: bool  # tools

    @property
    def correct(self) -> bool:
        return self.score.status == "correct"


def _ignore(done: int) -> None:
    """Show no progress."""


def _task_result(
    domain: str, task: str, rows: list[_Row], config: EvalConfig, thinking: bool
) -> TaskResult:
    valid = [row for row in rows if row.score.trains]
    excluded = Counter(row.score.status for row in rows if not row.score.trains)
    groups = [rows[i : i + config.samples] for i in range(0, len(rows), config.samples)]
    correct = [[row.correct for row in group] for group in groups]
    votes = config.samples > 1 and all(row.record.fields["reward"] in ANSWER_FORMS for row in rows)
    answers = [[row.answer for row in group] for group in groups] if votes else None
    gold = [group[0].record.fields.get("answer") for group in groups]
    most_frequent = Counter(str(answer) for answer in gold if answer is not None)
    return TaskResult(
        domain=domain,
        task=task,
        problems=len(groups),
        accuracy=sum(row.correct for row in valid) / max(1, len(valid)),
        pass_at_k=sum(map(any, correct)) / len(groups),
        baseline=max(most_frequent.values()) / len(groups) if most_frequent else None,
        truncated=sum(not row.episode.finished for row in rows) / len(rows),
        excluded={str(status): count for status, count in excluded.items()},
        unclosed=sum(
            thinking and not parse_completion(row.episode.text).finished_thinking for row in rows
        ),
        episodes=sum(row.could_call for row in rows),
        completions=len(rows),
        estimates=estimates(correct, answers, config.ks),
    )


def _sample(row: _Row) -> dict[str, Any]:
    return {
        "task": row.record.fields["task"],
        "source": row.record.source,
        "prompt": user_prompt(row.record),
        "completion": row.episode.text,
        **({"turns": row.episode.messages} if row.episode.turns > 1 else {}),
        "tokens": len(row.episode.logprobs),
        "status": row.score.status,
        "value": row.score.value,
        "detail": row.score.detail,
        "answer": row.answer,
    }
