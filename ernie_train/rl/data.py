"""The data of an RL stage: prompts to sample from, held-out problems, offline pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ernie_train.core.errors import ConfigError, DataError
from ernie_train.data import ReadReport, Record, Tokenizer
from ernie_train.data.report import too_long_warning
from ernie_train.environments import Toolbox, open_toolbox
from ernie_train.eval.gates import known_metrics
from ernie_train.eval.problems import load_problems, require_verifiers
from ernie_train.eval.prompts import encode_prompt
from ernie_train.rewards.scoring import build_reward
from ernie_train.rl.config import PromptSource, UpoConfig
from ernie_train.rl.preference_data import (
    PromptReport,
    TokenizedPair,
    encode_completion,
    read_fitting_pairs,
)
from ernie_train.rl.reward import find_reward_model
from ernie_train.train.stage import StageData


@dataclass(frozen=True)
class Prompt:
    """A problem as the policy is asked it, with what its verifier needs in `record`."""

    record: Record
    prompt_ids: list[int]
    domain: str
    task: str
    difficulty: int


@dataclass(frozen=True)
class PreparedPrompts:
    """Prompts of all sources, one after another, `sizes` of each; what else a stage reads."""

    prompts: list[Prompt]
    sizes: list[int]
    weights: list[float]
    report: PromptReport
    held_out: list[Record]
    offline_pairs: list[TokenizedPair]
    solutions: Mapping[int, list[int]] = field(default_factory=dict)  # token ids by prompt


def prepare(config: UpoConfig, data: StageData) -> PreparedPrompts:
    """Read and encode the stage's prompts; `DataError` says what is wrong with which rows."""
    prompts: list[Prompt] = []
    sizes, reports = [], []
    warnings: list[Text] = []
    with open_toolbox(config.environment, data.tokenizer, data.base_dir) as toolbox:
        for source in config.data:
            found, report, warned = _read_prompts(config, source, data, toolbox)
            prompts += found
            sizes.append(len(found))
            reports.append(report)
            warnings += warned
        _check_served(config, [prompt.record for prompt in prompts], toolbox)
    _check_curriculum(config, prompts)
    for reward in config.rewards():
        build_reward(reward, data.base_dir).close()  # starts nothing: it only must exist
        for part in reward.parts:
            if part.model is not None:
                find_reward_model(data.base_dir / part.model.path)
    _check_replay(config, data)
    held_out: list[Record] = []
    if config.evaluation is not None:
        held_out = load_problems(
            data.base_dir / config.evaluation.path,
            tasks=config.evaluation.tasks,
            max_examples=config.evaluation.max_examples,
            columns=config.evaluation.columns,
        )
        require_verifiers(held_out)
        _check_best_metric(config, held_out)
    offline: list[TokenizedPair] = []
    pairs_report = None
    if config.offline is not None and config.offline.path is not None:
        offline, pairs_report, warned = read_fitting_pairs(
            config.offline.path,
            data,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
            max_bad_fraction=config.max_bad_fraction,
            columns=config.offline.columns,
        )
        warnings += warned
    solutions: dict[int, list[int]] = {}
    if config.preference is not None and config.preference.of_solutions:
        solutions, warned = read_solutions(prompts, data.tokenizer, config.rollout.max_new_tokens)
        warnings += warned
    weights = [source.weight for source in config.data]
    report_of_all = PromptReport(reports, pairs_report, warnings)
    return PreparedPrompts(prompts, sizes, weights, report_of_all, held_out, offline, solutions)


