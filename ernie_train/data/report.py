"""Report on the data of a stage: rows, lengths, packing fill, and a preview of a document."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ernie_train.data.documents import EncodedDocument
from ernie_train.data.reader import LISTED_ROWS, BadRow, BadRows, remarks, splits_warning
from ernie_train.data.tokenizer import Tokenizer

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
TRAINED, UNTRAINED, LOUD = "bold green", "dim", "bold yellow"


@dataclass
class SourceReport:
    """Hold the counts and lengths of one source.

    `rows` is the sum of `kept`, `bad` and `dropped` (reason -> count). `lengths` are in tokens, of
    the encoded rows before anything is cut. `over_seq_len` counts the rows that were longer than
    seq_len and were handled as `overlong` says; `truncated` counts those of them that were cut.
    `left_out` names the first rows that were dropped. `unread` counts the rows with a key that
    nothing reads; `passed_over` names what lies beside the data files, `splits` those of the files.
    `notes` counts what a user should know about kept rows.
    """

    path: str
    format: str
    weight: float
    overlong: str
    rows: int = 0
    kept: int = 0
    bad: BadRows = field(default_factory=BadRows)
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: list[BadRow] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    passed_over: str = ""
    splits: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    over_seq_len: int = 0
    truncated: int = 0
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def drop(self, reason: str, source: str) -> None:
        """Count a row that is left out, and name it if it is one of the first."""
        self.dropped[reason] += 1
        if len(self.left_out) < LISTED_ROWS:
            self.left_out.append(BadRow(source, reason))

    @property
    def share_truncated(self) -> float:
        """Return the share of the encoded rows that were cut, 0..1."""
        return self.truncated / max(len(self.lengths), 1)

    def percentiles(self) -> dict[str, int]:
        """Return percentiles of the lengths of encoded rows, in tokens; empty without rows."""
        if not len(self.lengths):
            return {}
        values = np.percentile(self.lengths, list(PERCENTILES.values()), method="higher")
        return dict(zip(PERCENTILES, map(int, values), strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "format": self.format,
            "weight": self.weight,
            "rows": self.rows,
            "kept": self.kept,
            "bad": self.bad.count,
            "bad_rows": [str(row) for row in self.bad.listed[:LISTED_ROWS]],
            "dropped": dict(self.dropped),
            "dropped_rows": [str(row) for row in self.left_out],
            "unread": dict(self.unread),
            "passed_over": self.passed_over,
            "splits": list(self.splits),
            "notes": dict(self.notes),
            "documents": self.documents,
            "tokens": self.tokens,
            "trainable_tokens": self.trainable_tokens,
            "lengths": self.percentiles(),
            "overlong": self.overlong,
            "over_seq_len": self.over_seq_len,
            "share_truncated": self.share_truncated,
        }


@dataclass
class DataReport:
    """Hold the reports of all sources; `packing_fill` is the share of tokens not padding, 0..1.

    `warnings` are of settings that do not go with the rows.
    """

    sources: list[SourceReport]
    seq_len: int
    packing_fill: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def total(self) -> SourceReport:
        """Return the sum of all sources."""
        total = SourceReport("total", "", 1.0, "")
        counts = "rows kept documents tokens trainable_tokens over_seq_len truncated"
        for source in self.sources:
            for name in counts.split():
                setattr(total, name, getattr(total, name) + getattr(source, name))
            total.bad.update(source.bad)
            total.dropped.update(source.dropped)
            total.notes.update(source.notes)
        if self.sources:
            total.lengths = np.concatenate([source.lengths for source in self.sources])
        return total

    def to_dict(self) -> dict[str, Any]:
        total = self.total().to_dict()
        of_one = "path format weight overlong dropped_rows unread passed_over splits"
        for key in of_one.split():
            del total[key]
        return {
            "seq_len": self.seq_len,
            "packing_fill": self.packing_fill,
            "total": total,
            "sources": [source.to_dict() for source in self.sources],
        }

    def as_table(self) -> Table:
        """Return a table for a terminal of 80 columns; below it, why rows were left out."""
        table = Table(title="Data", caption=self._caption(), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("source", overflow="fold", min_width=16)
        for name in ("rows", "kept", "tokens", "trained", *PERCENTILES, "cut"):
            table.add_column(name, justify="right", no_wrap=True)
        for source in self.sources:
            table.add_row(*_cells(source))
        if len(self.sources) > 1:
            table.add_section()
            table.add_row(*_cells(self.total()))
        return table

    def _caption(self) -> Text:
        lines = [
            "lengths p50..max in tokens, before cutting; "
            f"rows of {self.seq_len} tokens, packed {100 * self.packing_fill:.1f} % full"
        ]
        text = Text("\n".join([*lines, *self._left_out()]), "table.caption")
        for source in self.sources:
            if source.splits:
                text.append("\n").append(splits_warning(source.path, source.splits), LOUD)
            if source.over_seq_len and source.overlong == "drop":
                warning = too_long_warning(
                    f"{source.over_seq_len} of {source.rows} rows of {source.path}",
                    f"seq_len={self.seq_len}",
                    int(source.lengths.max()),
                    "raise seq_len, or set overlong: truncate",
                )
                text.append("\n").append_text(warning)
        for line in self.warnings:
            text.append("\n").append(f"warning: {line}", LOUD)
        return text

    def _left_out(self) -> list[str]:
        lines = []
        for source in self.sources:
            lines += remarks(
                source.path, source.dropped, source.bad, source.unread, source.passed_over
            )
            lines += [f"{source.path}: {count} {note}" for note, count in source.notes.items()]
        return lines


def too_long_warning(what: str, bound: str, longest: int, remedy: str) -> Text:
    """Return a line that says loudly which rows are left out for their length, and the fix."""
    line = (
        f"{what} are longer than {bound} and left out; the longest has {longest} tokens: {remedy}"
    )
    return Text(line, LOUD, overflow="fold")


def _cells(source: SourceReport) -> list[str | Text]:
    lengths = source.percentiles()
    times = "" if source.weight == 1 else f" x{source.weight:g}"
    numbers = [source.rows, source.kept, source.tokens, source.trainable_tokens]
    numbers += [lengths.get(name, 0) for name in PERCENTILES]
    return [
        Text(source.path + times),
        *map(_compact, numbers),
        f"{100 * source.share_truncated:.1f} %",
    ]


def _compact(number: int) -> str:
    """Format a count with 3 digits: 12345 as 12.3k, 1234567 as 1.23M; below 10,000 in full."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        # 999,500 rounds to 1000k, which is 1M.
        if number >= max(0.9995 * size, 10_000):
            return f"{number / size:.3g}{unit}"
    return str(number)


