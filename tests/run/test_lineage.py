"""Names and hashes of inputs are a format on disk: run directories of earlier versions continue."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ernie_train.core.errors import DataError
from ernie_train.run.lineage import Lineage, hash_files


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_recorded_names_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    first = Lineage("7", "m", "t").with_data([tmp_path / "a.jsonl"])
    data = sha256(sha256("1\n"))
    assert first.to_dict() == {"seed": "7", "model": "m", "tokenizer": "t", "data": data}
    after = first.after("pre", {"steps": 12, "checkpoint": "step_000012"})
    result = sha256('{"checkpoint":"step_000012","steps":12}')
    assert after.to_dict() == {**first.to_dict(), "after pre": result}
    again = after.after("sft", {"steps": 12, "checkpoint": "step_000012"})
    assert again.to_dict() == {**after.to_dict(), "after sft": result}
    assert Lineage("7", "m", "t", weights="w").to_dict()["weights"] == "w"


def test_the_hash_covers_every_file_below_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "b").write_text("2")
    (tmp_path / "d" / "sub" / "c").write_text("3")
    (tmp_path / "a").write_text("1")
    expected = sha256(sha256("1") + sha256("2") + sha256("3"))
    assert hash_files([tmp_path / "a", tmp_path / "d"]) == expected
    with pytest.raises(DataError, match="nowhere: no such file"):
        hash_files([tmp_path / "nowhere"])


def test_the_hash_of_a_pattern_is_that_of_its_files(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "2"), ("a.jsonl", "1"), ("c.csv", "3")):
        (tmp_path / name).write_text(text)
    assert hash_files([tmp_path / "*.jsonl"]) == sha256(sha256("1") + sha256("2"))
