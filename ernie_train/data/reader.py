"""Read data files of every known container and format, and report bad rows."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data.files import container, find_files, read_rows
from ernie_train.data.formats import (
    FORMATS,
    BlankAnswer,
    ColumnMap,
    Columns,
    Record,
    Row,
    RowError,
    as_prompt,
    detect_format,
    missing_keys,
)

__all__ = ["BadRow", "ReadReport", "Record", "iter_records", "read_records"]

HeldOut = tuple[str, frozenset[bytes]]  # a path, and the `Record.prompt_key` of its rows
_log = logging.getLogger(__name__)
SHOWN_BAD_ROWS = 10
LISTED_ROWS = 100
# Keys of rows that verifiers read, or that name the row: no surprise that training reads none.
FOR_VERIFIERS = {
    *("id", "task", "domain", "reward", "answer", "tests", "hidden_tests", "entry_point"),
    *("setup", "preamble", "solution", "pass_rate", "assignment", "choices", "rubric"),
    *("expected_calls", "rg_task", "rg_entry", "difficulty", "tools", "source", "data_source"),
    *("ground_truth", "reward_model", "ability"),
}
_KNOWN_KEYS = {
    *(key for entry in FORMATS.values() for marks in entry.marks for key in marks),
    *("input", "history", "context", "system", "tools"),
}
_PLAIN_KEY = re.compile(r"\w[\w -]*")  # needs no quotes in YAML
# A file of which no row has a known format is given up after so many.
MOST_UNKNOWN_ROWS = 1000


@dataclass(frozen=True)
class BadRow:
    """Name a row that could not be read, and the reason."""

    source: str  # "file:line"
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass
class BadRows:
    """Count bad rows and list some: the first ones, and the first of each of the first reasons.

    reasons: the number of rows of each of the first reasons. What is kept does not grow with the
    number of rows.
    """

    count: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    listed: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow, *, listed: bool = False) -> None:
        """Count a row; `listed` lists it wherever it stands."""
        self.count += 1
        is_new = row.reason not in self.reasons and len(self.reasons) < LISTED_ROWS
        if is_new:
            self.reasons[row.reason] = 0
        if row.reason in self.reasons:
            self.reasons[row.reason] += 1
        if listed or is_new or self.count <= LISTED_ROWS:
            self.listed.append(row)

    def update(self, other: "BadRows") -> None:
        """Count the rows of another path too."""
        self.count += other.count
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.listed += other.listed


def grouped(bad: BadRows, left_out: Sequence[BadRow], dropped: Mapping[str, int]) -> list[str]:
    """Return a line for each reason: how many rows have it, and the first of them.

    `dropped` are the numbers of the reasons of which `left_out` lists the first rows alone.
    """
    first: dict[str, BadRow] = {}
    for row in [*bad.listed, *left_out]:
        first.setdefault(row.reason, row)
    counts = {**bad.reasons, **dropped}
    return [
        f"{counts[reason]} rows: {reason}, first at {row.source}"
        if counts[reason] > 1
        else str(row)
        for reason, row in first.items()
    ]


def remarks(
    path: str,
    dropped: Mapping[str, int],
    bad: BadRows,
    unread: Mapping[str, int],
    passed_over: str,
) -> list[str]:
    """Return a line for everything of a path that was left out or is not read."""
    reasons = [f"{count} {reason}" for reason, count in dropped.items()]
    reasons += [f"{bad.count} bad, first {bad.listed[0]}"] if bad.count else []
    keys = ", ".join(f"{key} ({count})" for key, count in sorted(unread.items()))
    told = {
        f"left out of {path}": "; ".join(reasons),
        f"keys of {path} that nothing reads": keys,
        f"passed over in {path}": passed_over,
    }
    return [f"{what}: {text}" for what, text in told.items() if text]


def splits_warning(path: str, splits: list[str]) -> str:
    """Return a line that says that a path holds several splits."""
    return f"{path} holds several splits, {', '.join(splits)}, and all are read: name one of them"


@dataclass
class ReadReport:
    """Count the rows read from a path, the rows kept and the bad rows.

    dropped: rows left out for a reason that is no fault, by reason.
    unread: keys of messages that nothing reads, with the number of rows that have them.
    passed_over: names in a directory that hold no rows.
    splits: names of splits such as train and test, where the files are of several.
    wanted: says of a source ("file:line") whether its row is listed, though many were left out.
    """

    path: str
    format: str = ""
    rows: int = 0
    kept: int = 0
    bad: BadRows = field(default_factory=BadRows)
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: list[BadRow] = field(default_factory=list)  # the first dropped rows
    unread: Counter[str] = field(default_factory=Counter)
    files: int = 0
    passed_over: str = ""
    splits: list[str] = field(default_factory=list)
    bytes_total: int = 0
    bytes_read: int = 0
    wanted: Callable[[str], bool] | None = None

    def add_format(self, name: str) -> None:
        if name not in self.format.split("+"):
            self.format = f"{self.format}+{name}" if self.format else name

    def drop(self, reason: str, source: str) -> None:
        """Count a row that is left out, and name it if it is one of the first."""
        self.dropped[reason] += 1
        if len(self.left_out) < LISTED_ROWS or self._is_wanted(source):
            self.left_out.append(BadRow(source, reason))

    def add_bad(self, source: str, reason: str) -> None:
        """Count a row that cannot be read."""
        self.bad.add(BadRow(source, reason), listed=self._is_wanted(source))

    def _is_wanted(self, source: str) -> bool:
        return self.wanted is not None and self.wanted(source)

    def note_unread_fields(self, record: Record) -> None:
        """Count the keys of a row that training does not read."""
        self.unread.update(record.fields.keys() - FOR_VERIFIERS)

    def remarks(self) -> list[str]:
        """Return a line for everything that was left out or is not read."""
        return remarks(self.path, self.dropped, self.bad, self.unread, self.passed_over)

    def warn(self) -> None:
        """Log what was left out or mixed, once a process; for callers that show no report."""
        for line in remarks(self.path, self.dropped, self.bad, {}, ""):
            _warn_once(line)
        if self.splits:
            _warn_once(splits_warning(self.path, self.splits))

    def check(self, max_bad_fraction: float, remedy: str = "") -> None:
        """Check that there are rows and that few of them are bad; `remedy` ends the message.

        Raises:
            DataError: there are no rows, or more than `max_bad_fraction` (0..1) of them are bad.
        """
        if not self.rows:
            raise DataError(f"{self.path} holds no rows")
        if self.bad.count > max_bad_fraction * self.rows:
            shown = "\n".join(f"  {row}" for row in self.bad.listed[:SHOWN_BAD_ROWS])
            more = self.bad.count - SHOWN_BAD_ROWS
            rest = f"\n  and {more} more" if more > 0 else ""
            rest += f"\n{remedy}" if remedy else ""
            raise DataError(
                f"{self.path}: {self.bad.count} of {self.rows} rows are bad, more than "
                f"max_bad_fraction {max_bad_fraction:g} allows:\n{shown}{rest}"
            )


@cache
def _warn_once(line: str) -> None:
    _log.warning("%s", line)


def read_records(
    path: str | Path,
    format: str = "auto",
    max_bad_fraction: float = 0.01,
    columns: Columns | None = None,
    *,
    prompts: bool = False,
    without: HeldOut | None = None,
) -> tuple[list[Record], ReadReport]:
    """Read the rows of a file, of a directory of files or of a pattern; bad rows are reported.

    Args:
        path: a file of JSON lines, a JSON list, CSV, Parquet, Arrow or text (one document), a
            directory of them, or a pattern such as `data/*.parquet`.
        format: a name in FORMATS, or "auto" to detect it from the keys of each row.
        max_bad_fraction: the share of bad rows above which the path is refused, 0..1.
        columns: what to read the columns of a row as, by key; None leaves their names.
        prompts: rows are asked, so that they need no answer.
        without: prompts whose rows are left out, and the file that holds them.

    Raises:
        DataError: the path cannot be read, the format is unknown, there are no rows, or too many
            of them are bad.
    """
    report = ReadReport(str(path))
    records = list(iter_records(path, format, report, columns, prompts=prompts, without=without))
    report.kept = len(records)
    report.check(max_bad_fraction)
    return records, report


def iter_records(
    path: str | Path,
    format: str,
    report: ReadReport,
    columns: Columns | None = None,
    *,
    prompts: bool = False,
    without: HeldOut | None = None,
) -> Iterator[Record]:
    """Yield the records of a path one by one, and fill in `report`, which the caller checks.

    The other arguments are those of `read_records`.

    Raises:
        DataError: the path cannot be read, or the format is unknown.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"unknown format {format!r}; known are auto, {', '.join(FORMATS)}")
    found = find_files(path)
    report.files, report.passed_over = len(found.files), found.note()
    report.splits = found.splits()
    report.bytes_total = sum(file.stat().st_size for file in found.files)
    mapped = ColumnMap(columns)
    change = (lambda row: as_prompt(mapped(row))) if prompts else mapped
    try:
        for file in found.files:
            for record in _file_records(file, format, report, change):
                if without is not None and record.prompt_key in without[1]:
                    report.drop(f"held out in {without[0]}", record.source)
                else:
                    yield record
    except _UnknownFormat:
        mapped.check(str(path))  # the likelier reason
        raise
    mapped.check(str(path))