# ---- preview -----------------------------------------------------------------------------------


def preview(
    tokenizer: Tokenizer,
    document: EncodedDocument,
    max_tokens: int = 400,
    console: Console | None = None,
) -> Text:
    """Return a document's text, what is trained in green, or between ⟦ and ⟧ without colours.

    Newlines are marked with ⏎. Of more than `max_tokens` tokens the first and last ones are shown.
    `console` is where it will be printed; None is one with colours.
    """
    marks = console is not None and (console.no_color or console.color_system is None)
    ids = document.ids.tolist()
    # The first token is never a label, even if it is marked as trainable.
    trained = [False, *document.trainable[1:].tolist()]
    head = len(ids) if len(ids) <= max_tokens else (max_tokens + 1) // 2
    tail = max(head, len(ids) - max_tokens // 2)
    text = _shown(tokenizer, ids[:head], trained[:head], marks)
    if tail > head:
        text.append(f" [... {tail - head} more tokens ...] ", style="italic")
    return text.append_text(_shown(tokenizer, ids[tail:], trained[tail:], marks))


def _shown(tokenizer: Tokenizer, ids: list[int], trained: list[bool], marks: bool) -> Text:
    text = Text()
    tokens = zip(ids, trained, strict=True)
    for is_trained, run in groupby(tokens, key=lambda token: token[1]):
        shown = _visible(tokenizer.decode([token_id for token_id, _ in run]))
        if is_trained and marks:
            shown = f"⟦{shown}⟧"
        text.append(shown, style=TRAINED if is_trained else UNTRAINED)
    return text


def _visible(text: str) -> str:
    # Data may contain terminal escape sequences; they are escaped, so that they have no effect.
    shown = (
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(shown).replace("\n", "⏎\n")
