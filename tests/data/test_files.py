"""Files as people have them: every container, directories, patterns, and their faults."""

import contextlib
import datetime
import gzip
import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from ernie_train.core.errors import DataError
from ernie_train.data.reader import ReadReport, iter_records, read_records

ROWS = [{"prompt": f"how many are {i}?", "completion": f"{i}, of course"} for i in range(300)]


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)


def write_arrow_file(path: Path) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=90)


def write_csv(path: Path) -> None:
    pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.ndjson": lambda path: path.write_bytes(lines()),
    "lines.json": lambda path: path.write_bytes(lines()),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS, indent=2)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "lines.json.gz": lambda path: path.write_bytes(gzip.compress(lines())),  # as C4 has them
    "lines.json.zst": lambda path: path.write_bytes(pa.compress(lines(), "zstd", asbytes=True)),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.compress(lines(), "zstd", asbytes=True)),
    "a.csv": write_csv,
    "a.csv.zst": lambda path: (
        write_csv(path),
        path.write_bytes(pa.compress(path.read_bytes(), "zstd", asbytes=True)),
    ),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_stream,
    "feather.arrow": write_arrow_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    records, report = read_records(tmp_path / name)
    asked = [(r.messages[0]["content"], r.messages[1]["content"]) for r in records]
    assert asked == [(row["prompt"], row["completion"]) for row in ROWS]
    assert report.bytes_read == report.bytes_total == (tmp_path / name).stat().st_size
    number = int(records[-1].source.rsplit(":", 1)[1].removeprefix("row "))
    assert number == 300 + name.startswith("a.csv")  # the header is a line
    assert records[-1].source.startswith(f"{tmp_path / name}:")


def test_a_saved_data_set_is_its_shards_alone(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    write_arrow_stream(saved / "data-00000-of-00001.arrow")
    write_arrow_stream(saved / "cache-1f.arrow")  # what a map over the rows left behind
    (saved / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (saved / "state.json").write_text(json.dumps(state))
    records, report = read_records(saved)
    assert len(records) == 300
    assert report.passed_over == "cache-1f.arrow, dataset_info.json, state.json"
    (saved / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"holds no data file|is missing"):
        read_records(saved)


def test_splits_of_a_saved_data_set_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_arrow_stream(tmp_path / split / "data-00000-of-00001.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits .* name one of .*/test, .*/train"):
        read_records(tmp_path)
    assert len(read_records(tmp_path / "train")[0]) == 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several kinds, some below, and what lies about in such directories."""
    for name in ("b.jsonl", "a.parquet", "deep/er/c.csv", "deep/d.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        WRITERS[f"a.{name.split('.', 1)[1]}"](tmp_path / name)
    (tmp_path / "README.md").write_text("about the rows")
    (tmp_path / "deep" / "dataset_info.json").write_text('{\n "rows": 300\n}')
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jsonl").write_bytes(lines())
    return tmp_path


def test_directories_are_read_with_all_below_and_say_what_they_pass_over(folder: Path) -> None:
    records, report = read_records(folder)
    assert len(records) == 4 * 300 and report.files == 4
    assert report.passed_over == ".git, README.md, dataset_info.json"
    order = list(dict.fromkeys(Path(r.source.rsplit(":", 1)[0]).name for r in records))
    assert order == ["a.parquet", "b.jsonl", "d.jsonl.gz", "c.csv"]


@pytest.mark.parametrize(
    ("pattern", "files"),
    [("*.jsonl", 1), ("deep/*", 2), ("**/*.csv", 1), ("**/*", 4), ("[ab].*", 2), ("d*", 2)],
)
def test_patterns(folder: Path, pattern: str, files: int) -> None:
    report = ReadReport("")
    assert len(list(iter_records(folder / pattern, "auto", report))) == files * 300
    assert report.files == files


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "rows[1].jsonl").write_bytes(lines())
    assert len(read_records(tmp_path / "rows[1].jsonl")[0]) == 300


def test_directories_with_brackets_do_not_spoil_a_pattern(tmp_path: Path) -> None:
    place = tmp_path / "project [v2]" / "rows*"
    place.mkdir(parents=True)
    (place / "a.jsonl").write_bytes(lines())
    assert len(read_records(place / "*.jsonl")[0]) == 300
    assert len(read_records(tmp_path / "project [v2]" / "**" / "*.jsonl")[0]) == 300
    with pytest.raises(DataError, match="no data file matches the pattern"):
        read_records(tmp_path / "*.csv")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], []),
        (["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"], ["test", "train"]),
        (["train/a.jsonl", "val/a.jsonl", "dev.jsonl"], ["train", "validation"]),
        (["training.jsonl", "testimony.jsonl"], []),
    ],
)
def test_files_of_several_splits_are_told(tmp_path: Path, names: list[str], splits: Any) -> None:
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(lines(ROWS[:1]))
    assert read_records(tmp_path / "d")[1].splits == splits


def test_what_arrow_aligns_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Parquet gives every struct the keys of all others, with null for the absent ones."""

    def row(name: str, argument: str) -> dict[str, Any]:
        made = {"type": "function", "function": {"name": name, "arguments": {argument: 1}}}
        schema = {"type": "object", "properties": {argument: {"type": "integer"}}}
        tool = {"type": "function", "function": {"name": name, "parameters": schema}}
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [made], "loss": False},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "a", "reasoning": "r"},
        ]
        return {"messages": turns, "tools": [tool], f"only_{name}": 1}

    rows = [row("tide", "port"), row("wind", "city")]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    columns = sorted({key for row in rows for key in row})  # from_pylist takes the first row's
    table = pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert '"city": null' in json.dumps(table.to_pylist())
    written, _ = read_records(tmp_path / "a.jsonl")
    aligned, _ = read_records(tmp_path / "a.parquet")
    for one, other in zip(written, aligned, strict=True):
        assert (one.messages, one.tools, one.fields) == (other.messages, other.tools, other.fields)


