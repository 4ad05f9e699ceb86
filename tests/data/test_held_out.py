"""Held-out rows: their prompts are not trained on, in any spelling, order or format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import DataError
from ernie_train.data import DataSource, ReadReport, Tokenizer, iter_records, load_sources

ASKED = [{"prompt": f"What is {n} + 1?", "completion": str(n + 1)} for n in range(40)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def keys(*rows: dict[str, Any], tmp_path: Path) -> list[bytes]:
    path = write(tmp_path / "keys.jsonl", list(rows))
    return [one.prompt_key for one in iter_records(path, "auto", ReadReport(str(path)))]


def test_rows_ask_the_same_whatever_their_format_system_text_and_answers(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Add  1\n"}, {"role": "assistant", "content": "2"}]
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Add 1"}]
    turns += [{"from": "gpt", "value": "3"}, {"from": "human", "value": "Sure?"}]
    same = keys(
        {"messages": said},
        {"conversations": [*turns, {"from": "gpt", "value": "yes"}]},
        {"instruction": "Add 1", "output": "4"},
        {"prompt": "Add 1", "chosen": "2", "rejected": "3"},
        tmp_path=tmp_path,
    )
    assert len(set(same)) == 1
    opened = {"role": "assistant", "content": "Hello!"}
    others = keys(
        {"messages": said},
        {"instruction": "Add 1", "input": "2", "output": "4"},
        {"messages": [opened, said[0], said[1]]},
        {"messages": [opened, {"role": "user", "content": "Add 2"}, said[1]]},
        {"text": "Add 1"},
        {"text": "Add 2"},
        tmp_path=tmp_path,
    )
    assert len(set(others)) == 5 and others[0] == others[2], "what the assistant opens with is none"


def test_prompts_of_another_file_are_left_out_and_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    twice = [*ASKED, {**ASKED[3], "completion": "four"}]
    data = write(tmp_path / "rows.jsonl", twice)
    write(tmp_path / "held.jsonl", ASKED[3:5])
    source = DataSource(path=data.name, without="held.jsonl")
    load = {"kind": "sft", "seq_len": 256, "base_dir": tmp_path}
    (documents,), report = load_sources([source], tokenizer, **load)  # type: ignore[arg-type]
    assert len(documents) == 38 and report.sources[0].rows == 41
    (reason,) = report.sources[0].dropped
    assert reason == f"held out in {tmp_path / 'held.jsonl'}"
    assert report.sources[0].dropped[reason] == 3
    missing = source.model_copy(update={"without": "gone.jsonl"})
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        load_sources([missing], tokenizer, **load)  # type: ignore[arg-type]


def test_other_held_out_rows_are_another_cache(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ernie_train.data.cache.LEAST_BYTES", 1)
    write(tmp_path / "rows.jsonl", ASKED)
    source = DataSource(path="rows.jsonl", without="held.jsonl")
    found = []
    for held in (ASKED[:2], ASKED[:3], ASKED[:2]):
        write(tmp_path / "held.jsonl", held)
        (documents,), _ = load_sources(
            [source], tokenizer, kind="sft", seq_len=256, base_dir=tmp_path
        )
        found.append(len(documents))
    assert found == [38, 37, 38]
    assert len(list((tmp_path / "cache").rglob("state.json"))) == 2
