"""Directories that are whole or absent: interruption at every step, full disks, damage."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import CheckpointError, StorageError, UserError
from ernie_train.io import files
from ernie_train.io.files import (
    FileDigest,
    recover,
    remove_directory,
    verify_manifest,
    write_directory,
    write_json,
    write_jsonl,
    write_text,
)


def writer(text: str) -> Callable[[Path], dict[str, FileDigest]]:
    def write(directory: Path) -> dict[str, FileDigest]:
        (directory / "a.txt").write_text(text)
        (directory / "sub").mkdir()
        (directory / "sub" / "b.txt").write_text(text * 2)
        return {}

    return write


def names(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*"))


def test_whole_directory_with_manifest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    write_directory(path, writer("x"), info={"step": 3})
    assert names(path) == ["MANIFEST.json", "a.txt", "sub", "sub/b.txt"]
    manifest = verify_manifest(path)
    assert manifest["step"] == 3
    assert manifest["files"].keys() == {"a.txt", "sub/b.txt"}
    # SHA-256 of "x", from the published algorithm's reference vectors via sha256sum.
    assert manifest["files"]["a.txt"]["sha256"].startswith("2d711642b726b04401627ca9fbac32f5c853")


def test_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> dict[str, FileDigest]:
        writer("x")(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "out", fail)
    assert names(tmp_path) == []


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def steps_of_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Counts the points at which a replacement can be cut: each call that changes the disk."""
    return run_until(tmp_path / "count", monkeypatch, -1)


def run_until(root: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> int:
    """Replaces `root/out` and dies before the disk-changing call number `stop_at`."""
    root.mkdir()
    write_directory(root / "out", writer("old"))
    calls = 0

    def counted(function: Callable) -> Callable:  # type: ignore[type-arg]
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            if calls == stop_at:
                raise Killed
            calls += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "unlink", "rmdir", "touch", "replace"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(files, "sync_path", counted(files.sync_path))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        # A killed process does not clean up either.
        original = files.recover
        recovered = iter([original])
        patch.setattr(files, "recover", lambda path: next(recovered, lambda _: None)(path))
        with contextlib.suppress(Killed):
            write_directory(root / "out", writer("new"))
    return calls


def test_a_kill_at_any_point_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = steps_of_replacement(tmp_path, monkeypatch)
    assert total > 15
    seen = set()
    for stop_at in range(total):
        root = tmp_path / str(stop_at)
        run_until(root, monkeypatch, stop_at)
        recover(root / "out")
        verify_manifest(root / "out")
        assert names(root / "out") == ["MANIFEST.json", "a.txt", "sub", "sub/b.txt"], stop_at
        assert names(root)[0] == "out"
        assert [p.name for p in root.iterdir()] == ["out"], stop_at
        seen.add((root / "out" / "a.txt").read_text())
        write_directory(root / "out", writer("later"))  # and the next one works
        assert (root / "out" / "a.txt").read_text() == "later"
    assert seen == {"old", "new"}


def test_a_kill_while_deleting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stop_at in range(8):
        root = tmp_path / str(stop_at)
        root.mkdir()
        write_directory(root / "out", writer("x"))
        left = stop_at

        def counted(function: Callable) -> Callable:  # type: ignore[type-arg]
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "rmdir", "touch"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            with contextlib.suppress(Killed):
                remove_directory(root / "out")
        if (root / "out").exists():
            verify_manifest(root / "out")
        recover(root / "out")
        assert [p.name for p in root.iterdir()] in ([], ["out"])


def test_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("x")
    with pytest.raises(StorageError, match="in the way"):
        write_directory(tmp_path / "out", writer("x"))
    assert (tmp_path / "out.tmp" / "mine").exists()
    (tmp_path / "out.tmp" / "mine").rename(tmp_path / "mine")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "mine").write_text("x")
    write_directory(tmp_path / "out", writer("x"))
    assert (tmp_path / "out.old" / "mine").exists()


def test_foreign_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "MANIFEST.json").write_text('{"format": "of another program"}')
    with pytest.raises(UserError, match="not written by this program"):
        write_directory(tmp_path / "out", writer("x"))


@pytest.mark.parametrize("made", ["absent", "empty", "earlier"])
def test_a_directory_behind_a_link_is_written_where_it_lies(tmp_path: Path, made: str) -> None:
    place, link = tmp_path / "other disk" / "out", tmp_path / "out"
    place.parent.mkdir()
    if made == "empty":
        place.mkdir()
    elif made == "earlier":
        write_directory(place, writer("old"))
    link.symlink_to(place)
    write_directory(link, writer("new"))
    assert link.is_symlink() and (place / "a.txt").read_text() == "new"
    assert names(tmp_path)[-1] == "out" and not list(tmp_path.rglob("*.old"))
    verify_manifest(link)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="no permission"):
        write_directory(tmp_path / "out", writer("x"))
    tmp_path.chmod(0o700)


def test_unwritable_place() -> None:
    with pytest.raises(StorageError, match="cannot write"):
        write_directory(Path("/proc/ernie_train/out"), writer("x"))


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        write_directory(tmp_path / "file" / "out", writer("x"))


# ---- manifests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "ernie_train 1"}', '{"format": "ernie_train 1", "files": {}}'],
)
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "MANIFEST.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        verify_manifest(tmp_path)


def test_every_damaged_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_directory(path, writer("abcdef"))
    (path / "a.txt").write_text("abcdeF")
    (path / "sub" / "b.txt").write_text("abc")
    verify = verify_manifest
    with pytest.raises(CheckpointError, match=r"a\.txt: content differs.*b\.txt: 3 bytes"):
        verify(path)
    with pytest.raises(CheckpointError, match=r"b\.txt") as caught:
        verify(path, hashes=False)
    assert "a.txt" not in str(caught.value)
    (path / "a.txt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.txt: No such file"):
        verify(path)


@pytest.mark.parametrize(
    ("write", "first", "second", "unwritable"),
    [
        (write_json, {"a": "ä"}, {"a": 2}, {"a": object()}),
        (write_jsonl, [1, {"b": "ä"}], [2], [3, object()]),
        (write_text, "ä\n", "b", "\ud800"),
    ],
)
def test_a_file_is_replaced_whole_or_not_at_all(
    write: Any, first: Any, second: Any, unwritable: Any,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "x"
    write(path, first)
    old = path.read_bytes()
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write(path, unwritable)
    assert path.read_bytes() == old

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="disk is full"):
            write(path, second)
    assert path.read_bytes() == old
    assert names(tmp_path) == ["x"]
    write(path, second)
    assert path.read_bytes() != old


def test_what_writers_write_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": "ä"})
    assert json.loads((tmp_path / "x").read_text("utf-8")) == {"a": "ä"}
    write_jsonl(tmp_path / "x", [1, {"b": "ä"}])
    assert (tmp_path / "x").read_text("utf-8") == '1\n{"b": "ä"}\n'
    write_text(tmp_path / "x", "ä\r\n")
    assert (tmp_path / "x").read_bytes() == "ä\r\n".encode()


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    write_text(tmp_path / "talk.jsonl", "first")
    (tmp_path / "talk.jsonl").chmod(0o600)
    write_text(tmp_path / "talk.jsonl", "second")
    assert (tmp_path / "talk.jsonl").stat().st_mode & 0o777 == 0o600


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    write_text(Path(os.devnull), "new")
    assert Path(os.devnull).is_char_device()