def test_links_in_a_circle_and_into_nothing_are_told(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(lines())
    link = tmp_path / "data" / "again"
    link.symlink_to(tmp_path)
    with pytest.raises(DataError, match=rf"{link}/data is .* leads back to {tmp_path}/data"):
        read_records(tmp_path / "data")
    link.unlink()
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "self.jsonl", tmp_path / "data"):
        with pytest.raises(DataError, match="leads nowhere or in a circle"):
            read_records(path)


def test_pickles_are_refused_and_never_loaded(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "loaded"),)

    for name in ("a.pkl", "a.pickle", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps([Payload()]))
        with pytest.raises(DataError, match=r"may be a pickle, .* never loaded"):
            read_records(tmp_path / name)
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(pickle.dumps([Payload()]))
        with pytest.raises(DataError):
            read_records(tmp_path / name)
    assert not (tmp_path / "loaded").exists()


def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", Path("/dev/zero")):
        with pytest.raises(DataError, match="neither a file nor a directory"):
            read_records(path)


# ---- CSV -----------------------------------------------------------------------------------------


def csv_answers(path: Path, text: str | bytes, bad: float = 0.0) -> list[str]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [r.messages[-1]["content"] for r in read_records(path, max_bad_fraction=bad)[0]]


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("prompt,completion\nq,a\nq,b\n", ["a", "b"]),
        ("\ufeffprompt,completion\r\nq,a\r\n\r\nq,b", ["a", "b"]),  # Excel
        ("prompt;completion\nq;a,b\n", ["a,b"]),
        ("prompt\tcompletion\nq\ta\n", ["a"]),
        (",prompt,completion\n0,q,a\n1,q,b\n", ["a", "b"]),  # pandas' index
        ('prompt,completion\nq,"one\ntwo, ""three"""\n', ['one\ntwo, "three"']),
        ('prompt,completion\nq,he said "no" and left\n', ['he said "no" and left']),
        ("prompt,completion\nq," + "x" * 1_000_000 + "\n", ["x" * 1_000_000]),
        ("prompt,completion,rejected\nq,a,\n", ["a"]),  # empty is absent
    ],
)
def test_csv(tmp_path: Path, text: str, answers: list[str]) -> None:
    assert csv_answers(tmp_path / "a.csv", text) == answers


