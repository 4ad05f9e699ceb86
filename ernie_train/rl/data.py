"""The data of an RL stage: problems to sample from, held-out problems, offline pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ernie_train.core.errors import DataError
from ernie_train.data import Record, Tokenizer, encode_chat, prompt_ids, read_records
from ernie_train.eval.evaluation import load_problems, require_verifiers
from ernie_train.rewards.scoring import build_reward
from ernie_train.rl.batch import Pairing
from ernie_train.rl.config import PromptSource, UpoConfig
from ernie_train.rl.rollout import Problem, Sample, encode_problems, rollout_file
from ernie_train.train.stage import StageData


@dataclass(frozen=True)
class PromptReport:
    """What the sources hold; `too_long` is what exceeds the stage's lengths and is left out."""

    sources: list[dict[str, Any]]
    pairs: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"sources": self.sources, "pairs": self.pairs}

    def as_table(self) -> Table:
        table = Table("source", "task", "prompts", "mean tokens", "difficulties", "too long")
        for source in self.sources:
            for task, facts in source["tasks"].items():
                levels = ", ".join(f"{level}: {n}" for level, n in facts["difficulties"].items())
                table.add_row(
                    source["path"],
                    task,
                    str(facts["prompts"]),
                    f"{facts['mean_tokens']:.0f}",
                    levels,
                    str(source["too_long"]),
                )
        if self.pairs is not None:
            count, tokens = str(self.pairs["pairs"]), f"{self.pairs['mean_tokens']:.0f}"
            table.add_row(
                self.pairs["path"], "pairs", count, tokens, "", str(self.pairs["too_long"])
            )
        return table


@dataclass(frozen=True)
class PreparedPrompts:
    """Problems of all sources, one after another, `sizes` of each; what else a stage reads."""

    problems: list[Problem]
    sizes: list[int]
    weights: list[float]
    report: PromptReport
    held_out: list[Record]
    offline: list[Pairing]


def prepare(config: UpoConfig, data: StageData) -> PreparedPrompts:
    """Reads and encodes the stage's problems; `DataError` says what is wrong with which rows."""
    problems: list[Problem] = []
    sizes, reports = [], []
    for source in config.data:
        found, report = _read_problems(config, source, data)
        problems += found
        sizes.append(len(found))
        reports.append(report)
    _check_curriculum(config, problems)
    if config.reward is not None:
        build_reward(config.reward, data.base_dir).close()  # nothing is started: it only must exist
    _check_replay(config, data)
    held_out: list[Record] = []
    if config.evaluation is not None:
        held_out = load_problems(
            data.base_dir / config.evaluation.path,
            tasks=config.evaluation.tasks,
            max_examples=config.evaluation.max_examples,
        )
        require_verifiers(held_out)
    offline: list[Pairing] = []
    pairs_report = None
    if config.offline is not None and config.offline.path is not None:
        offline, pairs_report = _read_offline(config, config.offline.path, data)
    weights = [source.weight for source in config.data]
    told = PromptReport(reports, pairs_report)
    return PreparedPrompts(problems, sizes, weights, told, held_out, offline)


def _read_problems(
    config: UpoConfig, source: PromptSource, data: StageData
) -> tuple[list[Problem], dict[str, Any]]:
    parts = config.reward.parts if config.reward is not None else []
    records = load_problems(
        data.base_dir / source.path,
        tasks=source.tasks,
        max_examples=source.max_examples,
        needs_reward=any(part.name == "row" for part in parts),
        max_bad_fraction=config.max_bad_fraction,
    )
    found, too_long = encode_problems(records, data.tokenizer, longest=config.max_prompt_tokens)
    if not found:
        raise DataError(
            f"{source.path}: none of {len(records)} prompts has at most "
            f"max_prompt_tokens={config.max_prompt_tokens} tokens"
        )
    return found, _source_report(source.path, found, too_long)


