"""Files that are broken, or not what their names say: one message each, with line and remedy."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from ernie_train.core.errors import DataError
from ernie_train.data.reader import read_records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}, {"text": ', "is not valid JSON: row 2"),
        ("a.json", b'[{"text": "x"}', "is not valid JSON: row 2"),
        ("a.json", b'[{"text": "x"}] [{"text": "y"}]', "behind the end of its JSON list"),
        ("a.json", b'{"rows": [{"text": "x"}]}', r"a\.json is one object and no list .*\[\{"),
        ("a.json", b'"text"', "must hold a JSON list"),
        ("a.json", b" ", "holds no rows"),
        ("a.xlsx", b"x", r"a\.xlsx is a spreadsheet: save it as CSV in UTF-8"),
        ("rows", b"{}", r"rows is not a .* file: its name must end so"),
        ("a.json", b'[{"text": "caf\xe9"}]', "not UTF-8: byte 14 is .*; save it as UTF-8"),
        ("a.json", b'["' + b"x" * 2**25 + b'"]', "row 1 does not end within 16777216 characters"),
        ("a.json", b'[{"text": "\\ud83d"}]', r"a\.json:row 1: it is not valid Unicode"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"a\.jsonl:1: it is not valid Unicode"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl:1: it is not UTF-8: .* the file as UTF-8"),
        ("a.jsonl", b'[\n {"text": "x"}\n]', r"a\.jsonl:1: .*a row is one line.* a \.json file"),
        ("a.jsonl", b'{\n "text": "x"\n}', r"a\.jsonl:1: .*a row is one line"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-le"), "not UTF-8: it begins as UTF-16 does"),
        ("a.json", '[{"text": "x"}]'.encode("utf-16-be"), "not UTF-8: it begins as UTF-16 does"),
        ("a.csv", "prompt,completion\nq,a\n".encode("utf-16-le"), "it begins as UTF-16 does"),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"compressed by gzip: its name must end in \.gz",
        ),
        (
            "a.csv",
            gzip.compress(b"text\nx\n", mtime=0),
            r"compressed by gzip: its name must end in \.gz",
        ),
        (
            "a.parquet",
            gzip.compress(b"x", mtime=0),
            r"compressed by gzip: its name must end in \.gz",
        ),
        ("a.json", pa.compress(b"[]", "zstd", asbytes=True), r"by zstd: .* must end in \.zst"),
        ("a.csv", b"PK\x03\x04" + b"x" * 99, r"is a spreadsheet \(\.xlsx\) or a zip archive: save"),
        ("a.csv", b"\xd0\xcf\x11\xe0" + b"x" * 99, r"is a spreadsheet \(\.xls\): save it as CSV"),
        ("a.jsonl", b"PAR1xx", r"is a Parquet file: its name must end in \.parquet"),
        ("a.json", b"ARROW1xx", r"is an Arrow file: its name must end in \.arrow"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid x\n",
            "`git lfs pull` fetches",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull` fetches"),
        ("a.jsonl", b"\n<!DOCTYPE html>\n<html>", r"is a web page \(HTML\), not data"),
        ("a.jsonl", b'[{"text": "x"}]', r"a\.jsonl:1: it is a list, .*of rows is a \.json file"),
        ("a.jsonl", b"[" + b" " * 2**24 + b"]", r"a\.jsonl:1: it has more .*rows is a \.json file"),
        ("a.csv", b"text\n" + b"x," * 2**23 + b"x\n", r"a\.csv:2: the line has more than 16777216"),
        ("a.jsonl", b'{"text": "x"},\n', r"a\.jsonl:1: .*Extra data.*the comma behind the row"),
        ("a.jsonl", b'{"text": "x"}{"text": "y"}', r"a\.jsonl:1: .*; each row needs its own line"),
        ("a.jsonl", b'{"text": "x"}\r{"text": "y"}\r', r"a\.jsonl:1: .*row needs its own line"),
        ("a.jsonl", b'{"text": "x",}', r"a\.jsonl:1: .*; remove the comma before it"),
        ("a.jsonl", b'{"text": "x\0"}', r"a\.jsonl:1: .*NUL characters, as a damaged file has"),
        ("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}", "valid JSON: a number has thousands of digits"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', r"a\.jsonl:1: it has the key 'text' twice"),
        ("a.json", b'[{"text": "x", "m": {"k": 1, "k": 1}}]', "row 1: it has the key 'k' twice"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: it is not valid JSON: nested too deeply"),
        ("a.csv", b"text\rx\ry\r", r"a\.csv:1: .*: a lone CR; save it with line breaks LF or CRLF"),
        (
            "a.jsonl.zst",
            pa.compress(b'{"text": "x"}', "zstd", asbytes=True)[:-9],
            "not a whole zstd file",
        ),
        ("a.jsonl.zst", b"{}", "not a whole zstd file"),
        ("a.parquet.gz", b"x", "is not a .jsonl"),
        ("a.arrow", b"ARROW1\0\0", "is not a whole arrow file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_a_line_that_is_too_long_costs_no_other(tmp_path: Path) -> None:
    long = json.dumps({"text": "x" * 2**24 * 2})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{long}\n{{"text": "b"}}\n')
    records, report = read_records(tmp_path / "a.jsonl", max_bad_fraction=0.5)
    assert [record.text for record in records] == ["a", "b"]
    assert [(row.source, row.reason) for row in report.bad.listed] == [
        (f"{tmp_path}/a.jsonl:2", "it has more than 16777216 bytes")
    ]


def test_a_text_may_begin_as_other_files_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<html>is the first tag of a page")
    assert read_records(tmp_path / "a.txt")[0][0].text == "<html>is the first tag of a page"
