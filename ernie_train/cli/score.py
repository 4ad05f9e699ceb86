"""The `score` verb: grade a file of completions with a verifier, without any training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from ernie_train.core.config import StrictConfig, load_yaml, parse_config
from ernie_train.core.errors import DataError, Interrupted
from ernie_train.core.signals import StopFlag
from ernie_train.data import Columns, files, find_files, load_tokenizer
from ernie_train.data.completion_format import RESPONSE_OPEN, THINK_CLOSE, THINK_OPEN
from ernie_train.data.files import container
from ernie_train.data.formats import ColumnMap, Row, RowError, verifier_names
from ernie_train.eval.prompts import answer_parts
from ernie_train.io.files import write_jsonl
from ernie_train.rewards.score import FORMAT_KEY, Status
from ernie_train.rewards.scoring import (
    ComposedScore,
    RewardConfig,
    ScoredBatch,
    build_reward,
)
from ernie_train.weights.model_directory import find_model

_STATUSES: tuple[Status, ...] = get_args(Status)
_SHOWN_REASONS = 3
_LINES = (".jsonl", ".ndjson", ".txt", "")  # endings of files that hold JSON lines here
SCORE_KEYS = ("value", "status", "detail", "parts")  # of each row of the output


class _Section(StrictConfig):
    reward: RewardConfig


@dataclass(frozen=True)
class Graded:
    """A completion with its data row and its score."""

    row: dict[str, Any]
    completion: dict[str, Any]
    score: ComposedScore


def score_file(
    reward: str,
    data: Path,
    completions: Path,
    out: Path | None,
    console: Console,
    columns: Columns | None = None,
    model: Path | None = None,
) -> None:
    """Grade `completions` for the rows of `data`, print the table, write the scores to `out`.

    `columns` is what to read the columns of the data as. Completions are read in the chat format of
    `model`, or else as they look.

    Raises `UserError` for files that do not match and for unknown rewards, `Interrupted` on a
    signal.
    """
    config, base_directory = reward_config(reward)
    pairs = pair_up(read_data(data, columns), read_rows(completions), data, completions)
    texts = [_text_of(found, completions, at) for at, (_, found) in enumerate(pairs, start=1)]
    parts, remark = _format_of(model, config, texts)
    rows = [{**row, FORMAT_KEY: parts} for row, _ in pairs]
    composed = build_reward(config, base_directory)
    try:
        with StopFlag("stopping; nothing is written") as stop:
            batch = composed.score_batch(rows, texts, stop_requested=lambda: stop.requested)
            if stop.requested:
                raise Interrupted("stopped by a signal before everything was graded")
    finally:
        composed.close()
    graded = [
        Graded(row, completion, score)
        for (row, completion), score in zip(pairs, batch.scores, strict=True)
    ]
    print_scores(graded, batch, console)
    if remark:
        console.print(f"{remark} (--model reads a model's own)", markup=False, highlight=False)
    if out is not None:
        write_jsonl(out, map(_row, graded))


def _format_of(
    model: Path | None, config: RewardConfig, texts: Sequence[str]
) -> tuple[dict[str, bool], str]:
    """Return the parts of completions by the model's chat format, or else by how they look.

    Without a model also return a line that says what was taken for granted. A file has one format:
    where some completions show reasoning, one that does not was cut off within it.
    """
    if model is not None:
        return answer_parts(load_tokenizer(find_model(model).tokenizer)), ""
    if any(part.name == "format" for part in config.parts):
        parts = {"thinking": True, "response_tags": True}
        return parts, "read in the Thinking format, which `format` grades"
    thinking = sum(THINK_CLOSE in text or text.lstrip().startswith(THINK_OPEN) for text in texts)
    tagged = sum(RESPONSE_OPEN in text for text in texts)
    seen = [f"{thinking} of {len(texts)} show reasoning"] if thinking else []
    seen += [f"{tagged} of {len(texts)} have <response> tags"] if tagged else []
    parts = {"thinking": bool(thinking), "response_tags": bool(tagged)}
    return parts, f"read as they look: {', '.join(seen) or 'none shows reasoning'}"


def reward_config(reward: str) -> tuple[RewardConfig, Path]:
    """Parse --reward: a name, `row`, FILE.py:FUNCTION, or a .yaml file with a `reward`.

    Returns it with the directory to which its files are relative. The share of completions without
    a score is not limited as in training: the table shows it.
    """
    if reward.endswith((".yaml", ".yml")):
        path = Path(reward)
        section = load_yaml(path)
        value = section.get("reward", section)
        return parse_config(_Section, {"reward": value}, str(path)).reward, path.parent
    part = {"python": reward} if ".py:" in reward else {"name": reward}
    settings = {"reward": {"parts": [part], "max_excluded_fraction": 1.0}}
    return parse_config(_Section, settings, "--reward").reward, Path()


def read_data(path: Path, columns: Columns | None = None) -> list[dict[str, Any]]:
    """Read the rows of any data file, directory or pattern; `DataError` names a bad row."""
    mapped = ColumnMap(columns)
    rows = [{**verifier_names(row), **row} for row in _read(path, mapped)]
    mapped.check(str(path))
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read completions, or rows as they stand, of any data file; `DataError` names a bad row."""
    return _read(path, lambda row: row)


