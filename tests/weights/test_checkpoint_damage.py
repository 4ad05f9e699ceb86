"""Checkpoints on disks that flip bits, cut files, are full, or whose writer is killed."""

import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from ernie_train.core.errors import CheckpointError, StorageError
from tests.weights.checkpoints import check, make_model, make_store, save, weights

NORM = "model.norm.weight"

# ---- damage ------------------------------------------------------------------------------------


def damage_bit(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = save(store, 1)
    files = sorted(path.iterdir())
    generator = random.Random(0)
    for turn in range(150):
        file = files[turn % len(files)]
        before = file.read_bytes()
        damage_bit(file, generator.randrange(len(before)), generator.randrange(8))
        if file.name == "MANIFEST.json":
            try:  # a changed blank or a changed case of an escape changes nothing
                check(store, path, 1)
            except CheckpointError as error:
                assert file.name in str(error) or "step_000001" in str(error)
        else:
            with pytest.raises(CheckpointError, match=file.name):
                store.load(path)
        file.write_bytes(before)
    check(store, path, 1)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = save(store, 1)
    for file in sorted(path.iterdir()):
        before = file.read_bytes()
        for length in (0, len(before) // 2, len(before) - 2):
            file.write_bytes(before[:length])
            with pytest.raises(CheckpointError, match=file.name):
                store.load(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            store.load(path)
        file.write_bytes(before)
    check(store, path, 1)


def test_latest_is_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path, keep_last=5)
    for step in (1, 2, 3, 4):
        save(store, step)
    (tmp_path / "step_000004" / "MANIFEST.json").unlink()
    damage_bit(next((tmp_path / "step_000003").glob("optimizer-*")), -1, 0)
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest == tmp_path / "step_000002"
    check(store, latest, 2)
    assert "step_000004: incomplete" in caplog.text
    assert "content differs" in caplog.text


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (1, 2):
        (save(store, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint.*state\.json.*state\.json"):
        store.latest()


def test_other_things_in_the_directory_do_not_matter(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_000009.tmp").mkdir()
    (tmp_path / "step_000009.tmp" / ".ernie_train_incomplete").touch()
    (tmp_path / "step_000009.tmp" / "model.safetensors").write_text("half")
    assert store.latest() is None
    save(store, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_notes"]


# ---- disks that are full or closed -------------------------------------------------------------


def test_failing_disk_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file operation of a save fails once; the earlier checkpoint stays each time."""
    store = make_store(tmp_path)
    save(store, 1)
    real, calls, fail_at = os.fsync, 0, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    while True:
        calls, fail_at = 0, fail_at + 1
        try:
            save(store, 2)
        except StorageError as error:
            assert "disk is full" in str(error)
            failures += 1
        else:
            break
        latest = store.latest()
        assert latest is not None
        check(store, latest, int(latest.name[-1]))
        assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    assert failures > 10
    check(store, store.path_of(2), 2)


def in_a_fork(work: Callable[..., None], *arguments: object) -> tuple[ForkProcess, IO[str]]:
    """Start `work`, whose last argument is a pipe, in a fork of this process, and read the pipe."""
    reading, writing = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(*arguments, writing))
    process.start()
    os.close(writing)
    return process, os.fdopen(reading)


def fill_disk(directory: Path, kind: str, out: int) -> None:
    """Save until that fails; write to `out` the last step that was saved, and why."""
    store = make_store(directory, keep_last=50)
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    for step in range(2, 200):
        try:
            save(store, step)
        except StorageError as error:
            os.write(out, f"{step - 1} {error}".encode())
            break


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_full_disk(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a small disk needs privileges")
    try:
        store = make_store(directory)
        save(store, 1)
        process, told = in_a_fork(fill_disk, directory, kind)
        with told:
            last, message = told.read().split(maxsplit=1)
        process.join()
        assert ("disk is full" if kind == "tmpfs" else "size limit") in message
        latest = store.latest()
        assert latest == store.path_of(int(last))
        check(store, latest, int(last))
        assert not [p for p in directory.iterdir() if p.suffix]
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(directory)], check=True)


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        save(make_store(tmp_path / "file" / "checkpoints"), 1)
    with pytest.raises(StorageError, match="cannot write"):
        save(make_store(Path("/proc/checkpoints")), 1)


def test_ctrl_c_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads end before their directory is deleted; the earlier checkpoint stays."""
    store = make_store(tmp_path)
    save(store, 1)
    real, pressed, is_there = os.fsync, threading.Lock(), []

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if threading.current_thread() is not threading.main_thread():
            if pressed.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            is_there.append((tmp_path / "step_000002.tmp").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            save(store, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    time.sleep(0.3)  # for threads that nobody waited for
    assert is_there and all(is_there)
    check(store, store.path_of(1), 1)


# ---- kill -9 -----------------------------------------------------------------------------------


def save_on(directory: Path, out: int) -> None:
    """Write to `out` how long a save takes, then each step that has been saved."""
    store = make_store(directory, keep_last=2, best_metric="score")
    saved = store.load_latest()
    step = saved.step if saved else 0
    start = time.monotonic()
    save(make_store(directory / "trial"), step)
    os.write(out, f"{time.monotonic() - start}\n".encode())
    while True:
        step += 1
        save(store, step, score=step % 5)
        os.write(out, f"{step}\n".encode())


def kill_while_saving(directory: Path, kills: int) -> None:
    generator = random.Random(kills)
    store = make_store(directory, keep_last=2, best_metric="score")
    known = 0
    for _ in range(kills):
        process, told = in_a_fork(save_on, directory)
        # So many seconds a save takes now: a busy machine needs longer to write any.
        time.sleep(generator.uniform(0.0, 4 * float(told.readline())))
        process.kill()
        process.join()
        with told:
            reported = [int(line) for line in told]
        known = max([known, *reported])
        latest = store.latest()
        if known:
            assert latest is not None
            assert int(latest.name[5:]) in (known, known + 1)  # killed before it could say so
        if latest is not None:
            known = int(latest.name[5:])
            check(store, latest, known)
            # Everything that looks like a checkpoint is one, but for what was being deleted.
            for step in store.steps():
                check(store, store.path_of(step), step)
    assert known > 0


def test_kill_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 5)


@pytest.mark.slow
def test_many_kills_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 30)


def test_a_kill_while_optimizer_state_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call that changes the disk; checkpoints load after it, and the next call ends it."""

    class Killed(BaseException):
        """Stands for the end of the process: nothing after it runs."""

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Killed
            return function(*arguments, **options)

        return call

    kills, stop_at = 0, 0
    while kills == stop_at:
        calls, stop_at = 0, stop_at + 1
        store = make_store(tmp_path / str(stop_at))
        for step in (1, 2):
            save(store, step)
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                store.remove_optimizer()
            except Killed:
                kills += 1
        for step in (1, 2):
            path = store.path_of(step)
            saved = store.load(path)
            if saved.optimizer:
                check(store, path, step)
            else:
                model = make_model(99)
                saved.load_model(model)
                assert saved.state == {"seen": step * 10}
                np.testing.assert_array_equal(weights(model)[NORM], weights(make_model(step))[NORM])
        store.remove_optimizer()
        assert not list(store.directory.rglob("optimizer*")) and not store.has_optimizer()
    assert kills > 10