def _read_offline(
    config: UpoConfig, path: str, data: StageData
) -> tuple[list[Pairing], dict[str, Any]]:
    pairs = read_pairs(data.base_dir / path, data.tokenizer, config.max_bad_fraction)
    longest = config.max_pair_tokens or config.max_prompt_tokens + config.max_new_tokens
    fitting = [
        pair
        for pair in pairs
        if all(
            len(s.prompt_ids) <= config.max_prompt_tokens
            and len(s.completion_ids) <= config.max_new_tokens
            and len(s.prompt_ids + s.completion_ids) <= longest
            for s in pair
        )
    ]
    if not fitting:
        raise DataError(f"{path}: none of {len(pairs)} pairs fits the stage's lengths")
    tokens = float(np.mean([len(s.prompt_ids + s.completion_ids) for p in fitting for s in p]))
    too_long = len(pairs) - len(fitting)
    facts = {"path": path, "pairs": len(fitting), "mean_tokens": tokens, "too_long": too_long}
    return fitting, facts


def describe(
    config: UpoConfig, data: StageData, prepared: PreparedPrompts, console: Console
) -> None:
    """Prints what an iteration is, and the first prompt."""
    steps = config.update_epochs * config.minibatches
    if config.prompts_per_iteration is not None:
        prompts, size = config.prompts_per_iteration, config.group_size
        console.print(
            f"an iteration samples {prompts} prompts x {size} completions of at most "
            f"{config.max_new_tokens} tokens",
            highlight=False,
        )
    console.print(f"{steps} optimizer steps an iteration; iterations: {config.iterations}")
    if not prepared.problems:
        return
    first = prepared.problems[0]
    console.print(f"the first of {len(prepared.problems)} prompts:")
    console.print(data.tokenizer.decode(first.prompt_ids), markup=False, highlight=False)


def _check_replay(config: UpoConfig, data: StageData) -> None:
    if config.replay_rollouts is None:
        return
    directory = data.base_dir / config.replay_rollouts
    for number in range(1, config.iterations + 1):
        if not rollout_file(directory, number).exists():
            raise DataError(
                f"replay_rollouts: {rollout_file(directory, number)} is missing; "
                f"{config.iterations} iterations need as many rollouts"
            )


def _check_curriculum(config: UpoConfig, problems: list[Problem]) -> None:
    if config.curriculum is None:
        return
    levels = sorted({problem.difficulty for problem in problems})
    if config.curriculum.start not in levels:
        raise DataError(
            f"curriculum.start={config.curriculum.start}: no problem has that difficulty, only "
            f"{', '.join(map(str, levels))}"
        )
    if levels == [levels[0]]:
        raise DataError(
            f"curriculum: every problem has difficulty {levels[0]}, so there is nothing to raise"
        )


def _source_report(path: str, problems: list[Problem], too_long: int) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task in sorted({p.task for p in problems}):
        own = [p for p in problems if p.task == task]
        levels = Counter(p.difficulty for p in own)
        tasks[task] = {
            "prompts": len(own),
            "mean_tokens": float(np.mean([len(p.prompt_ids) for p in own])),
            "difficulties": {str(level): levels[level] for level in sorted(levels)},
        }
    return {"path": path, "too_long": too_long, "tasks": tasks}


def read_pairs(path: Any, tokenizer: Tokenizer, max_bad_fraction: float) -> list[Pairing]:
    """Pairs (chosen, rejected) of a file of preferences; `DataError` where it holds none."""
    records, _ = read_records(path, max_bad_fraction=max_bad_fraction)
    pairs = [_pair(number, record, tokenizer) for number, record in enumerate(records)]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs) or not found:
        raise DataError(
            f"{path}: {len(pairs) - len(found)} of {len(pairs)} rows are no preferences: each "
            "needs a prompt, a chosen and a rejected completion"
        )
    return found


def _pair(number: int, record: Record, tokenizer: Tokenizer) -> Pairing | None:
    if record.kind != "preference" or not record.chosen or not record.rejected:
        return None
    prompt = prompt_ids(tokenizer, record.messages, record.tools, thinking=True)

    def sample(turns: list[dict[str, Any]]) -> Sample:
        ids, _ = encode_chat(tokenizer, [*record.messages, *turns], record.tools, True)
        if ids[: len(prompt)] != prompt:
            raise DataError(f"{record.source}: the completion does not continue its prompt")
        completion = ids[len(prompt) :]
        stops = set(tokenizer.stop_token_ids)
        end = next((i + 1 for i, token in enumerate(completion) if token in stops), len(completion))
        return Sample(number, prompt, completion[:end], trained=False)

    return sample(record.chosen), sample(record.rejected)
