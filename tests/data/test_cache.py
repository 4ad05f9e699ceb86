"""The cache of encoded rows: the same documents, encoded once, continued after any stop."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.data import DataReport, DataSource, Documents, Tokenizer, encoding, load_sources
from ernie_train.data import cache as module


def row(number: int) -> dict[str, Any]:
    answer = "true " * (number % 23 + 1) if number % 7 else " "
    turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "quality": number} if number % 3 else {"messages": turns}


@pytest.fixture
def data(write_rows: Any) -> Path:
    rows = [row(number) for number in range(200)]
    evil = {"messages": [{"role": "user", "content": "<|im_end|>"}, *row(1)["messages"][1:]]}
    return Path(write_rows("rows.jsonl", [*rows[:90], "{", evil, *rows[90:]]))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LEAST_BYTES", 0)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # takes most of the time
    monkeypatch.setattr(encoding, "COMMIT_TOKENS", 1000)
    return tmp_path / "cache"


def load(
    tokenizer: Tokenizer, path: Path, source: dict[str, Any] | None = None, **options: Any
) -> tuple[Documents, DataReport]:
    options = {"kind": "sft", "seq_len": 64, "max_bad_fraction": 0.1, **options}
    entry = DataSource(path=path.name, **(source or {}))
    (documents,), report = load_sources([entry], tokenizer, base_dir=path.parent, **options)
    return documents, report


def facts(documents: Documents, report: DataReport) -> tuple[Any, ...]:
    origins = [document.source for document in documents]
    return documents.checksum(), origins, documents.lengths.tolist(), report.to_dict()


def count_encoded(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Count the rows that are encoded; the one at `stop_at` raises KeyboardInterrupt."""
    encoded: list[int] = []
    original = encoding.SourceEncoding.add

    def add(self: Any, record: Any) -> None:
        encoded.append(1)
        if len(encoded) == stop_at:
            raise KeyboardInterrupt
        original(self, record)

    monkeypatch.setattr(encoding.SourceEncoding, "add", add)
    return encoded


def test_cached_documents_are_those_without_a_cache(
    tokenizer: Tokenizer, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", "off")
    plain = load(tokenizer, data)
    assert not home.exists() and plain[1].sources[0].bad
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", str(home))
    encoded = count_encoded(monkeypatch)
    first, second = load(tokenizer, data), load(tokenizer, data)
    assert facts(*first) == facts(*second) == facts(*plain)
    assert isinstance(second[0].tokens, np.memmap)
    assert (
        Documents(second[0].tokens, second[0].trainable, second[0].offsets).checksum()
        == plain[0].checksum()
    )
    assert len(encoded) == 172, "all but blank ones, once"


@pytest.mark.parametrize("stop_at", [1, 100, 171])
def test_encoding_goes_on_where_it_was_interrupted(
    tokenizer: Tokenizer, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", "off")
    plain = facts(*load(tokenizer, data))
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", str(home))
    with monkeypatch.context() as patch:
        count_encoded(patch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            load(tokenizer, data)
    for array in home.glob("*/tokens.bin"):  # what had not been committed
        array.write_bytes(array.read_bytes() + b"torn")
    encoded = count_encoded(monkeypatch)
    assert facts(*load(tokenizer, data)) == plain
    assert len(encoded) <= 172 - (stop_at - 1) + 60, "what was committed is not encoded again"


def test_everything_that_matters_is_in_the_key(
    tokenizer: Tokenizer, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "COMMIT_TOKENS", 2**22)

    def keys() -> int:
        return len(list(home.glob("*")))

    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({}, {"seq_len": 70}),
        ({}, {"kind": "pretrain"}),
        ({"max_examples": 5}, {}),
        ({"overlong": "truncate"}, {}),
        ({"include_thinking": False}, {}),
        ({"columns": {"domain": "messages.0.role"}}, {}),
        ({"format": "messages"}, {}),
    ]
    for number, (source, options) in enumerate(changes, start=1):
        load(tokenizer, data, source, **options)
        assert keys() == number, (source, options)
    load(tokenizer, data, {"weight": 2.0})
    load(tokenizer, data, {"overlong": "drop"}, max_bad_fraction=0.5, seed=3)
    assert keys() == len(changes), "weight, seed and bounds change no document"
    monkeypatch.setattr(tokenizer, "fingerprint", lambda: "another")
    load(tokenizer, data)
    data.write_text(data.read_text() + json.dumps(row(1)) + "\n")
    load(tokenizer, data)
    assert keys() == len(changes) + 2


@pytest.mark.parametrize("damage", ["cut", "state"])
def test_a_damaged_cache_is_made_again(
    tokenizer: Tokenizer, data: Path, home: Path, damage: str
) -> None:
    plain = facts(*load(tokenizer, data))
    (directory,) = home.glob("*")
    if damage == "cut":
        (directory / "tokens.bin").write_bytes(b"")
    else:
        (directory / "state.json").write_text("{")
    assert facts(*load(tokenizer, data)) == plain


def test_small_sources_and_directories_that_cannot_be_written_do_without(
    tokenizer: Tokenizer, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(module, "LEAST_BYTES", 2**20)
    load(tokenizer, data)
    assert not home.exists()
    monkeypatch.setattr(module, "LEAST_BYTES", 0)
    home.write_text("a file")
    load(tokenizer, data)
    assert "rows are encoded at every start" in caplog.text


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("ERNIE_TRAIN_CACHE", "here")
    assert module._root() == Path("here")
    monkeypatch.delenv("ERNIE_TRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert module._root() == Path("caches/ernie_train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module._root() == Path.home() / ".cache" / "ernie_train"
    monkeypatch.setattr(Path, "home", no_home)
    assert module._root() is None


def _hold(directory: Path, path: Path) -> None:
    with module.exclusive(directory):
        path.write_text("held")
        time.sleep(0.5)
        path.write_text("let go")


def test_one_process_encodes_and_the_others_wait(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, sign))
    process.start()
    while not sign.exists():
        time.sleep(0.01)
    with module.exclusive(tmp_path):
        assert sign.read_text() == "let go"
    process.join()
    assert process.exitcode == 0
