"""Read the rows of one file: JSON lines, JSON lists, CSV, plain text, Parquet and Arrow.

Rows come one by one, so that memory does not grow with the file. A reader yields
("file:line", row); for a row that cannot be parsed, a RowError instead of the row.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from ernie_train.core.errors import DataError
from ernie_train.core.foreign_files import open_regular
from ernie_train.data.files.find import container, is_json_lines
from ernie_train.data.files.heads import check_head
from ernie_train.data.formats.values import Row, RowError, kind_of, shown

Located = tuple[str, Row | RowError]

BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
CHUNK_CHARACTERS = 2**20
LONGEST_ROW = 2**24  # characters of a row; bytes of a line
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a pair
TABLE_ROWS = 64  # rows of a Parquet or Arrow file that are made at a time
_TOO_LONG = f"more than {LONGEST_ROW} bytes"
_LIST_FILE = "a list of rows is a .json file"
_LONE_CR = "a lone CR; save it with line breaks LF or CRLF"


def read_rows(
    file: Path, on_bytes: Callable[[int], None], *, as_lines: bool = False
) -> Iterator[Located]:
    """Yield ("file:line", row) for each row; calls `on_bytes` with the bytes read so far.

    `as_lines` reads JSON lines whatever the name says, and keeps halves of surrogate pairs in them,
    which completions of a model may have.

    Raises:
        DataError: the file cannot be read, decompressed or decoded.
    """
    kind, compression = container(file)
    kind = ".jsonl" if as_lines else kind
    try:
        check_head(file, kind, compression)
        if kind in (".parquet", ".arrow"):
            yield from _table_rows(file, kind, on_bytes)
            return
        if kind == ".json":
            with _opened(file, compression, lambda count: None) as text:
                kind = ".jsonl" if is_json_lines(text.stream) else kind
        with _opened(file, compression, on_bytes) as text:
            yield from _json_lines(text, halves=True) if as_lines else _READERS[kind](text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is not a whole gzip file: {error}") from error
    except OSError as error:
        what = "is not a whole zstd file" if compression == ".zst" else "cannot be read"
        raise DataError(f"{file} {what}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(file, error.start, error.reason)) from error


def _not_utf8(what: object, at: int, reason: str, file: str = "it") -> str:
    return f"{what} is not UTF-8: byte {at} is {reason}; save {file} as UTF-8"


@dataclass
class _Text:
    """Hold an open text file, decompressed; `raw` is what lies on the disk."""

    file: Path
    raw: BinaryIO
    stream: BinaryIO
    on_bytes: Callable[[int], None]

    def lines(self) -> Iterator[bytes]:
        """Yield the lines; of one of more than LONGEST_ROW bytes no more than one byte beyond."""
        while line := self.stream.readline(LONGEST_ROW + 1):
            part = line
            while len(part) > LONGEST_ROW and not part.endswith(b"\n"):
                part = self.stream.readline(LONGEST_ROW + 1)
            self.on_bytes(self.raw.tell())
            yield line.removeprefix(BOM)

    def characters(self) -> Callable[[int], str]:
        """Return a function that reads text of so many more bytes; "" at the end."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        total = 0

        def read(count: int) -> str:
            nonlocal total
            self.on_bytes(self.raw.tell())
            chunk = self.stream.read(count)
            total += len(chunk)
            try:
                return decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = total - len(error.object) + error.start
                raise DataError(_not_utf8(self.file, at, error.reason)) from error

        return read


@contextmanager
def _opened(file: Path, compression: str, on_bytes: Callable[[int], None]) -> Iterator[_Text]:
    with ExitStack() as stack:
        raw = stack.enter_context(open_regular(file))
        stream: Any = raw
        if compression == ".gz":
            stream = stack.enter_context(gzip.open(raw))
        elif compression == ".zst":
            import pyarrow as pa  # takes long to import

            stream = io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
        if stream.peek(2).startswith(UTF_16):
            raise DataError(f"{file} is not UTF-8 but UTF-16; save it as UTF-8")
        yield _Text(file, raw, stream, on_bytes)


# ---- JSON ----------------------------------------------------------------------------------------


