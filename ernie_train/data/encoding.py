"""Encode the rows of a source as documents; what is left out is counted with its reason."""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ernie_train.core.config import HARMLESS, PathText, SampleWeight
from ernie_train.core.errors import DataError
from ernie_train.core.terminal import Terminal
from ernie_train.data.cache import DocumentStore
from ernie_train.data.chat import ChatTraining, drop_thinking, encode_chat, encode_conversation
from ernie_train.data.documents import DocumentBuilder, Documents
from ernie_train.data.formats import MappedRows, Record
from ernie_train.data.reader import (
    BadRow,
    BadRows,
    HeldOut,
    ReadReport,
    iter_records,
    prompts_of,
)
from ernie_train.data.report import SourceReport
from ernie_train.data.tokenizer import Tokenizer

Kind = Literal["sft", "pretrain"]
Overlong = Literal["drop", "truncate", "split"]
FormatName = Literal[
    "auto",
    "sharegpt",
    "erniekit",
    "alpaca",
    "preference",
    "messages",
    "prompt_completion",
    "question_answer",
    "prompt",
    "text",
]

# A truncated conversation would never show the model the end of a turn; a text is continued in
# the next document.
DEFAULT_OVERLONG: dict[Kind, Overlong] = {"sft": "drop", "pretrain": "split"}
COMMIT_TOKENS = 2**22  # are encoded before they are written to the cache
SILENT_S = 2.0  # a progress bar appears after this


class RowSource(MappedRows):
    """Configure one entry of a stage's `data`: where its rows are, and which of them count."""

    path: Annotated[PathText, Field(min_length=1), HARMLESS]
    """A file of rows, a directory, or a pattern such as `data/*.parquet` (docs/data.md)."""
    format: FormatName = "auto"
    """Format of its rows; `auto` detects it (docs/data.md)."""
    without: Annotated[PathText | None, Field(min_length=1), HARMLESS] = None
    """A file of held-out rows of the same columns: rows with a prompt of that file are left out
    (docs/data.md#held-out-rows).
    """

    def held_out(self, base_dir: Path) -> HeldOut | None:
        """Return the prompts of `without`; raises the errors of `prompts_of`."""
        if self.without is None:
            return None
        path = base_dir / self.without
        return str(path), prompts_of(path, self.format, self.columns)


