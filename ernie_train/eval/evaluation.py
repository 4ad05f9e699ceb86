"""Evaluation on held-out problems: complete them, score them, report by task and domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ernie_train.core.errors import ConfigError, DataError, describe
from ernie_train.data import Columns, Record, Tokenizer, read_records, require_chat_template
from ernie_train.data.completion_format import parse_completion
from ernie_train.environments import Episode, EpisodeStart, Toolbox, play_episodes
from ernie_train.eval.estimates import Estimate, estimates
from ernie_train.eval.prompts import (
    GOLD,
    FewShot,
    encode_problems,
    expecting_own_calls,
    is_episode,
    problem_row,
    user_prompt,
)
from ernie_train.generate.engine import Completion
from ernie_train.generate.engines import Engine
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.generate.sharded import generate_sharded, score_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rewards import Score, reward_named, score_batch
from ernie_train.rewards.registry import ANSWER_FORMS, answer_form
from ernie_train.rewards.sandbox import layer_in_force

# Shows that of so many problems more are completed, as often as it is told.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
LONGEST_NAME = 200  # characters of a task, a domain or a verifier
SHOWN_PROBLEMS = 10
SHOWN_PLACES = 3  # of one mistake


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation: `samples` completions per problem, greedy at temperature 0.

    k: the sizes for which pass@k is estimated; 1 and `samples` if it is empty.
    """

    max_new_tokens: int = 128
    batch_size: int = 256
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    k: tuple[int, ...] = ()

    @property
    def ks(self) -> list[int]:
        return sorted(set(self.k or (1, self.samples)))


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


def load_problems(
    path: str | Path,
    *,
    tasks: Sequence[str] = (),
    max_examples: int | None = None,
    needs_reward: bool = True,
    max_bad_fraction: float = 0.01,
    columns: Columns | None = None,
) -> list[Record]:
    """Read the problems of a path, as `read_records` does, and name their task and domain.

    Rows that do not say what is expected are graded by the tool calls that they end in, if they do.
    A row without `task` belongs to the task that its file is named after, one without `domain` to
    the domain that its task is named after.

    Args:
        tasks: keep only these tasks or domains.
        max_examples: keep only the first of each task.
        needs_reward: require that rows name a verifier.
        max_bad_fraction: share of unreadable rows that is tolerated.
        columns: what to read the columns of rows as.

    Raises:
        DataError: a missing path, or rows that lack a prompt, a verifier or a name that is text.
        ConfigError: a name in `tasks` is neither a task nor a domain of these problems.
    """
    records, read = read_records(path, max_bad_fraction=max_bad_fraction, columns=columns)
    read.warn()
    problems = [_with_names(record) for record in records]
    if needs_reward:
        problems = expecting_own_calls(path, problems)
    _check_fields(path, problems, needs_reward)
    known = {record.fields[key] for record in problems for key in ("task", "domain")}
    if unknown := sorted(set(tasks) - known):
        raise ConfigError(f"no task or domain {', '.join(unknown)}; there are {sorted(known)}")
    seen: Counter[str] = Counter()
    kept = []
    for record in problems:
        task, domain = record.fields["task"], record.fields["domain"]
        if tasks and task not in tasks and domain not in tasks:
            continue
        seen[task] += 1
        if max_examples is None or seen[task] <= max_examples:
            kept.append(record)
    return kept


def _with_names(record: Record) -> Record:
    file = Path(record.source.rpartition(":")[0])
    task = record.fields.get("task", file.name.partition(".")[0])
    return replace(record, fields={"domain": task, **record.fields, "task": task})


def _check_fields(path: str | Path, problems: Sequence[Record], needs_reward: bool) -> None:
    """Raise `DataError` that lists what is wrong with the problems' fields, by file and line."""
    places: dict[str, list[str]] = {}  # by reason: a file mostly lacks the same in all its rows
    for record in problems:
        for reason in _wrong_fields(record, needs_reward):
            places.setdefault(reason, []).append(record.source)
    if not places:
        return
    wrong = [
        ", ".join(found[:SHOWN_PLACES])
        + (f" and {len(found) - SHOWN_PLACES} more" if len(found) > SHOWN_PLACES else "")
        + f": {reason}"
        for reason, found in places.items()
    ]
    if len(wrong) > SHOWN_PROBLEMS:
        wrong[SHOWN_PROBLEMS:] = [f"and {len(wrong) - SHOWN_PROBLEMS} other mistakes"]
    keys = ", ".join(sorted(problems[0].fields.keys() - {"task", "domain"})) or "nothing"
    if places.keys() == {_needs("reward")}:
        hint = "One verifier for all rows: {reward: {value: math}}"
    else:
        hint = "Other names are mapped: {answer: gold, reward: {value: math}}"
    raise DataError(
        f"{path}: fields of problems are wrong:\n  " + "\n  ".join(wrong) + "\n"
        f"Beside its prompt the first row has {keys}. {hint}, as `columns` beside the path or as "
        "--columns of eval; docs/rewards.md lists verifiers"
    )


def _needs(key: str) -> str:
    return f"a problem needs the field {key!r}"


def _wrong_fields(record: Record, needs_reward: bool) -> Iterator[str]:
    fields = record.fields
    if not record.messages:
        yield "a problem needs a prompt, or messages"
    for key in ("task", "domain", *(("reward",) if needs_reward else ())):
        value = fields.get(key)
        if value is None:
            yield _needs(key)
        elif not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
            yield f"{key!r} must be a text of 1 to {LONGEST_NAME} characters, not {describe(value)}"
    if needs_reward and "reward" not in fields and not fields.keys() & GOLD:
        yield "a problem needs what its verifier grades by, such as 'answer' (docs/rewards.md)"


def require_verifiers(problems: Sequence[Record]) -> None:
    """Check before training that the problems can be scored after it.

    Raises `UserError` for an unknown reward, and `SandboxUnavailable` if programs must be run and
    no sandbox works.
    """
    names = {str(record.fields["reward"]) for record in problems}
    for name in sorted(names):
        reward_named(name)
    if "code" in names:
        layer_in_force()


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
    room = model.config.max_position_embeddings - config.max_new_tokens
    problems = [toolbox.offer(problem) if toolbox else problem for problem in problems]
    prompts = encode_problems(tokenizer, problems, room, few_shot)
    starts = [
        EpisodeStart(ids, record if toolbox and toolbox.serves(record) else None)
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
        max_new_tokens=config.max_new_tokens,
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