class _Decoder(json.JSONDecoder):
    """Decode JSON; `twice` is a key that an object of the last text has twice, and would lose."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice: str | None = None

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.twice = None
        return super().raw_decode(s, idx)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = sorted(key for key, _ in pairs)
            self.twice = next(key for key, other in pairwise(keys) if key == other)
        return found


def _json_lines(text: _Text, *, halves: bool = False) -> Iterator[Located]:
    decoder = _Decoder()
    for number, line in enumerate(text.lines(), start=1):
        if len(line) > LONGEST_ROW:
            hint = f"; {_LIST_FILE}" if line.lstrip()[:1] == b"[" else ""
            yield f"{text.file}:{number}", RowError(f"it has {_TOO_LONG}{hint}")
        elif line.strip():
            yield f"{text.file}:{number}", _parsed(line, decoder, halves=halves)


def _parsed(line: bytes, decoder: _Decoder, *, halves: bool) -> Row | RowError:
    try:
        # Without its line break, which the message on a row that breaks off would blame.
        text = line.decode("utf-8").rstrip("\r\n")
        row = decoder.decode(text)
        return _as_row(row, "" if halves else text, decoder.twice, f"; {_LIST_FILE}")
    except UnicodeDecodeError as error:
        return RowError(_not_utf8("it", error.start, error.reason, "the file"))
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return RowError(f"it is not valid JSON: {what}{_json_remedy(text, error)}")
    except RecursionError:
        return RowError("it is not valid JSON: nested too deeply")
    except ValueError:
        return RowError("it is not valid JSON: a number has thousands of digits")


def _json_remedy(text: str, error: json.JSONDecodeError) -> str:
    """Return what to do about the usual faults of a line of JSON, "" for others."""
    before, behind = text[: error.pos].rstrip(), text[error.pos :].strip()
    if text.strip() in ("{", "["):
        return "; a row is one line here, and a list over several lines a .json file"
    if "\0" in text:
        return "; it has NUL characters, as a damaged file has"
    if error.msg == "Extra data":
        comma = behind == ","
        return "; remove the comma behind the row" if comma else "; each row needs its own line"
    if before.endswith(",") and behind[:1] in ("}", "]"):
        return "; remove the comma before it"
    return ""


def _as_row(row: Any, text: str, twice: str | None, remedy: str = "") -> Row | RowError:
    """Return a row if it is an object, and of valid Unicode where `text` has its escapes.

    `twice` is a key that it has twice; `remedy` ends the message on a list of objects.
    """
    if twice is not None:
        return RowError(f"it has the key {shown(twice)} twice")
    if not isinstance(row, dict):
        of_rows = isinstance(row, list) and bool(row) and isinstance(row[0], dict)
        return RowError(f"it is {kind_of(row)}, not an object{remedy if of_rows else ''}")
    if _SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return RowError(f"it is not valid Unicode: {error.reason}")
    return row


def _json_list(text: _Text) -> Iterator[Located]:
    window = _Window(text.file, text.characters())
    first = window.next_character()
    if not first:
        return
    if first == "{":
        raise DataError(
            f"{text.file} is one object and no list of rows: write [{{...}}, {{...}}], or name it "
            ".jsonl and write one object a line"
        )
    if first != "[":
        raise DataError(f"{text.file} must hold a JSON list of rows, or one object a line")
    window.at += 1
    number = 0
    while window.next_character(also=",") != "]":
        number += 1
        yield f"{text.file}:row {number}", window.row(number)
    window.at += 1
    if window.next_character():
        raise DataError(f"{text.file} has something behind the end of its JSON list")


class _Window:
    """Hold the part of a JSON text that is being read: one row and a little more."""

    def __init__(self, file: Path, read: Callable[[int], str]) -> None:
        self.file, self.read = file, read
        self.text, self.at = "", 0
        self.decoder = _Decoder()

    def next_character(self, also: str = "") -> str:
        """Go to the next character that is no white space and return it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n" + also:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(CHUNK_CHARACTERS):
                return ""

    def row(self, number: int) -> Row | RowError:
        """Read the JSON value that begins here, row `number` of the file."""
        wanted = CHUNK_CHARACTERS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                text, self.at = self.text[self.at : end], end
                return _as_row(value, text, self.decoder.twice)
            except (ValueError, RecursionError) as error:
                where = f"{self.file} is not valid JSON: row {number}"
                if len(self.text) - self.at > LONGEST_ROW:
                    reason = f"{where} does not end within {LONGEST_ROW} characters"
                    raise DataError(reason) from error
                if not self._more(wanted):
                    raise DataError(f"{where}: {error}") from error
                wanted *= 2

    def _more(self, count: int) -> bool:
        chunk = self.read(count)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)


