"""The cache of encoded rows: the same documents, encoded once, continued after any stop."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core.errors import ConfigError
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
    assert not home.exists() and plain[1].sources[0].bad.count
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


@pytest.mark.parametrize("source", [{}, {"max_examples": 5}])
def test_a_kill_between_the_last_row_and_the_end_mark_changes_nothing(
    tokenizer: Tokenizer,
    data: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: dict[str, Any],
) -> None:
    with data.open("a") as stream:
        stream.write("{\n")  # a bad row behind the last good one
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", "off")
    plain = facts(*load(tokenizer, data, source))
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", str(home))

    def kill(store: module.DocumentStore) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.DocumentStore, "finish", kill)
        load(tokenizer, data, source)
    assert facts(*load(tokenizer, data, source)) == plain


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


def test_a_file_system_without_locks_does_without(
    tokenizer: Tokenizer, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def flock(stream: Any, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    assert len(load(tokenizer, data)[0])
    assert "rows are encoded at every start: [Errno 38] Function not implemented" in caplog.text


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


def release() -> None:
    """Let go of what this process holds, as its end does."""
    module._held.close()


def test_caches_used_longest_ago_are_removed_beyond_the_bound(
    tokenizer: Tokenizer, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release()
    expected = {length: facts(*load(tokenizer, data, seq_len=length)) for length in (32, 40, 48)}
    release()
    made = sorted(home.iterdir(), key=lambda path: (path / "in_use").stat().st_mtime_ns)
    for age, directory in enumerate(reversed(made)):
        for file in directory.iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    others = [home / "photos", home / ("a" * 32)]
    for other in others:
        other.mkdir()
        (other / "mine").write_text("x" * 10**6)
    assert facts(*load(tokenizer, data, seq_len=32)) == expected[32]  # used again, and held
    assert sorted(home.iterdir()) == sorted([*made, *others]), "nothing new was encoded"
    monkeypatch.setenv("ERNIE_TRAIN_CACHE_GB", str(3.5e-9 * size(made[2])))
    load(tokenizer, data, seq_len=56)
    assert [path.exists() for path in made] == [True, False, True], "the oldest, but for the held"
    assert all(other.exists() for other in others)
    monkeypatch.setenv("ERNIE_TRAIN_CACHE_GB", "0")
    documents, report = load(tokenizer, data, seq_len=60)
    assert [path.exists() for path in made] == [True, False, False]
    assert facts(documents, report) == facts(*load(tokenizer, data, seq_len=60))
    release()
    load(tokenizer, data, seq_len=64)
    assert not made[0].exists() and len(list(home.iterdir())) == 1 + len(others)


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def test_what_a_process_holds_is_closed_at_its_end(tmp_path: Path) -> None:
    program = f"from ernie_train.data import cache; cache.hold(cache.Path({str(tmp_path)!r}))"
    command = [sys.executable, "-W", "default::ResourceWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "in_use" not in done.stderr and (tmp_path / "in_use").exists()


def test_a_cache_that_is_encoded_or_read_stays(tmp_path: Path) -> None:
    directory = tmp_path / ("b" * 32)
    with module.exclusive(directory):
        (directory / "tokens.bin").write_text("x")
        assert module.evict(tmp_path, 0) == []
        module.hold(directory)
    assert module.evict(tmp_path, 0) == [] and directory.exists()
    release()
    assert module.evict(tmp_path, 0) == [directory] and not directory.exists()


@pytest.fixture
def unused(tmp_path: Path) -> Path:
    """A finished directory of the cache that no process holds."""
    directory = tmp_path / ("b" * 32)
    with module.exclusive(directory):
        (directory / "tokens.bin").write_text("x")
        module.hold(directory)
    release()
    return directory


def test_a_cache_is_gone_from_its_name_before_its_files_are(
    unused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def remove(path: Path) -> None:
        with module.exclusive(unused):  # by a process that comes at this moment
            seen.append(sorted(file.name for file in unused.iterdir()))
            (unused / "state.json").write_text("{}")
        original(path)

    original = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert module.evict(unused.parent, 0) == [unused]
    assert seen == [["lock"]], "nothing half removed is seen"
    assert list(unused.parent.iterdir()) == [unused] and (unused / "state.json").exists()


def test_a_cache_that_was_made_anew_meanwhile_stays(
    unused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locks(stream: Any, kind: int) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(module, "_locks", original)
            shutil.rmtree(unused)
            with module.exclusive(unused):
                module.hold(unused)
        return original(stream, kind)

    original = module._locks
    monkeypatch.setattr(module, "_locks", locks)
    assert module.evict(unused.parent, 0) == [] and unused.exists()
    release()


def test_what_an_interrupted_removal_left_is_removed(unused: Path) -> None:
    left = unused.with_name(f"{unused.name}.removed-{'a' * 32}")
    left.mkdir()
    (left / "tokens.bin").write_text("x")
    assert module.evict(unused.parent, 10**6) == []
    assert list(unused.parent.iterdir()) == [unused]


@pytest.mark.parametrize("call", ["iterdir", "rename", "root"])
def test_a_cache_of_someone_else_stays_and_stops_nothing(
    unused: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, call: str
) -> None:
    theirs = unused.parent if call == "root" else unused.parent / ("f" * 32)
    if call != "root":
        shutil.copytree(unused, theirs)
    name = "iterdir" if call == "root" else call
    original = getattr(Path, name)

    def refuse(path: Path, *arguments: Any) -> Any:
        if path == theirs:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments)

    monkeypatch.setattr(Path, name, refuse)
    assert module.evict(unused.parent, 0) == ([] if call == "root" else [unused])
    assert theirs.exists() and f"the cache {theirs} stays" in caplog.text


def test_who_waited_for_a_cache_that_was_removed_makes_it_anew(tmp_path: Path) -> None:
    directory = tmp_path / ("c" * 32)
    entered = threading.Event()

    def wait() -> None:
        with module.exclusive(directory):
            (directory / "state.json").write_text("{}")
            entered.set()

    waiting = threading.Thread(target=wait)
    with module.exclusive(directory):
        waiting.start()
        time.sleep(0.02)
        shutil.rmtree(directory)
    waiting.join(timeout=10)
    assert entered.is_set() and (directory / "lock").exists()


@pytest.mark.parametrize("text", ["much", "-1", "inf", "nan"])
def test_a_bound_that_is_no_size_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ERNIE_TRAIN_CACHE_GB", text)
    with pytest.raises(ConfigError, match=f"ERNIE_TRAIN_CACHE_GB={text}: it must be a number"):
        module.cache_bound()
