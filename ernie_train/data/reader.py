"""Read files of rows in the common formats of training data, and report bad rows."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.core.foreign_files import open_regular
from ernie_train.data.formats import FORMATS, Record, RowError, detect_format, missing_keys

__all__ = ["BadRow", "ReadReport", "Record", "read_records"]

SHOWN_BAD_ROWS = 10
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".txt")


@dataclass(frozen=True)
class BadRow:
    """Name a row that could not be read, and the reason."""

    source: str  # "file:line"
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass
class ReadReport:
    """Count the rows read from a path and the rows kept, and list the bad rows."""

    path: str
    format: str = ""
    rows: int = 0
    kept: int = 0
    bad: list[BadRow] = field(default_factory=list)
    bytes_total: int = 0
    bytes_read: int = 0

    def add_format(self, name: str) -> None:
        if name not in self.format.split("+"):
            self.format = f"{self.format}+{name}" if self.format else name

    def check(self, max_bad_fraction: float) -> None:
        """Check that there are rows and that few of them are bad.

        Raises:
            DataError: there are no rows, or more than `max_bad_fraction` (0..1) of them are bad.
        """
        if not self.rows:
            raise DataError(f"{self.path} holds no rows")
        if len(self.bad) > max_bad_fraction * self.rows:
            shown = "\n".join(f"  {row}" for row in self.bad[:SHOWN_BAD_ROWS])
            more = len(self.bad) - SHOWN_BAD_ROWS
            rest = f"\n  and {more} more" if more > 0 else ""
            raise DataError(
                f"{self.path}: {len(self.bad)} of {self.rows} rows are bad, more than "
                f"max_bad_fraction {max_bad_fraction:g} allows:\n{shown}{rest}"
            )


def read_records(
    path: str | Path,
    format: str = "auto",
    max_bad_fraction: float = 0.01,
) -> tuple[list[Record], ReadReport]:
    """Read a file of rows, or a directory of such files; bad rows are skipped and reported.

    Args:
        path: a .jsonl, .jsonl.gz, .json (a list of rows) or .txt file (one document), or a
            directory of them.
        format: a name in FORMATS, or "auto" to detect it for each file from its rows.
        max_bad_fraction: the share of bad rows above which the path is refused, 0..1.

    Raises:
        DataError: the path cannot be read, the format is unknown, there are no rows, or too many
            of them are bad.
    """
    report = ReadReport(str(path))
    records = list(iter_records(path, format, report))
    report.kept = len(records)
    report.check(max_bad_fraction)
    return records, report


def iter_records(path: str | Path, format: str, report: ReadReport) -> Iterator[Record]:
    """Yield the records of a path one by one, and fill in `report`, which the caller checks.

    `path` and `format` are those of `read_records`.

    Raises:
        DataError: the path cannot be read, or the format is unknown.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"unknown format {format!r}; known are auto, {', '.join(FORMATS)}")
    files = _files(Path(path))
    report.bytes_total = sum(file.stat().st_size for file in files)
    for file in files:
        chosen = None if format == "auto" else format
        unknown: dict[str, Any] | None = None
        for source, row in _rows(file, report):
            report.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                chosen = chosen or detect_format(row)
                if chosen is None:
                    unknown = unknown or row
                    raise RowError("its keys are those of no known format")
                report.add_format(chosen)
                record = replace(_read(row, chosen), source=source)
            except RowError as error:
                report.bad.append(BadRow(source, str(error)))
            else:
                yield record
        if chosen is None and unknown is not None:
            raise DataError(_unknown_format(file, unknown))


def _read(row: dict[str, Any], format_name: str) -> Record:
    lacking = missing_keys(format_name, row)
    if lacking:
        raise RowError(lacking)
    return FORMATS[format_name].read(row)


def _unknown_format(file: Path, row: dict[str, Any]) -> str:
    formats = "; ".join(
        f"{name}: " + " or ".join(" + ".join(sorted(keys)) for keys in entry.marks)
        for name, entry in FORMATS.items()
    )
    return (
        f"{file}: cannot tell the format of rows with the keys {', '.join(sorted(row))}; "
        f"known formats and their keys are {formats}"
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
        if not files:
            raise DataError(f"the directory {path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.exists():
        raise DataError(f"data file {path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is not a {', '.join(SUFFIXES)} file")
    return [path]


def _rows(file: Path, report: ReadReport) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    """Yield ("file:line", row); for a row that cannot be parsed, a RowError instead of the row.

    Raises:
        DataError: the file cannot be read, decompressed or decoded.
    """
    try:
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_rows(file, report)
        elif file.suffix == ".json":
            yield from _json_rows(file)
        else:
            with open_regular(file) as stream:
                text = stream.read().decode("utf-8-sig")
            yield f"{file}:1", {"text": text}
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start} is {error.reason}") from error


def _jsonl_rows(file: Path, report: ReadReport) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    before = report.bytes_read
    with ExitStack() as stack:
        raw = stack.enter_context(open_regular(file))
        lines: Iterable[bytes] = raw
        if file.suffix == ".gz":
            lines = stack.enter_context(gzip.open(raw))
        for number, line in enumerate(lines, start=1):
            report.bytes_read = before + raw.tell()
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{file}:{number}", _parsed(line)


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    try:
        with open_regular(file) as stream:
            rows = json.loads(stream.read().decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file} must hold a JSON list of rows; one object a line is .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{file}:row {number}", _as_row(row)


def _parsed(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _as_row(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RowError(f"it is not UTF-8: byte {error.start} is {error.reason}")
    except json.JSONDecodeError as error:
        return RowError(f"it is not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError(f"it is not valid JSON: {error}")


def _as_row(row: Any) -> dict[str, Any] | RowError:
    if not isinstance(row, dict):
        return RowError(f"it is a {type(row).__name__}, not an object")
    return row