def prompts_of(path: str | Path, format: str, columns: Columns | None) -> frozenset[bytes]:
    """Return the keys of all prompts of a path (`Record.prompt_key`).

    Raises `DataError` if the path cannot be read, or any of its rows cannot.
    """
    read = ReadReport(str(path))
    found = frozenset(record.prompt_key for record in iter_records(path, format, read, columns))
    read.check(0.0, "rows that are held out must all be read, or they might be trained on")
    return found


class _UnknownFormat(DataError):
    """A file of which no row has a known format."""


def _file_records(
    file: Path, format: str, report: ReadReport, change: Callable[[Row], Row]
) -> Iterator[Record]:
    chosen = None if format == "auto" else format
    before = report.bytes_read
    unknown: Row | None = None
    unknown_rows = 0

    def on_bytes(count: int) -> None:
        report.bytes_read = before + count

    for source, row in read_rows(file, on_bytes):
        report.rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            row = change(row)
            if format == "auto":
                chosen = detect_format(row) or chosen
            if chosen is None:
                unknown, unknown_rows = unknown or row, unknown_rows + 1
                if unknown_rows > MOST_UNKNOWN_ROWS:
                    break
                raise RowError("its keys are those of no known format")
            report.add_format(chosen)
            record = replace(_read(row, chosen), source=source)
        except BlankAnswer as reason:
            report.drop(str(reason), source)
        except RowError as error:
            report.add_bad(source, str(error))
        else:
            report.unread.update(record.unread)
            yield record
    on_bytes(file.stat().st_size)
    if chosen is None and unknown is not None:
        raise _UnknownFormat(_unknown_format(file, unknown))