def test_the_name_tsv_says_tabs(tmp_path: Path) -> None:
    text = "prompt\tcompletion\tnotes, links, and more\nq, r\ta, b\tn\n"
    assert csv_answers(tmp_path / "a.tsv", text) == ["a, b"]
    (tmp_path / "b.tsv").write_text("text\nwell, well\n")
    assert read_records(tmp_path / "b.tsv")[0][0].text == "well, well"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt,completion\nq,a\nq,"b\nq,c\n', r"a\.csv:3: a quote that opens in this row is nev"),
        ('prompt,completion\nq,"a"b\nq,c\n', r"a\.csv:2: it is not valid CSV"),
        ("prompt,completion\nq,a\nq,b,c\n", r"a\.csv:3: it has 3 fields, the header has 2"),
        ('prompt,completion\nq,"a\n\n"\nq\n', r"a\.csv:5: it has 1 fields"),  # lines, not rows
        ("prompt,prompt\nq,a\n", r"a\.csv:1: the header names 'prompt' twice"),
        (
            b"prompt,completion\nq,a\nq,caf\xe9\n",
            r"a\.csv:3: it is not UTF-8; save the file as UTF-8",
        ),
        ("prompt,completion\nq,a\n".encode("utf-16"), "not UTF-8 but UTF-16"),
    ],
)
def test_broken_csv_is_told_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        csv_answers(tmp_path / "a.csv", text)


def test_a_bad_row_of_a_csv_file_costs_no_other(tmp_path: Path) -> None:
    text = 'prompt,completion\nq,a\nq,"b"x\nq,c\nq,caf\udce9\nq,d\n'
    path = tmp_path / "a.csv"
    assert csv_answers(path, text.encode("utf-8", "surrogateescape"), 0.5) == ["a", "c", "d"]


def test_nested_columns_of_csv_are_json(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    text = 'messages,label\n"{}","[1]"\n'.format(turns.replace('"', '""'))
    assert csv_answers(tmp_path / "a.csv", text) == ["a"]


# ---- other faults --------------------------------------------------------------------------------


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(DataError, match="is not a whole parquet file"):
        read_records(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.arrow", "feather.arrow", "a.parquet", "a.jsonl.zst", "a.json"])
def test_damaged_bytes_are_no_more_than_a_message(tmp_path: Path, name: str) -> None:
    rng = random.Random(2)
    WRITERS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(DataError):
            list(iter_records(tmp_path / name, "auto", ReadReport("")))


@pytest.mark.parametrize(
    ("names", "second", "message"),
    [
        (["text", "text"], pa.array(["b"]), r"a\.parquet: the schema names 'text' twice"),
        (["text", "at"], pa.array([10**17], pa.timestamp("s")), "a value behind row 0 cannot be"),
        (["text", "at"], pa.array([0], pa.timestamp("s", tz="Foo/Bar")), "be read: 'Foo/Bar'"),
    ],
)
def test_tables_that_python_cannot_hold(
    tmp_path: Path, names: list[str], second: Any, message: str
) -> None:
    table = pa.table([pa.array(["a"]), second], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / "a.parquet")


def test_values_that_json_has_not_become_text(tmp_path: Path) -> None:
    row = {"text": b"caf\xc3\xa9", "day": datetime.date(2020, 1, 2), "tags": [b"x"]}
    pyarrow.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (record,), _ = read_records(tmp_path / "a.parquet")
    assert record.text == "café" and record.fields == {"day": "2020-01-02", "tags": ["x"]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_rows_are_read_one_by_one(tmp_path: Path, name: str) -> None:
    big = [{"prompt": "q", "completion": "x" * 10_000}] * 1200
    table = pa.Table.from_pylist(big)
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=100, compression="none")
    elif name == "a.arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    elif name == "a.csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text(json.dumps(big) if name == "a.json" else lines(big).decode())
    report = ReadReport("")
    tracemalloc.start()
    total = sum(len(record.messages[1]["content"]) for record in iter_records(path, "auto", report))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 12_000_000 and peak < 6_000_000