def _read(path: Path, change: Callable[[Row], Row]) -> list[Row]:
    several = path.is_dir() or has_magic(str(path))
    as_lines = container(path)[0] in _LINES and not several
    rows = []
    for file in [path] if as_lines else find_files(path).files:
        for source, row in files.read_rows(file, lambda count: None, as_lines=as_lines):
            try:
                if isinstance(row, RowError):
                    raise row
                rows.append(change(row))
            except RowError as error:
                raise DataError(f"{source}: {error}") from None
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def pair_up(
    rows: Sequence[dict[str, Any]],
    completions: Sequence[dict[str, Any]],
    data: Path,
    completions_path: Path,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (row, completion) pairs: by `id` if every completion has one, else in order.

    By `id` a row may have any number of completions. Raises `DataError` for an id that is unknown
    or not unique, and for different lengths without ids.
    """
    if all("id" in completion for completion in completions):
        counts = Counter(json.dumps(row.get("id")) for row in rows if "id" in row)
        by_id = {json.dumps(row["id"]): row for row in rows if "id" in row}
        for completion in completions:
            key = json.dumps(completion["id"])
            if counts[key] != 1:
                raise DataError(
                    f"{completions_path}: the id {key} occurs {counts[key]} times in {data}, "
                    "it must occur once"
                )
        return [(by_id[json.dumps(c["id"])], c) for c in completions]
    if len(rows) != len(completions):
        raise DataError(
            f"{data} has {len(rows)} rows and {completions_path} {len(completions)} completions; "
            "give a completion a row, in order, or give both an id"
        )
    return list(zip(rows, completions, strict=True))


def print_scores(graded: Sequence[Graded], batch: ScoredBatch, console: Console) -> None:
    """Print a line per task and one for all: the number of each status, and the mean value.

    Means are over the scores that would train. Below, print the means of a reward's parts and the
    most frequent reasons for every status but `correct`.
    """
    tasks: dict[str, list[Graded]] = {}
    for entry in graded:
        tasks.setdefault(str(entry.row.get("task", "")), []).append(entry)
    table = Table("task", *(s.replace("_", " ") for s in _STATUSES), "mean")
    for task in sorted(tasks) if len(tasks) > 1 else []:
        table.add_row(task or "(none)", *_numbers(tasks[task]))
    table.add_row("all", *_numbers(graded))
    console.print(table)
    console.print(f"{len(graded)} completions in {batch.report.seconds:.1f} s", highlight=False)
    trained = [entry.score for entry in graded if entry.score.score.trains]
    for label in graded[0].score.parts if len(graded[0].score.parts) > 1 else ():
        mean = _mean([score.parts[label] for score in trained])
        console.print(f"mean of {label}: {mean}", markup=False, highlight=False)
    for status in _STATUSES[1:]:
        found = [entry.score.score for entry in graded if entry.score.score.status == status]
        details = Counter(score.detail for score in found if score.detail)
        for detail, count in details.most_common(_SHOWN_REASONS):
            console.print(f"{status}: {count} x {detail}", markup=False, highlight=False)


def _numbers(graded: Sequence[Graded]) -> list[str]:
    counts = Counter(entry.score.score.status for entry in graded)
    mean = _mean([entry.score.value for entry in graded if entry.score.score.trains])
    return [*(str(counts[status]) for status in _STATUSES), mean]


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else "-"


def _text_of(completion: dict[str, Any], path: Path, number: int) -> str:
    for key in ("completion", "text"):
        if isinstance(completion.get(key), str):
            return str(completion[key])
    keys = ", ".join(completion) or "none"
    raise DataError(
        f"{path}: completion {number} needs a text under completion or text; its keys are {keys}"
    )


def _row(entry: Graded) -> dict[str, Any]:
    identity = {"id": entry.completion["id"]} if "id" in entry.completion else {}
    score = entry.score
    return {
        **identity,
        "value": score.value,
        "status": score.score.status,
        "detail": score.score.detail,
        "parts": score.parts,
    }
