"""Every format that is read, and everything that may be wrong with a row or a file."""

import gzip
import json
import pickle
from typing import Any, get_args

import pytest

from ernie_train.core.errors import DataError
from ernie_train.data.formats import FORMATS
from ernie_train.data.reader import ReadReport, Record, grouped, iter_records, read_records
from ernie_train.data.sources import FormatName

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"y": 2}'}
TOOLS = [{"name": "f"}]


def turn(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}

CASES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("messages", {"messages": [S, Q, A]}, "chat", {"messages": [S, Q, A]}),
    (
        "messages",
        {"messages": [Q, A], "answer": "12", "domain": "math", "task": "sum"},
        "chat",
        {"fields": {"answer": "12", "domain": "math", "task": "sum"}},
    ),
    ("messages", {"messages": [Q], "answer": "12"}, "prompt", {"messages": [Q]}),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                {"role": "tool", "tool_call_id": "1", "content": {"y": 2}},
                {"role": "assistant", "content": "a", "reasoning_content": "r", "weight": 0},
            ],
            "tools": TOOLS,
        },
        "chat",
        {
            "messages": [S, Q, CALLED, RESULT, {**A, "reasoning_content": "r", "weight": 0}],
            "tools": TOOLS,
            "fields": {"tools": TOOLS},
        },
    ),
    (
        "messages",
        {
            "messages": [
                Q,
                {"role": "assistant", "content": None, "function_call": OPENAI_CALL["function"]},
                {"role": "function", "name": "f", "content": '{"y": 2}'},
                A,
            ]
        },
        "chat",
        {"messages": [Q, CALLED, RESULT, A]},
    ),
    (
        "sharegpt",
        {
            "conversations": [
                turn("system", "s"),
                turn("human", "q"),
                turn("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                turn("observation", '{"y": 2}'),
                turn("gpt", "a"),
            ],
            "tools": '[{"name": "f"}]',
        },
        "chat",
        {"messages": [S, Q, CALLED, RESULT, A], "tools": TOOLS},
    ),
    (
        "sharegpt",
        {"conversations": [turn("user", "q"), turn("assistant", "a")], "system": "s", "tools": ""},
        "chat",
        {"messages": [S, Q, A], "tools": None, "fields": {}},
    ),
    (
        "sharegpt",
        {
            "conversations": [turn("human", "q")],
            "chosen": turn("gpt", "a"),
            "rejected": turn("gpt", "b"),
        },
        "preference",
        {"messages": [Q], "chosen": [A], "rejected": [{**A, "content": "b"}]},
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "a"]]},
        "chat",
        {"messages": [S, Q, A, Q, A]},
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "12", "output": "a"},
        "chat",
        {"messages": [{"role": "user", "content": "q\n12"}, A]},
    ),
    (
        "alpaca",
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        "preference",
        {"messages": [Q], "chosen": [A]},
    ),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", {"chosen": [A]}),
    (
        "preference",
        {"chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]},
        "preference",
        {"messages": [Q], "chosen": [A], "rejected": [{**A, "content": "b"}]},
    ),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, "chat", {"messages": [Q, A]}),
    ("prompt_completion", {"prompt": [S, Q], "completion": [A]}, "chat", {"messages": [S, Q, A]}),
    ("prompt", {"prompt": "q", "answer": "3"}, "prompt", {"fields": {"answer": "3"}}),
    ("prompt", {"question": "q", "id": "3"}, "prompt", {"messages": [Q]}),
    ("text", {"text": "once", "id": 3}, "text", {"text": "once", "fields": {"id": 3}}),
]


@pytest.mark.parametrize(("name", "row", "kind", "expected"), CASES)
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_formats(
    write_rows: Any, name: str, row: dict[str, Any], kind: str, expected: dict[str, Any], asked: str
) -> None:
    path = write_rows("rows.jsonl", [row])
    (record,), report = read_records(path, name if asked == "named" else "auto")
    assert record.kind == kind and record.source == f"{path}:1"
    for key, value in expected.items():
        assert getattr(record, key) == value
    assert (report.rows, report.kept, report.bad.count) == (1, 1, 0)
    assert report.format == (name if asked == "auto" else "") or report.format == name


def test_recipes_know_every_format() -> None:
    assert set(get_args(FormatName)) == {"auto", *FORMATS}


