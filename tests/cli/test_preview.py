"""`preview`: any row, as it is read, rendered and trained, readable without colours."""

from __future__ import annotations

import io
import json

import pytest

from ernie_train.cli.main import main
from tests.workspace import make_workspace


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    make_workspace(root)
    return root


def chat(question, answer, **more):
    return {"messages": [user(question), {"role": "assistant", "content": answer, **more}]}


def user(text):
    return {"role": "user", "content": text}


ROWS = [
    chat("one?", "1", reasoning="count", rating=3),
    chat("two?", " "),
    chat("three?", "3 " * 300),
    "{",
    {"messages": [*chat("four?", "4", loss=False)["messages"], *chat("five?", "5")["messages"]]},
    {"prompt": "six?", "chosen": "6", "rejected": "7"},
    {"prompt": "seven?", "answer": "7"},
    {
        "messages": [
            user("eight?"),
            {"role": "assistant", "tool_calls": [{"name": "count", "arguments": {"to": 8}}]},
        ],
        "tools": [{"name": "count"}],
    },
]


@pytest.fixture
def data(tmp_path):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "README.md").write_text("")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def preview(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*arguments, status=0):
        with pytest.raises(SystemExit) as stopped:
            main(["preview", *map(str, arguments)])
        out = capsys.readouterr()
        assert (stopped.value.code or 0) == status, out.err
        return out.err if status else out.out

    return run


def test_rows_are_shown_as_they_are_read(preview, data):
    out = preview(data.parent, "--rows", 9)
    for text in (
        "rows.jsonl:1 (chat)",
        "<reasoning> count",
        "assistant (not trained): 4",
        "chosen assistant: 6",
        'fields: {"answer": "7"}',
        'assistant: calls count({"to": 8})',
        "8 rows of the format messages+preference+prompt in 1 file: 4 chat, 1 preference, 1 prompt",
        "that nothing reads: messages.rating (1)",
        "passed over in ",
        "rows.jsonl:4: it is not valid JSON",
        "rows.jsonl:2: with a blank answer",
    ):
        assert text in out, text
    assert "⟦" not in out


def test_text_mask_and_lengths_with_a_tokenizer(preview, data, root):
    out = preview(data, "--tokenizer", root / "tokenizer", "--rows", 9, "--seq-len", 130)
    assert "count" in out and "⟦" in out
    five = out[out.index("rows.jsonl:5") : out.index("rows.jsonl:6")]
    trained = five[five.index("⟦") : five.rindex("⟧")]
    assert "5" in trained and "4" not in trained and five.count("⟦") == 1
    assert "rows.jsonl:3: longer than seq_len" in out
    assert "chosen: " in out and "prompt: " in out
    assert "p50" in out and "1 longer than seq_len" in out


def test_another_template_shows_its_text(preview, data, root, tmp_path):
    """By name or by file, as `init` takes it."""
    given = (data, "--tokenizer", root / "tokenizer", "--row", 1)
    assert "User: " in preview(*given, "--template", "ernie_plain")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]\n{% endfor %}")
    assert "<|im_start|>" not in preview(*given, "--template", tmp_path / "own.jinja")
    assert "<|im_start|>" in preview(*given)
    assert "no.jinja: " in preview(*given, "--template", "no.jinja", status=2)


def test_an_encoding_without_a_character_shows_its_code(data, root, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, "latin-1", write_through=True))
    with pytest.raises(SystemExit) as stopped:
        main(["preview", str(data), "--tokenizer", str(root / "tokenizer"), "--rows", "1"])
    assert not stopped.value.code and b"\\u23ce" in shown.getvalue()


def test_a_long_row_shows_its_end(preview, data, root):
    out = preview(data, "--tokenizer", root / "tokenizer", "--row", 3, "--max-tokens", 60)
    shown = out[out.index("trained:") :]
    assert "more tokens ...]" in shown and shown.rstrip().endswith("⟧")


def test_a_field_of_a_million_characters_is_shown_by_its_ends(preview, tmp_path):
    answer = "begin " + "x" * 1_000_000 + " end"
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": answer}) + "\n")
    out = preview(tmp_path / "a.jsonl")
    assert len(out) < 20_000
    words = " ".join(out.split())
    assert "assistant: begin xxx" in words
    assert "... 996,010 characters ..." in words
    assert "xxx end" in words


@pytest.mark.parametrize("tokenizer", [False, True])
def test_equal_reasons_are_told_once(preview, tmp_path, root, tokenizer):
    rows = [json.dumps(chat("q", "a")), *[json.dumps(chat("q", " "))] * 150, "[]", "[]", "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    given = ("--tokenizer", root / "tokenizer") if tokenizer else ()
    out = preview(tmp_path / "a.jsonl", *given)
    told = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(told) == 3
    assert out.count("it is a list, not an object") == (2 if tokenizer else 1)  # in the table too
    assert told[0].startswith("left out: 2 rows: it is a list, not an object, first at ")
    assert told[0].endswith("a.jsonl:152")
    assert told[1].startswith(f"left out: {tmp_path}/a.jsonl:154: it is not valid JSON")
    assert told[2] == f"left out: 150 rows: with a blank answer, first at {tmp_path}/a.jsonl:2"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("1", "one?"),
        ("rows.jsonl:5", "five?"),
        ("2", "rows.jsonl:2: with a blank answer"),
        ("4", "rows.jsonl:4: it is not valid JSON"),
    ],
)
def test_any_row_can_be_asked_for(preview, data, row, text):
    out = preview(data, "--row", row)
    assert text in out and "six?" not in out


def test_a_row_behind_many_that_are_left_out_can_be_asked_for(preview, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(chat("q", " ")) + "\n") * 150 + json.dumps(chat("q", "a")) + "\n")
    assert "a.jsonl:150: with a blank answer" in preview(path, "--row", 150)
    path.write_text("{\n" * 300)
    assert "a.jsonl:250: it is not valid JSON" in preview(path, "--row", 250)


def test_a_row_that_is_not_there_and_wrong_options_are_mistakes(preview, data, root, tmp_path):
    assert "--row 99: " in preview(data, "--row", 99, status=2)
    assert "does not exist" in preview(tmp_path / "gone.csv", status=2)
    both = ("--tokenizer", root / "tokenizer", "--model", root)
    assert "leave one of them out" in preview(data, *both, status=2)
    assert "--columns" in preview(data, "--columns", "{prompt: 3}", status=2)


def test_only_as_many_rows_are_read_as_asked(preview, data):
    out = preview(data, "--max-rows", 2, "--rows", 1)
    assert "only the first 3 rows were read; --max-rows 0 reads all" in out
    assert "five?" not in out


def test_columns_are_mapped(preview, tmp_path):
    (tmp_path / "a.csv").write_text("ask,reply\nnine?,9\n")
    out = preview(tmp_path / "a.csv", "--columns", "{prompt: ask, completion: reply}")
    assert "user: nine?" in out and "assistant: 9" in out
