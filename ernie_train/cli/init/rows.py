"""The model and the rows that a recipe is written for, read as far as the recipe needs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import cast

from ernie_train.core.errors import DataError
from ernie_train.data import (
    Columns,
    ReadReport,
    Record,
    SourceReport,
    Tokenizer,
    encode_records,
    iter_records,
    load_tokenizer,
    require_chat_template,
)
from ernie_train.data.conversation import ANOTHER_TEMPLATE
from ernie_train.data.encoding import Kind
from ernie_train.data.reader import grouped, remarks
from ernie_train.io.shipped import shared_path
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.rl.preference_data import encode_completion, read_pairs
from ernie_train.weights.hf import load_config
from ernie_train.weights.model_directory import find_model

ROWS_READ = 2000  # of the data, for their format and lengths
LONGEST_ROW = 8192  # tokens; longer rows are left out
BAD_ROWS = 0.01
SHOWN_REASONS = 10
_REMEDY = "mend them, or let more be left out: --max-bad-fraction"
TOOL_TEMPLATE = "recipes/chatml_tools.jinja"


@dataclass(frozen=True)
class OwnModel:
    """A model directory, or a run, with its tokenizer; `template` is another chat template."""

    path: Path
    template: str | None = None

    @cached_property
    def config(self) -> Ernie4_5_MoeConfig:
        return load_config(find_model(self.path).weights)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(find_model(self.path).tokenizer, template=self.template)

    def checked(self) -> OwnModel:
        """Return itself; raises `UserError` if model or tokenizer cannot be read."""
        _ = self.config, self.tokenizer
        return self

    def encodes(self, record: Record, kind: str, seq_len: int) -> bool:
        """Return whether a stage of `kind` trains on the record, in at most `seq_len` tokens."""
        if record.kind == "preference":
            turns = (record.chosen or [], record.rejected or [])
            try:
                pair = [
                    encode_completion(self.tokenizer, record.messages, one, record.tools)
                    for one in turns
                ]
            except DataError:
                return False
            return max(one.length for one in pair) <= seq_len
        read, as_kind = ReadReport(record.source), cast(Kind, kind)
        documents, _ = encode_records([record], read, self.tokenizer, kind=as_kind, seq_len=seq_len)
        return len(documents) > 0


@dataclass(frozen=True)
class Rows:
    """Hold what rows of the data were found to be.

    longest: tokens of the longest one. tokens: of all rows of the data, by those that were read.
    remarks: lines on rows that were left out, and on keys that nothing reads.
    """

    kind: str  # of the stage that trains on them
    format: str
    count: int
    longest: int
    tokens: int
    whole: bool  # all rows were read
    remarks: tuple[str, ...] = ()

    def without(self, count: int) -> Rows:
        """Return what is left of them where so many are held out."""
        tokens = round(self.tokens * (1 - count / max(1, self.count)))
        return replace(self, count=self.count - count, tokens=tokens)


@dataclass(frozen=True)
class RowsRead:
    """Say how the data is read: its columns, the longest row, the share that may be unreadable."""

    columns: Columns | None = None
    seq_len: int | None = None
    max_bad_fraction: float = BAD_ROWS

    def of(self, data: str, model: OwnModel) -> Rows:
        """Return what the rows are; raises `DataError` if no recipe trains on them."""
        read = ReadReport(data)
        found = iter_records(data, "auto", read, self.columns)
        records = list(islice(found, ROWS_READ))
        whole = next(found, None) is None
        read.check(self.max_bad_fraction, _REMEDY)
        kind = _kind(data, records)
        if kind != "pretrain":
            require_chat_template(model.tokenizer)
        limit = min(model.config.max_position_embeddings, self.seq_len or LONGEST_ROW)
        if kind == "dpo":
            pairs, _ = read_pairs(data, model.tokenizer, self.max_bad_fraction, self.columns)
            lengths = [one.length for pair in pairs for one in pair.completions]
            kept = [length for length in lengths if length <= limit]
            whole, count, tokens = True, len(pairs), sum(lengths)
            remarked: tuple[str, ...] = ()
        else:
            as_kind = cast(Kind, kind)
            _, report = encode_records(records, read, model.tokenizer, kind=as_kind, seq_len=limit)
            source = report.sources[0]
            kept = [int(length) for length in source.lengths if length <= limit]
            count, tokens = source.kept, source.tokens
            if not count and (len(kept) or not len(source.lengths)):
                raise _nothing_left(data, source)
            read.check(self.max_bad_fraction, "\n".join([_REMEDY, *_another_template(source)]))
            found_out = (source.dropped, source.bad, source.unread, source.passed_over)
            remarked = tuple(remarks(data, *found_out))
        if not kept and kind != "pretrain":
            raise DataError(f"{data}: no row has at most {limit} tokens")
        if not whole:
            share = max(1, read.bytes_total) / max(1, read.bytes_read)
            count, tokens = round(count * share), round(tokens * share)
        return Rows(kind, read.format, count, max(kept, default=limit), tokens, whole, remarked)


def _kind(data: str, records: list[Record]) -> str:
    """Return the kind of the stage that trains on the records."""
    if not records:
        raise DataError(f"{data}: every row is left out; `preview` says why")
    kinds = {record.kind for record in records}
    kind = {"text": "pretrain", "chat": "sft", "preference": "dpo"}.get("+".join(kinds))
    if kind is None:
        raise DataError(
            f"{data}: rows of {' and '.join(sorted(kinds))} are none that init writes a "
            "recipe for; it does for conversations or answers (sft), texts (pretrain) and "
            "pairs (dpo). Prompts with a verifier are for RL: docs/upo.md"
        )
    return kind


def _nothing_left(data: str, source: SourceReport) -> DataError:
    """Return the error that says why every row is left out."""
    lines = grouped(source.bad, source.left_out, source.dropped)
    if len(lines) > SHOWN_REASONS:
        lines[SHOWN_REASONS:] = ["and other reasons"]
    lines += _another_template(source)
    return DataError(f"{data}: every row is left out:\n  " + "\n  ".join(lines))


def _another_template(source: SourceReport) -> list[str]:
    """Return a line that names a template, if rows are bad because the model's has no place."""
    if not any(ANOTHER_TEMPLATE in row.reason for row in source.bad.listed):
        return []
    return [f"another template shows them: --template {shared_path(TOOL_TEMPLATE)}, or your own"]
