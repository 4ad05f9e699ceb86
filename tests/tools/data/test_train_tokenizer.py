"""The command that trains a tokenizer on data files."""

import json
from pathlib import Path

import pytest

from ernie_train.data import load_tokenizer
from tools.data.train_tokenizer import main


def test_it_trains_on_every_kind_of_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["apple", "orange", "banana"]
    messages = [
        {"role": "user", "content": "the question is apple"},
        {"role": "assistant", "content": "<think>\nbanana\n</think>\n\norange"},
    ]
    rows = {
        "chat.jsonl": {"messages": messages, "tools": [{"name": "lookup"}]},
        "text.jsonl": {"text": " ".join(words)},
        "pairs.jsonl": {"prompt": "which", "chosen": "chosen words", "rejected": "rejected words"},
        "asked.jsonl": {"prompt": "asked", "answer": "3"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text((json.dumps(row) + "\n") * 30)
    files = [str(tmp_path / name) for name in rows]
    assert main([str(tmp_path / "out"), "--vocab-size", "370", *files]) == 0
    assert "370 pieces from 120 rows" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 370
    # Words of every file became long pieces; a word that nobody wrote did not.
    for word in ("orange", "apple", "words", "asked"):
        assert len(tokenizer.encode(" " + word)) <= 3
    assert len(tokenizer.encode(" zymurgy")) >= 7


def test_mistakes_end_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "out"), "--vocab-size", "400", str(tmp_path / "gone.jsonl")]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "gone.jsonl does not exist" in told
    assert told.count("\n") == 1