def _read_prompts(
    config: UpoConfig, source: PromptSource, data: StageData, toolbox: Toolbox | None
) -> tuple[list[Prompt], dict[str, Any], list[Text]]:
    records = load_problems(
        data.base_dir / source.path,
        tasks=source.tasks,
        max_examples=source.max_examples,
        needs_reward=any(part.name == "row" for r in config.rewards() for part in r.parts),
        max_bad_fraction=config.max_bad_fraction,
        columns=source.columns,
        format=source.format,
        without=source.held_out(data.base_dir),
    )
    if not records:
        raise DataError(f"{source.path}: no problem is left: every row is held out")
    if toolbox is not None:
        records = [toolbox.offer(record) for record in records]
    longest = config.rollout.max_prompt_tokens
    found, lengths = encode_prompts(
        records, data.tokenizer, longest=longest, max_bad_fraction=config.max_bad_fraction
    )
    if not found:
        raise DataError(
            f"{source.path}: none of {len(records)} prompts has at most "
            f"max_prompt_tokens={longest} tokens"
        )
    warnings = []
    if lengths:
        what, bound = f"{len(lengths)} of {len(records)} prompts of {source.path}", "rollout."
        bound += f"max_prompt_tokens={longest}"
        warnings = [too_long_warning(what, bound, max(lengths), "raise it")]
    return found, _source_report(source.path, found, len(lengths)), warnings


def encode_prompts(
    records: Sequence[Record], tokenizer: Tokenizer, *, longest: int, max_bad_fraction: float = 0.0
) -> tuple[list[Prompt], list[int]]:
    """Encode records to prompts of at most `longest` tokens; return also the lengths of others.

    Raises `DataError` where more than a share of `max_bad_fraction` cannot be encoded.
    """
    prompts, too_long = [], []
    report = ReadReport("the prompts", rows=len(records))
    for record in records:
        try:
            ids = encode_prompt(tokenizer, record)
        except DataError as error:
            report.add_bad(record.source, str(error))
            continue
        if len(ids) > longest:
            too_long.append(len(ids))
            continue
        fields = record.fields
        level = 1 if (known := _level(record)) is None else known
        prompts.append(Prompt(record, ids, str(fields["domain"]), str(fields["task"]), level))
    report.check(max_bad_fraction)
    return prompts, too_long


def _level(record: Record) -> int | None:
    """Return the difficulty of a row, 1 without one; None for another kind, such as "hard"."""
    difficulty = record.fields.get("difficulty", 1)
    if isinstance(difficulty, str) and difficulty.isdecimal():  # as CSV has it
        return int(difficulty)
    if isinstance(difficulty, float) and difficulty.is_integer():  # as pandas has it beside nulls
        return int(difficulty)
    return difficulty if isinstance(difficulty, int) and not isinstance(difficulty, bool) else None


def read_solutions(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int
) -> tuple[dict[int, list[int]], list[Text]]:
    """Return the solutions of rows as completions of at most `longest` tokens, and warnings.

    A solution is the answer of the assistant that ends a row's messages. Raises `DataError` where
    no row has one that fits.
    """
    found: dict[int, list[int]] = {}
    lengths = []
    for at, prompt in enumerate(prompts):
        turns = prompt.record.messages[len(prompt.record.prompt_messages) :]
        if len(turns) != 1:
            continue
        record = prompt.record
        try:
            solution = encode_completion(tokenizer, record.prompt_messages, turns, record.tools)
        except DataError:
            continue  # not to be trained, or the template cannot show it
        if solution.prompt_ids != prompt.prompt_ids:
            continue  # the template asks otherwise than it shows a finished turn
        if len(solution.completion_ids) > longest:
            lengths.append(len(solution.completion_ids))
        else:
            found[at] = solution.completion_ids
    if not found:
        raise DataError(
            f"preference.pairs: none of {len(prompts)} prompts has a solution, an assistant's "
            f"answer that ends its messages, of at most max_new_tokens={longest} tokens"
        )
    warnings = []
    if lengths:
        what = f"the solutions of {len(lengths)} of {len(prompts)} prompts"
        bound = f"rollout.max_new_tokens={longest}"
        warnings = [too_long_warning(what, bound, max(lengths), "raise it")]
    if missing := len(prompts) - len(found) - len(lengths):
        told = f"{missing} of {len(prompts)} prompts have no solution and give no pair with one"
        warnings.append(Text(told, "yellow"))
    return found, warnings