def _read(row: Row, format_name: str) -> Record:
    lacking = missing_keys(format_name, row)
    if lacking:
        raise RowError(lacking)
    return FORMATS[format_name].read(row)


def _unknown_format(file: Path, row: dict[str, Any]) -> str:
    known = "; ".join(
        name if {name} == (marks := entry.marks[0]) else f"{name} ({' + '.join(sorted(marks))})"
        for name, entry in FORMATS.items()
    )
    found = ", ".join(sorted(row)) or "(none: every value is null)"
    if container(file)[0] in (".csv", ".tsv"):
        found += " (the first line of such a file names its columns)"
    return (
        f"{file}: cannot tell the format of rows with the keys {found}\n"
        f"known formats: {known} (docs/data.md)\n"
        f"say what yours are: --columns '{{{_columns_hint(row)}}}' "
        "(or the recipe's `columns:`)"
    )


def _columns_hint(row: Row) -> str:
    """Return columns that would name the keys of a row, where they differ by capitals alone."""
    own = {key.strip().lower(): key for key in row if _PLAIN_KEY.fullmatch(key)}
    if detect_format(dict.fromkeys(own)) is None:
        return "question: frage, answer: antwort"
    return ", ".join(f"{key}: {own[key]}" for key in own if key in _KNOWN_KEYS)
