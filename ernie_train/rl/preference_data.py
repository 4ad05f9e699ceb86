"""The pairs of an RL, DPO or reward stage: preferences in files, as token ids; and its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ernie_train.core.errors import DataError
from ernie_train.data import (
    Columns,
    ReadReport,
    Record,
    Tokenizer,
    encode_conversation,
    read_records,
)
from ernie_train.data.packing import permutation
from ernie_train.data.reader import HeldOut
from ernie_train.data.report import too_long_warning
from ernie_train.rl.batch import PreferencePair, TokenizedCompletion
from ernie_train.train.stage import StageData


@dataclass(frozen=True)
class TokenizedPair:
    """A chosen and a rejected completion of one prompt.

    margin: how much better the chosen one is, where the row says it; a reward model heeds it.
    """

    chosen: TokenizedCompletion
    rejected: TokenizedCompletion
    margin: float = 0.0

    @property
    def completions(self) -> tuple[TokenizedCompletion, TokenizedCompletion]:
        return self.chosen, self.rejected


def add_pairs(
    sequences: list[TokenizedCompletion], pairs: Sequence[TokenizedPair]
) -> list[PreferencePair]:
    """Return pairs by their places among `sequences`, to which completions are added once.

    A completion that is there already, the same object, keeps its place.
    """
    places = {sequence: at for at, sequence in enumerate(sequences)}
    found = []
    for pair in pairs:
        for completion in pair.completions:
            if completion not in places:
                places[completion] = len(sequences)
                sequences.append(completion)
        found.append(PreferencePair(places[pair.chosen], places[pair.rejected]))
    return found


@dataclass(frozen=True)
class PromptReport:
    """Counts and lengths by source; `too_long` counts what exceeds the stage's lengths.

    `warnings` say what was left out for its length, and the fix.
    """

    sources: list[dict[str, Any]]
    pairs: dict[str, Any] | None = None
    warnings: Sequence[Text] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"sources": self.sources, "pairs": self.pairs}

    def as_table(self) -> Group:
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
        return Group(table, *self.warnings)


def read_fitting_pairs(
    path: str,
    data: StageData,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    max_bad_fraction: float,
    max_tokens: int | None = None,
    columns: Columns | None = None,
    with_margin: bool = False,
    without: HeldOut | None = None,
) -> tuple[list[TokenizedPair], dict[str, Any], list[Text]]:
    """Return the pairs of a file of preferences that fit, a report on them, and warnings.

    max_tokens: of a prompt with its completion; None: the sum of the other two.
    with_margin: read the rows' `margin` too. without: prompts whose rows are left out.
    Raises `DataError` where none fits.
    """
    pairs, read = read_pairs(
        data.base_dir / path, data.tokenizer, max_bad_fraction, columns,
        with_margin=with_margin, without=without,
    )  # fmt: skip
    longest = max_tokens or max_prompt_tokens + max_new_tokens
    fitting = [
        pair
        for pair in pairs
        if all(
            len(c.prompt_ids) <= max_prompt_tokens
            and len(c.completion_ids) <= max_new_tokens
            and c.length <= longest
            for c in pair.completions
        )
    ]
    if not fitting:
        shortest = min(max(c.length for c in pair.completions) for pair in pairs)
        raise DataError(
            f"{path}: none of {len(pairs)} pairs fits the stage's lengths ({longest} tokens of a "
            f"prompt with its completion; the shortest pair needs {shortest})"
        )
    tokens = float(np.mean([c.length for pair in fitting for c in pair.completions]))
    too_long = len(pairs) - len(fitting)
    facts = {"path": path, "pairs": len(fitting), "mean_tokens": tokens, "too_long": too_long}
    warnings = []
    if too_long:
        bound = (
            f"seq_len={max_tokens}"
            if max_tokens
            else (
                f"rollout.max_prompt_tokens={max_prompt_tokens} or max_new_tokens={max_new_tokens}"
            )
        )
        what = f"{too_long} of {len(pairs)} pairs of {path}"
        longest_pair = max(c.length for pair in pairs for c in pair.completions)
        warnings = [too_long_warning(what, bound, longest_pair, "raise it, or shorten them")]
    warnings += [Text(line, "yellow") for line in read.remarks()]
    return fitting, facts | {"bad": list(map(str, read.bad.listed))}, warnings


def read_pairs(
    path: Any,
    tokenizer: Tokenizer,
    max_bad_fraction: float,
    columns: Columns | None = None,
    *,
    with_margin: bool = False,
    without: HeldOut | None = None,
) -> tuple[list[TokenizedPair], ReadReport]:
    """Return the pairs of a file of preferences, and the report on its rows.

    Raises `DataError` where it holds none, other rows, or too many bad ones.
    """
    records, report = read_records(
        path, max_bad_fraction=max_bad_fraction, columns=columns, without=without
    )
    pairs: list[TokenizedPair] = []
    others = 0
    for record in records:
        try:
            pair = _pair(record, tokenizer)
            if pair is not None and with_margin:
                pair = replace(pair, margin=_margin(record.fields))
                record.fields.pop("margin", None)
        except DataError as error:
            report.add_bad(record.source, str(error))
            continue
        if pair is None:
            others += 1
        else:
            pairs.append(pair)
            report.note_unread_fields(record)
    report.check(max_bad_fraction)
    if others or not pairs:
        raise DataError(
            f"{path}: {others} of {len(records)} rows are no preferences: each needs a prompt, a "
            "chosen and a rejected completion"
        )
    return pairs, report


def _pair(record: Record, tokenizer: Tokenizer) -> TokenizedPair | None:
    if record.kind != "preference" or not record.chosen or not record.rejected:
        return None
    chosen, rejected = (
        encode_completion(tokenizer, record.messages, turns, record.tools)
        for turns in (record.chosen, record.rejected)
    )
    return TokenizedPair(chosen, rejected)


def encode_completion(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    turns: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
) -> TokenizedCompletion:
    """Encode the turns after a conversation as one completion of it.

    Its sampled tokens are what the assistant wrote; results of tools and users' turns between are
    context. Raises `DataError` where the template does not show every turn as it was written.
    """
    context = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]
    samples = encode_conversation(tokenizer, [*context, *turns], tools).samples
    if len(samples) > 1:
        raise DataError(
            "the chat template shows an earlier turn of a completion otherwise than it was "
            "written, as a rule without its reasoning, so its turns cannot be compared as one: put "
            "the earlier ones into the prompt, or set chat.history_reasoning: keep"
        )
    (sample,) = samples
    if not any(sample.trainable):
        raise DataError("a completion is not to be trained (weight 0)")
    start = sample.trainable.index(True)
    end = len(sample.ids) - sample.trainable[::-1].index(True)
    mask = sample.trainable[start:end]
    return TokenizedCompletion(
        sample.ids[:start], sample.ids[start:end], sampled_mask=None if all(mask) else mask
    )


def _margin(fields: dict[str, Any]) -> float:
    """Return a row's `margin`, which CSV has as text; 0 without one."""
    given = fields.get("margin", 0.0)
    try:
        margin = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        raise DataError(f"margin must be a finite number, not {given!r}")
    return margin


class OfflinePairSource:
    """Deals out given pairs, each epoch over them in another order."""

    def __init__(self, pairs: Sequence[TokenizedPair], per_iteration: int, seed: int) -> None:
        self.pairs, self.per_iteration = list(pairs), per_iteration
        # Kept, as ordering a million pairs anew for each of them would take minutes a step.
        self._order = lru_cache(2)(lambda epoch: permutation(len(self.pairs), seed, epoch, 7))

    def take(self, iteration: int) -> list[TokenizedPair]:
        """Return the pairs of an iteration, counted from 1; few pairs come more than once."""
        chosen, size = [], len(self.pairs)
        first = (iteration - 1) * self.per_iteration
        for at in range(first, first + self.per_iteration):
            chosen.append(self.pairs[int(self._order(at // size)[at % size])])
        return chosen