def describe(
    config: UpoConfig, data: StageData, prepared: PreparedPrompts, console: Console
) -> None:
    """Print the size of an iteration, and the first prompt."""
    rollout, steps = config.rollout, config.policy.update_epochs * config.policy.minibatches
    if config.samples_each_iteration:
        console.print(
            f"an iteration samples {rollout.prompts_per_iteration} prompts x {rollout.group_size} "
            f"completions of at most {rollout.max_new_tokens} tokens",
            highlight=False,
        )
    if (tools := config.environment) is not None:
        console.print(
            f"an episode has at most {tools.max_turns} turns; a result of a tool at most "
            f"{tools.max_tool_tokens} tokens, a call {tools.max_tool_seconds:g} s",
            highlight=False,
        )
    console.print(f"{steps} optimizer steps an iteration; iterations: {config.iterations}")
    first = prepared.prompts[0]
    console.print(f"the first of {len(prepared.prompts)} prompts:")
    console.print(data.tokenizer.decode(first.prompt_ids), markup=False, highlight=False)


def rollout_file(directory: Path, iteration: int) -> Path:
    """Return the file of an iteration's rollout in a directory of them."""
    return directory / f"{iteration:06d}.jsonl"


def _check_served(config: UpoConfig, records: Sequence[Record], toolbox: Toolbox | None) -> None:
    """Refuse an environment that no problem of the stage is an episode of."""
    if toolbox is not None and not any(toolbox.serves(record) for record in records):
        raise ConfigError(
            f"environment of stage {config.name} has no effect: every row has tools of its own, or "
            "is about making a call (reward: tool_call)"
        )


def _check_best_metric(config: UpoConfig, held_out: Sequence[Record]) -> None:
    metric, settings = config.checkpoint.best_metric, config.evaluation
    if metric is None or settings is None:
        return
    known = known_metrics(held_out)
    if settings.samples > 1:
        tasks = {f"eval/{record.fields['task']}" for record in held_out}
        known |= {f"{task}/pass@{k}" for task in tasks for k in (1, settings.samples)}
    if metric not in known:
        raise ConfigError(
            f"checkpoint.best_metric={metric!r} is not measured in stage {config.name}, only "
            f"{', '.join(sorted(known))}"
        )


def _check_replay(config: UpoConfig, data: StageData) -> None:
    if config.rollout.replay is None:
        return
    directory = data.base_dir / config.rollout.replay
    for iteration in range(1, config.iterations + 1):
        if not rollout_file(directory, iteration).exists():
            raise DataError(
                f"rollout.replay: {rollout_file(directory, iteration)} is missing; "
                f"{config.iterations} iterations need as many rollouts"
            )


def _check_curriculum(config: UpoConfig, prompts: list[Prompt]) -> None:
    if config.curriculum is None:
        return
    if unknown := next((p.record for p in prompts if _level(p.record) is None), None):
        raise DataError(
            f"{unknown.source}: curriculum needs a whole number as difficulty, not "
            f"{unknown.fields['difficulty']!r}: beside the path, columns: {{difficulty: COLUMN}} "
            "names another column, columns: {difficulty: {value: 1}} gives all its rows one level"
        )
    levels = sorted({prompt.difficulty for prompt in prompts})
    if config.curriculum.start not in levels:
        raise DataError(
            f"curriculum.start={config.curriculum.start}: no problem has that difficulty, only "
            f"{', '.join(map(str, levels))}"
        )
    if levels == [levels[0]]:
        raise DataError(
            f"curriculum: every problem has difficulty {levels[0]}, so there is nothing to raise"
        )


def _source_report(path: str, prompts: list[Prompt], too_long: int) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task in sorted({p.task for p in prompts}):
        own = [p for p in prompts if p.task == task]
        levels = Counter(level for p in own if (level := _level(p.record)) is not None)
        tasks[task] = {
            "prompts": len(own),
            "mean_tokens": float(np.mean([len(p.prompt_ids) for p in own])),
            "difficulties": {str(level): levels[level] for level in sorted(levels)},
        }
    return {"path": path, "too_long": too_long, "tasks": tasks}