def test_the_prompt_of_a_row_ends_before_the_last_answer() -> None:
    assert Record("chat", messages=[S, Q, A]).prompt_messages == [S, Q]
    assert Record("chat", messages=[Q, CALLED, RESULT, A, A]).prompt_messages == [Q, CALLED, RESULT]
    assert Record("prompt", messages=[Q]).prompt_messages == [Q]


GOOD = {"messages": [Q, A]}
BAD_ROWS: list[tuple[Any, str]] = [
    ("{not json", "not valid JSON"),
    ("[1]", "is a list, not an object"),
    ("9" * 5000, "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"messages": [{"role": "us', "valid JSON: Unterminated string starting at column 24"),
    ({"texts": "x"}, "lacks messages, which the format messages needs"),
    ({"messages": []}, "list of messages that is not empty"),
    ({"messages": "x"}, "list of messages that is not empty"),
    ({"messages": [3]}, "message 1 is not an object"),
    ({"messages": [Q, {"role": "assistant"}]}, r"message 2 \(assistant\) is empty"),
    ({"messages": [{"role": "user", "content": ""}, A]}, r"message 1 \(user\) is empty"),
    ({"messages": [{"content": "q"}]}, "message 1 has no role; a message needs role"),
    ({"messages": [{"role": ["user"], "content": "q"}]}, "message 1 has role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content that is not text: a number"),
    ({"messages": [Q, {**A, "content": {"text": "a"}}]}, "content that is not text: an object"),
    (
        {"messages": [{"role": "user", "content": ["q", {"type": "image_url"}]}]},
        "content that is not text: a part of type image_url",
    ),
    ('"text"', "it is a text, not an object"),
    ({"messages": [Q, {**A, "reasoning_content": 5}]}, "reasoning_content must be text"),
    ({"messages": [Q, {**A, "tool_calls": 5}]}, "tool_calls must be a list"),
    ({"messages": [Q, {**A, "tool_calls": [{}]}]}, "tool call without a name"),
    (
        {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "arguments of a tool call is not valid JSON",
    ),
    (
        {"messages": [Q, {**A, "tool_calls": [{"name": "f", "arguments": "3"}]}]},
        "must be an object",
    ),
    ({"messages": [Q, A], "tools": "{"}, "tools is not valid JSON"),
    ({"messages": [Q, A], "tools": {"a": 1}}, "tools must be a list"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_left_out_with_line_and_reason(write_rows: Any, row: Any, reason: str) -> None:
    path = write_rows("rows.jsonl", [GOOD, "", row, GOOD])
    records, report = read_records(path, max_bad_fraction=0.5)
    assert len(records) == 2 and report.rows == 3
    (bad,) = report.bad.listed
    assert bad.source == f"{path}:3"
    with pytest.raises(DataError, match=reason) as caught:
        read_records(path, max_bad_fraction=0.3)
    assert f"{path}:3: " in str(caught.value) and "1 of 3 rows are bad" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": ""}, "output is empty"),
        ({"instruction": "q", "output": True}, "output must be text, not a boolean"),
        ({"instruction": "q", "output": "a", "input": 3}, "input must be text"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history must be"),
        ({"instruction": "q", "output": "a", "system": 3}, "system must be text"),
        ({"conversations": []}, "must be a list of messages that is not"),
        ({"conversations": [turn("human", "")]}, r"message 1 \(user\) is empty"),
        ({"conversations": [turn("robot", "x")]}, "message 1 has role 'robot'"),
        ({"conversations": [turn("function_call", "x")]}, "function call is not valid JSON"),
        ({"conversations": [turn("system", "x")], "system": "y"}, "two system messages"),
        ({"prompt": "q", "completion": ""}, "completion is empty"),
        ({"prompt": " ", "completion": "a"}, "prompt is empty"),
        (
            {"question": 5, "answer": "a"},
            "question must be text or a list of messages, not a number",
        ),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "begin alike and end differently"),
        ({"chosen": "a", "rejected": "b"}, "begin alike and end differently"),
        ({"text": "  "}, "text is empty"),
    ],
)
def test_bad_rows_of_the_other_formats(write_rows: Any, row: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_records(write_rows("rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "Question,Answer,Context\nq,a,c\n",
            r"--columns '\{question: Question, answer: Answer, context: Context\}'",
        ),
        ("a.csv", "q,a\n", r"cannot tell .* a, q \(the first line of such a file names its col"),
        ("a.jsonl", '{"frage": "q"}\n', r"--columns '\{question: frage, answer: antwort\}'"),
        ("a.jsonl", '{"messages": null}\n', r"rows with the keys \(none: every value is null\)"),
    ],
)
def test_unknown_keys_are_told_with_a_remedy(
    tmp_path: Any, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text * 2)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_the_share_of_bad_rows_decides(write_rows: Any) -> None:
    rows: list[Any] = [GOOD] * 99 + ["{"]
    path = write_rows("rows.jsonl", rows)
    records, report = read_records(path)
    assert len(records) == 99 and report.bad.count == 1
    with pytest.raises(DataError, match="2 of 101 rows are bad"):
        read_records(write_rows("more.jsonl", [*rows, "{"]))


def test_only_the_first_bad_rows_are_listed(write_rows: Any) -> None:
    with pytest.raises(DataError, match="and 15 more") as caught:
        read_records(write_rows("rows.jsonl", ["{"] * 25))
    assert len(str(caught.value).splitlines()) == 12


def test_what_is_kept_of_bad_rows_does_not_grow_with_their_number(write_rows: Any) -> None:
    report = ReadReport("many")
    rows = [GOOD, *["{"] * 200, *['{"a":' + " " * at for at in range(200)], *["["] * 1600]
    assert len(list(iter_records(write_rows("rows.jsonl", rows), "auto", report))) == 1
    with pytest.raises(DataError, match="2000 of 2001 rows are bad"):
        report.check(0.5)
    told = grouped(report.bad, report.left_out, report.dropped)
    assert told[0].startswith("200 rows: it is not valid JSON: Expecting property name")
    assert len(pickle.dumps(report)) < 60_000, "of each row it would be 200,000"


def test_an_odd_first_row_does_not_decide_the_format(write_rows: Any) -> None:
    records, report = read_records(write_rows("rows.jsonl", [{"a": 1}, GOOD]), max_bad_fraction=0.5)
    assert len(records) == 1 and report.format == "messages"


def test_an_unknown_format_names_the_keys_and_the_known_ones(write_rows: Any) -> None:
    with pytest.raises(DataError, match="keys premise, truth\nknown formats") as caught:
        read_records(write_rows("rows.jsonl", [{"premise": 1, "truth": 2}]))
    _, known, example = str(caught.value).splitlines()
    assert "alpaca (instruction + output); " in known and "; messages; " in known
    assert len(known) < 300 and all(name in known for name in FORMATS)
    assert "--columns '{question: frage, answer: antwort}' (or the recipe's" in example
    with pytest.raises(DataError, match="unknown format 'csv'"):
        read_records(write_rows("rows.jsonl", [GOOD]), "csv")


def test_files_and_directories(write_rows: Any, tmp_path: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.json").write_text(json.dumps([GOOD, {"messages": [Q]}]))
    (folder / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8-sig")
    (folder / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    (folder / "notes.md").write_text("not data")
    records, report = read_records(folder)
    assert [r.kind for r in records] == ["text", "chat", "prompt", "chat"]
    assert records[0].text == "one\n\ntwo\n"
    assert records[2].source == f"{folder / 'b.json'}:row 2"
    assert report.format == "text+messages"


def test_gzipped_rows_are_read_like_plain_ones(tmp_path: Any) -> None:
    text = b"\n".join([json.dumps(GOOD).encode()] * 3 + [b"{"])
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    records, report = read_records(tmp_path, max_bad_fraction=0.5)
    assert len(records) == 3
    assert report.bad.listed[0].source == f"{tmp_path / 'rows.jsonl.gz'}:4"
    assert report.bytes_read == report.bytes_total == (tmp_path / "rows.jsonl.gz").stat().st_size


def test_a_row_that_is_not_utf8_is_bad(tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b'\n{"messages": "\xff"}\n' + good)
    records, report = read_records(path, max_bad_fraction=0.5)
    assert len(records) == 2 and "not UTF-8" in report.bad.listed[0].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "holds no rows"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("empty.json", b"[]", "holds no rows"),
        ("broken.json", b"[{", "not valid JSON"),
        ("object.json", b"{}", "one object and no list"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8: byte 3 is .*; save it as UTF-8"),
        ("rows.parquet", b"x", "is not a whole parquet file"),
        ("rows.doc", b"x", "is not a .jsonl"),
        ("plain.jsonl.gz", b"{}", "not a whole gzip file"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "not a whole gzip file"),
        (
            "torn.jsonl.gz",
            gzip.compress(b"{}", mtime=0)[:12] + b"\xff" * 9,
            "not a whole gzip file",
        ),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Any, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_directory_without_data_is_refused(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"holds no data file: \.jsonl"):
        read_records(tmp_path)