# ---- CSV and text --------------------------------------------------------------------------------


def _csv_rows(text: _Text, delimiter: str = "") -> Iterator[Located]:
    csv.field_size_limit(LONGEST_ROW)
    file, texts = text.file, _csv_lines(text)
    first = next(texts, "")
    delimiter = delimiter or max(",;\t", key=first.count)  # the first of them where none occurs
    reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "end of data" in str(error) or "field limit" in str(error):
                raise DataError(
                    f"{file}:{line}: a quote that opens in this row is never closed; double the "
                    'quotes inside a quoted field ("" for ")'
                ) from error
            reason = _LONE_CR if "new-line" in str(error) else str(error)
            yield f"{file}:{line}", RowError(f"it is not valid CSV: {reason}")
            continue
        if cells is None:
            return
        if not header:
            header = _header(file, cells)
        elif cells:
            yield f"{file}:{line}", _csv_row(header, cells)


def _csv_lines(text: _Text) -> Iterator[str]:
    for number, line in enumerate(text.lines(), start=1):
        if len(line) > LONGEST_ROW:
            raise DataError(f"{text.file}:{number}: the line has {_TOO_LONG}")
        yield line.decode("utf-8", "surrogateescape")


def _header(file: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    _refuse_twice(f"{file}:1: the header", names)
    return names


def _refuse_twice(where: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{where} names {', '.join(map(repr, twice))} twice")


def _csv_row(header: list[str], cells: list[str]) -> Row | RowError:
    if len(cells) != len(header):
        return RowError(f"it has {len(cells)} fields, the header has {len(header)}")
    if any("\udc80" <= c <= "\udcff" for cell in cells if not cell.isascii() for c in cell):
        return RowError("it is not UTF-8; save the file as UTF-8")
    # An empty field is an absent one; a column without a name is an index that pandas wrote.
    return {name: cell for name, cell in zip(header, cells, strict=True) if name and cell}


def _whole_text(text: _Text) -> Iterator[Located]:
    whole = b"".join(line.removeprefix(BOM) for line in text.stream)
    yield f"{text.file}:1", {"text": whole.decode("utf-8")}


_READERS: dict[str, Callable[[_Text], Iterator[Located]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".txt": _whole_text,
}


# ---- tables --------------------------------------------------------------------------------------


def _table_rows(file: Path, kind: str, on_bytes: Callable[[int], None]) -> Iterator[Located]:
    import pyarrow as pa  # takes long to import

    number, size = 0, file.stat().st_size
    try:
        with pa.OSFile(str(file)) as source:
            for share, batch in _batches(source, kind):
                on_bytes(round(share * size))
                batch.validate(full=True)  # offsets of a damaged file may lead anywhere
                _refuse_twice(f"{file}: the schema", batch.schema.names)
                for at in range(0, len(batch), TABLE_ROWS):
                    for row in batch.slice(at, TABLE_ROWS).to_pylist():
                        number += 1
                        yield f"{file}:row {number}", {k: _plain(v) for k, v in row.items()}
    except pa.ArrowException as error:
        raise DataError(f"{file} is not a whole {kind[1:]} file: {error}") from error
    except (ArithmeticError, LookupError) as error:  # a date beyond Python's, an unknown time zone
        raise DataError(f"{file}: a value behind row {number} cannot be read: {error}") from error


def _batches(source: Any, kind: str) -> Iterator[tuple[float, Any]]:
    """Yield (share of the file read, record batch)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == ".parquet":
        table = pq.ParquetFile(source)
        groups = table.num_row_groups
        for group in range(groups):
            for batch in table.iter_batches(TABLE_ROWS, row_groups=[group]):
                yield (group + 1) / groups, batch
    elif source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield (index + 1) / reader.num_record_batches, reader.get_batch(index)
    else:
        source.seek(0)
        for batch in pa.ipc.open_stream(source):
            yield source.tell() / max(source.size(), 1), batch


def _plain(value: Any) -> Any:
    """Return a value of a table as JSON has it: dates and decimals as text, UTF-8 bytes too."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
