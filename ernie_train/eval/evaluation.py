"""Held-out problems: prompts in, completions scored, a table by task and domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ernie_train.core.errors import ConfigError, DataError
from ernie_train.data import Record, Tokenizer, read_records
from ernie_train.eval.prompts import completion_text, encode_prompt, problem_row
from ernie_train.generate.engine import Completion
from ernie_train.generate.sharded import generate_sharded, score_sharded
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rewards import Score, reward_named, score_batch
from ernie_train.rewards.sandbox import layer_in_force


@dataclass(frozen=True)
class EvalConfig:
    """`samples` completions are drawn for each problem; with one, decoding is greedy."""

    max_new_tokens: int = 128
    batch_size: int = 256
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    thinking: bool = True


@dataclass(frozen=True)
class TaskResult:
    """`accuracy` is over what could be scored; `excluded` counts what could not, by status."""

    domain: str
    task: str
    problems: int
    accuracy: float  # of single completions
    pass_at_k: float  # share of problems with a correct one among `samples`
    baseline: float  # share of problems whose answer is the task's most frequent one
    truncated: float  # share of completions that reached no stop token
    excluded: dict[str, int]


@dataclass(frozen=True)
class Evaluation:
    tasks: list[TaskResult]
    samples: list[dict[str, Any]]  # one row a completion: prompt, completion, score

    def domains(self) -> dict[str, tuple[float, float]]:
        """Mean accuracy and mean baseline over the tasks of each domain."""
        grouped: dict[str, list[TaskResult]] = {}
        for task in self.tasks:
            grouped.setdefault(task.domain, []).append(task)
        return {
            domain: (
                sum(t.accuracy for t in tasks) / len(tasks),
                sum(t.baseline for t in tasks) / len(tasks),
            )
            for domain, tasks in grouped.items()
        }

    @property
    def mean_accuracy(self) -> float:
        """The mean over tasks, each counting the same."""
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
) -> list[Record]:
    """The problems of a JSONL file, gzipped or not, or of every one in a directory.

    `tasks` keeps those of the named tasks or domains; `max_examples` the first of each task;
    with `needs_reward` False rows need not name a verifier.
    Raises `DataError` for a missing path and for rows without a verifier, `ConfigError` for a name
    in `tasks` that is no task or domain there.
    """
    root = Path(path)
    files = [root]
    if root.is_dir():
        files = sorted(p for p in root.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise DataError(f"{root}: no .jsonl file with problems")
    read = (read_records(file, max_bad_fraction=max_bad_fraction)[0] for file in files)
    problems = [record for records in read for record in records]
    for record in problems:
        for key in ("task", "domain", *(("reward",) if needs_reward else ())):
            if key not in record.fields:
                raise DataError(f"{record.source}: a problem needs the field {key!r}")
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


def require_verifiers(problems: Sequence[Record]) -> None:
    """Finds out before hours of training whether the problems could be scored at the end of it.

    Raises `UserError` for an unknown reward and `SandboxUnavailable` where there are programs to
    run and no sandbox.
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
    on_progress: Callable[[int], None] = lambda done: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Completes every problem and scores the completions with the problems' own verifiers.

    Every rank must call it; each does a share of the work and has the whole result.
    """
    prompts = [encode_prompt(tokenizer, record, thinking=config.thinking) for record in problems]
    repeated = [prompt for prompt in prompts for _ in range(config.samples)]
    completions = generate_sharded(
        model,
        repeated,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        eos_token_id=tokenizer.stop_token_ids,
        batch_size=config.batch_size,
        on_progress=on_progress,
        stop_requested=stop_requested,
    )
    owners = [record for record in problems for _ in range(config.samples)]
    texts = [completion_text(tokenizer, completion) for completion in completions]
    scores = score_sharded(
        [
            (str(r.fields["reward"]), problem_row(r, config.thinking), t)
            for r, t in zip(owners, texts, strict=True)
        ],
        lambda items: score_batch(items, stop_requested=stop_requested),
        stop_requested=stop_requested,
    )
    rows = list(zip(owners, texts, completions, scores, strict=True))
    tasks: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        tasks.setdefault((row[0].fields["domain"], row[0].fields["task"]), []).append(row)
    results = [_task_result(*key, tasks[key], config.samples) for key in sorted(tasks)]
    return Evaluation(results, [_sample(*row) for row in rows])


def _task_result(domain: str, task: str, rows: list[Any], samples: int) -> TaskResult:
    scores: list[Score] = [score for _, _, _, score in rows]
    valid = [score for score in scores if score.status in ("correct", "wrong")]
    excluded = Counter(s.status for s in scores if s.status not in ("correct", "wrong"))
    groups = [scores[i : i + samples] for i in range(0, len(scores), samples)]
    answers = Counter(str(row[0].fields.get("answer")) for row in rows[::samples])
    return TaskResult(
        domain=domain,
        task=task,
        problems=len(groups),
        accuracy=sum(s.status == "correct" for s in valid) / max(1, len(valid)),
        pass_at_k=sum(any(s.status == "correct" for s in g) for g in groups) / len(groups),
        baseline=answers.most_common(1)[0][1] / len(groups),
        truncated=sum(not c.finished for _, _, c, _ in rows) / len(rows),
        excluded={str(status): count for status, count in excluded.items()},
    )


def _sample(record: Record, text: str, completion: Completion, score: Score) -> dict[str, Any]:
    return {
        "task": record.fields["task"],
        "source": record.source,
        "prompt": record.messages[0]["content"],
        "completion": text,
        "tokens": len(completion.ids),
        "status": score.status,
        "value": score.value,
        "detail": score.detail,
    }