class DataSource(RowSource):
    """Configure one entry of the `data` of pre-training and SFT."""

    weight: SampleWeight = 1.0
    """An epoch has round(weight x documents) samples of the source."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """Uses only this many first valid rows; all unless given."""
    include_thinking: bool = True
    """`false` trains answers without the reasoning before them."""
    overlong: Overlong | None = None
    """What becomes of rows longer than `seq_len`: `drop`, `truncate`, or `split` into documents;
    `drop` in SFT and `split` in pre-training, unless given.
    """


class _Dropped(Exception):
    """Signal a valid row that this kind of training cannot use; the text is the reason."""


Sample = tuple[list[int], list[bool]]
Encode = Callable[[Record, bool], tuple[list[Sample], list[str]]]


def encoder(tokenizer: Tokenizer, kind: Kind, training: ChatTraining) -> Encode:
    """Return a function that gives the samples of a record, and notes for the report."""

    def encode(record: Record, include_thinking: bool) -> tuple[list[Sample], list[str]]:
        if record.kind == "text":
            if kind == "sft":
                raise _Dropped("plain text, which SFT cannot use")
            ids = [*tokenizer.encode_plain(record.text or "", "the text"), tokenizer.eos_token_id]
            return [(ids, [True] * len(ids))], []
        if record.kind == "preference":
            raise _Dropped("a preference pair, which this stage cannot use")
        messages = record.messages if include_thinking else drop_thinking(record.messages)
        if kind == "pretrain":
            ids, _ = encode_chat(tokenizer, messages, record.tools)
            return [(ids, [True] * len(ids))], []
        encoded = encode_conversation(tokenizer, messages, record.tools, training)
        return [(sample.ids, sample.trainable) for sample in encoded.samples], encoded.notes

    return encode


class SourceEncoding:
    """Encode the rows of one source; may stop after any row and go on from its state."""

    def __init__(
        self,
        path: Path,
        source: DataSource,
        encode: Encode,
        seq_len: int,
        without: HeldOut | None = None,
    ) -> None:
        self.path, self.source, self.encode, self.seq_len = path, source, encode, seq_len
        self.without = without
        self.read = ReadReport(str(path))
        self.counts = SourceReport(source.path, "", source.weight, str(source.overlong))
        self.builder = DocumentBuilder()
        self.lengths: Any = array("q")
        self.records = 0  # that were encoded
        self.whole = False  # all records were encoded, and committed

    def run(self, store: DocumentStore | None = None) -> None:
        """Encode the records that are left, into `store` if there is one."""
        if not self.whole:
            self._encode(store)
        if store is not None:
            store.finish()

    def _encode(self, store: DocumentStore | None) -> None:
        done, saved, read = self.records, self.read, ReadReport(str(self.path))
        source = self.source
        records = iter_records(self.path, source.format, read, source.columns, without=self.without)
        self.read = read
        for number, record in enumerate(_with_progress(records, read), start=1):
            if number > done:
                self.add(record)
                self.records = number
            elif number == done:  # the rows so far were read again, but not encoded
                read.bad, read.unread = saved.bad, saved.unread
            if number >= done and self.counts.kept == self.source.max_examples:
                break
            if store is not None and self.builder.num_tokens >= COMMIT_TOKENS:
                self._commit(store)
        self.whole = True
        if store is not None:
            self._commit(store)

    def restore(self, store: DocumentStore) -> None:
        """Take up what was committed to `store`."""
        if not store.state:
            return
        read, counts = dict(store.state["read"]), dict(store.state["counts"])
        for report in (read, counts):
            report["left_out"] = [BadRow(**row) for row in report["left_out"]]
            bad = report["bad"]
            report["bad"] = BadRows(**{**bad, "listed": [BadRow(**row) for row in bad["listed"]]})
        for report, names in ((read, ("dropped", "unread")), (counts, ("dropped", "notes"))):
            report.update({name: Counter(report[name]) for name in names})
        self.read = ReadReport(**read)
        counts |= {"path": self.source.path, "weight": self.source.weight}
        self.counts = SourceReport(**counts)
        self.records, self.whole = store.state["records"], store.state["whole"]
        self.builder = DocumentBuilder(store.state["prefixes"], store.num_tokens)

    def report(self, documents: Documents) -> SourceReport:
        """Return the report on the rows and the documents made of them."""
        report, read = self.counts, self.read
        report.rows, report.bad = read.rows, read.bad
        report.format = read.format or self.source.format
        report.dropped.update(read.dropped)
        report.left_out = [*report.left_out, *read.left_out]
        report.unread, report.passed_over = dict(sorted(read.unread.items())), read.passed_over
        report.splits = read.splits
        report.documents, report.tokens = len(documents), len(documents.tokens)
        report.lengths = np.array(self.lengths, dtype=np.int64)
        return report

    def add(self, record: Record) -> None:
        """Encode a record, or count why it is left out."""
        try:
            samples, notes = self.encode(record, self.source.include_thinking)
            self.lengths.extend(len(ids) for ids, _ in samples)
            pieces = _fit_all(samples, self.seq_len, self.source.overlong, self.counts)
        except DataError as error:
            self.read.add_bad(record.source, str(error))
        except _Dropped as reason:
            self.counts.drop(str(reason), record.source)
        else:
            self.counts.kept += 1
            self.read.note_unread_fields(record)
            self.counts.notes.update(notes)
            for piece_ids, piece_trainable in pieces:
                self.builder.add(piece_ids, piece_trainable, record.source)
                self.counts.trainable_tokens += sum(piece_trainable[1:])

    def _commit(self, store: DocumentStore) -> None:
        reports = {"read": _plain(self.read), "counts": _plain(self.counts)}
        state = {"records": self.records, "whole": self.whole, **reports}
        store.append(self.builder, self.lengths, state)
        self.builder, self.lengths = self.builder.successor(), array("q")


def _plain(report: ReadReport | SourceReport) -> dict[str, Any]:
    values = {key: value for key, value in vars(report).items() if key != "lengths"}
    left_out = [asdict(row) for row in report.left_out]
    return {**values, "bad": asdict(report.bad), "left_out": left_out}


def _fit_all(
    samples: list[Sample], seq_len: int, overlong: Overlong | None, report: SourceReport
) -> list[Sample]:
    """Return the documents of all samples of a row; raises `_Dropped` if none is left."""
    fitted: list[Sample] = []
    reasons: list[_Dropped] = []
    for ids, trainable in samples:
        try:
            fitted += _fit(ids, trainable, seq_len, overlong, report)
        except _Dropped as reason:
            reasons.append(reason)
    if not fitted:
        raise reasons[0]
    return fitted


def _fit(
    ids: list[int],
    trainable: list[bool],
    seq_len: int,
    overlong: Overlong | None,
    report: SourceReport,
) -> list[Sample]:
    """Return the documents of one row, (ids, trainable) each, none longer than seq_len.

    Raises:
        _Dropped: the row has no trainable token, or is too long and to be dropped.
    """
    # The first token of a document is never a label.
    if not any(trainable[1:]):
        raise _Dropped("without a trainable token")
    if len(ids) <= seq_len:
        return [(ids, trainable)]
    report.over_seq_len += 1
    if overlong == "drop":
        raise _Dropped("longer than seq_len")
    if overlong == "truncate":
        if not any(trainable[1:seq_len]):
            raise _Dropped("without a trainable token within seq_len")
        report.truncated += 1
        return [(ids[:seq_len], trainable[:seq_len])]
    # Consecutive parts share one token, so that the first new token of the next part is a label.
    starts = range(0, len(ids) - 1, seq_len - 1)
    pieces = [(ids[at : at + seq_len], trainable[at : at + seq_len]) for at in starts]
    return [piece for piece in pieces if any(piece[1][1:])]


def refit(documents: Documents, source: DataSource, kind: Kind, seq_len: int) -> Documents:
    """Fit documents of `source` that were loaded for a longer seq_len to a shorter one.

    Documents longer than `seq_len` are split, truncated or dropped, as `source.overlong` says.
    """
    if not len(documents) or int(documents.lengths.max()) <= seq_len:
        return documents
    overlong = source.overlong or DEFAULT_OVERLONG[kind]
    report = SourceReport(source.path, "", source.weight, overlong)
    builder = DocumentBuilder()
    for document in documents:
        try:
            pieces = _fit(
                document.ids.tolist(), document.trainable.tolist(), seq_len, overlong, report
            )
        except _Dropped:
            continue
        for ids, trainable in pieces:
            builder.add(ids, trainable, document.source)
    return builder.build()


def _with_progress(records: Iterator[Record], read: ReadReport) -> Iterator[Record]:
    """Yield the records; show a progress bar in a terminal if reading takes longer."""
    console = Terminal(stderr=True)
    started = time.monotonic()
    for record in records:
        yield record
        if console.is_terminal and time.monotonic() - started > SILENT_S:
            break
    else:
        return
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"encoding {Path(read.path).name}", total=read.bytes_total)
        for number, record in enumerate(records):
            if number % 64 == 0:
                progress.update(task, completed=read.bytes_read)
            yield record
