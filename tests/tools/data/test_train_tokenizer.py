"""The command that trains a tokenizer on data files."""

import json
import subprocess
import sys
from pathlib import Path

from ernie_train.data import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tools.data.train_tokenizer", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_trains_on_every_kind_of_row(tmp_path: Path) -> None:
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
    files = [tmp_path / name for name in rows]
    done = run(tmp_path / "out", "--vocab-size", 370, *files)
    assert done.returncode == 0, done.stderr
    assert "370 pieces from 120 rows" in done.stdout
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 370
    # Words of every file became long pieces; a word that nobody wrote did not.
    for word in ("orange", "apple", "words", "asked"):
        assert len(tokenizer.encode(" " + word)) <= 3
    assert len(tokenizer.encode(" zymurgy")) >= 7


def test_mistakes_end_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--vocab-size", 400, tmp_path / "gone.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "gone.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stderr
