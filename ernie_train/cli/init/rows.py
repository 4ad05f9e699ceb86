"""The model and the rows that a recipe is written for, read as far as the recipe needs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import cast

from ernie_train.cli.init.problems import Problems, grades, read_problems
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
from ernie_train.eval.prompts import encode_prompt
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
# Kinds of records that a kind of stage trains on; the first one that takes a file's is its default.
TRAINS = {
    "sft": {"chat"},
    "pretrain": {"text"},
    "dpo": {"preference"},
    "upo": {"prompt", "chat"},
}


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
        """Return whether a stage of `kind` trains on the record, in at most `seq_len` tokens.

        In reinforcement learning those are tokens of its prompt.
        """
        if kind == "upo":
            try:
                return grades(record) and len(encode_prompt(self.tokenizer, record)) <= seq_len
            except DataError:
                return False
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
    graded: those of sft also have what a verifier grades by, all of them. problems: what they are
    in reinforcement learning, where longest and tokens are those of prompts.
    """

    kind: str  # of the stage that trains on them
    format: str
    count: int
    longest: int
    tokens: int
    whole: bool  # all rows were read
    remarks: tuple[str, ...] = ()
    graded: bool = False
    problems: Problems | None = None

    def without(self, count: int) -> Rows:
        """Return what is left of them where so many are held out."""
        tokens = round(self.tokens * (1 - count / max(1, self.count)))
        return replace(self, count=self.count - count, tokens=tokens)


@dataclass(frozen=True)
class RowsRead:
    """Say how the data is read.

    columns: of its rows. seq_len: the longest row. max_bad_fraction: rows that may be unreadable.
    kind: of the stage that is to train on it; None: that of `TRAINS`.
    """

    columns: Columns | None = None
    seq_len: int | None = None
    max_bad_fraction: float = BAD_ROWS
    kind: str | None = None

    def of(self, data: str, model: OwnModel) -> Rows:
        """Return what the rows are; raises `DataError` if no recipe trains on them."""
        read = ReadReport(data)
        found = iter_records(data, "auto", read, self.columns)
        records = list(islice(found, ROWS_READ))
        whole = next(found, None) is None
        read.check(self.max_bad_fraction, _REMEDY)
        kind = _kind(data, records, self.kind)
        if kind != "pretrain":
            require_chat_template(model.tokenizer)
        limit = min(model.config.max_position_embeddings, self.seq_len or LONGEST_ROW)
        if kind == "upo":
            return self._problems(data, read.format, limit, model)
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
        longest, graded = max(kept, default=limit), kind == "sft" and all(map(grades, records))
        return Rows(kind, read.format, count, longest, tokens, whole, remarked, graded)

    def _problems(self, data: str, format: str, limit: int, model: OwnModel) -> Rows:
        found = read_problems(
            data,
            model.tokenizer,
            limit=limit,
            seq_len=self.seq_len,
            columns=self.columns,
            max_bad_fraction=self.max_bad_fraction,
        )
        count, longest, tokens = len(found.prompts), max(found.prompts), sum(found.prompts)
        return Rows("upo", format, count, longest, tokens, True, found.remarks, problems=found)


def _kind(data: str, records: list[Record], asked: str | None) -> str:
    """Return the kind of the stage that trains on the records, which is `asked` for if given."""
    if not records:
        raise DataError(f"{data}: every row is left out; `preview` says why")
    kinds = {record.kind for record in records}
    fitting = [kind for kind, trained in TRAINS.items() if kinds <= trained]
    if asked in fitting or (asked is None and fitting and len(kinds) == 1):
        return asked or fitting[0]
    if asked is None and fitting:
        raise DataError(
            f"{data}: rows of {' and '.join(sorted(kinds))}: give --kind {' or '.join(fitting)}, "
            "which trains on all of them"
        )
    raise DataError(
        f"{data}: rows of {' and '.join(sorted(kinds))} are none "
        + (f"that --kind {asked} trains on" if asked else "that init writes a recipe for")
        + ": sft takes conversations and answers, pretrain texts, dpo pairs, upo prompts with "
        "what completions are graded by"
    )


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
