"""One run per directory, and stages that are finished only for the settings that made them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import CheckpointError, StorageError, UserError
from ernie_train.io.run_dir import (
    RunLock,
    StageDone,
    differences,
    fingerprint,
    lock_owner,
    read_done,
    write_done,
)

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from ernie_train.io.run_dir import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLDER, str(run_dir)],
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by another run .*{process.pid}") as caught:
            RunLock(run_dir).acquire()
        assert caught.value.exit_status == 2
    finally:
        process.kill()
        process.communicate()
    with RunLock(run_dir):  # the lock went with the process, killed as it was
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    """Such as Lustre, unless it is mounted with flock."""

    def flock(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StorageError, match=r"run: its file system has no locks \(Function not"):
        RunLock(tmp_path / "run").acquire()
    assert lock_owner(tmp_path / "run") is None


def test_lock_is_free_again_after_use(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).acquire()
    assert lock_owner(tmp_path) is None
    with RunLock(tmp_path):
        assert f"process {os.getpid()}" in (lock_owner(tmp_path) or "")
    with RunLock(tmp_path):
        pass


def test_unwritable_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="run directory"):
        RunLock(tmp_path / "file" / "run").acquire()
    with pytest.raises(StorageError, match="run directory"):
        RunLock("/proc/ernie_train_run").acquire()


def test_done_round_trip(tmp_path: Path) -> None:
    assert read_done(tmp_path) is None
    done = StageDone({"lr": 1e-3, "data": [{"path": "a"}]}, {"model": "abc"}, {"loss": 0.5})
    write_done(tmp_path, done)
    assert read_done(tmp_path) == done


def test_what_changed_is_named() -> None:
    before = {"optim": {"lr": 1e-3}, "data": [{"path": "a"}]}
    assert differences(before, {"data": [{"path": "a"}], "optim": {"lr": 0.001}}) == []
    assert differences(before, {"optim": {"lr": 2e-3}, "data": [{"path": "b"}]}) == [
        "optim.lr: 0.001 -> 0.002",
        "data.0.path: a -> b",
    ]
    assert differences({"model": "abc"}, {"model": "x"}, "input") == ["input.model: abc -> x"]
    assert differences({"a": 1}, {"b": [1]}) == ["a: 1 -> (absent)", "b: (absent) -> [1]"]
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a: [1] -> [1, 2]"]
    assert differences({"a": 1}, {"a": True}) == ["a: 1 -> true"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": "", "settings": {}}'])
def test_damaged_done(tmp_path: Path, text: str) -> None:
    (tmp_path / "DONE").write_text(text)
    with pytest.raises(CheckpointError, match="DONE: damaged"):
        read_done(tmp_path)


def test_altered_done(tmp_path: Path) -> None:
    write_done(tmp_path, StageDone({"lr": 1.0}, {}, {}))
    value = json.loads((tmp_path / "DONE").read_text())
    value["settings"]["lr"] = 2.0
    (tmp_path / "DONE").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="own hash"):
        read_done(tmp_path)


def test_fingerprint_ignores_the_order_of_keys_only() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint(1) != fingerprint(1.5)
