"""Write files and directories atomically, and verify them later against a manifest.

A file is written as `<name>.tmp`, synced and renamed.

A directory is written as `<name>.tmp`, every file is synced, `MANIFEST.json` (sizes and SHA-256 of
the files) is written last, and one rename makes it visible. A directory that is replaced is first
moved to `<name>.old`; `recover` moves it back if the new one was never renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, StorageError, UserError, storage_errors
from ernie_train.core.foreign_files import open_regular, read_json
from ernie_train.io.threads import FILES_AT_ONCE, GoOn, in_threads

MANIFEST = "MANIFEST.json"
GENERATION_CONFIG = "generation_config.json"  # of a model: what ends a text, how to sample
MANIFEST_FORMAT = "ernie_train 1"
# Marks a `.tmp` or `.old` directory as ours, so that cleaning up deletes no other program's files.
MARKER = ".ernie_train_incomplete"
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileDigest:
    """Hold the size and hash of a file, as a manifest lists them."""

    size: int  # bytes
    sha256: str


# ---- files -------------------------------------------------------------------------------------
def sync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path, go_on: GoOn = lambda: None) -> FileDigest:
    """Return the size and SHA-256 of a file, read by the MiB; `go_on` is called for each."""
    sha, size = hashlib.sha256(), 0
    with open_regular(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            go_on()
            sha.update(chunk)
            size += len(chunk)
    return FileDigest(size, sha.hexdigest())


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary stream whose content becomes the file `path` when the block ends.

    A reader sees the old file or the new one, never a part, even after a power cut. If the block
    raises, the old file is kept. The new one has its permissions. For a symbolic link the target is
    replaced; devices and pipes are written directly.

    Raises:
        StorageError: the disk is full or the path cannot be written.
    """
    with storage_errors("cannot write", path):
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                yield stream
            return
        target = path.resolve()
        temporary = target.with_name(target.name + ".tmp")
        try:
            with temporary.open("wb") as stream:
                with suppress(OSError):  # there is none, or a file system without permissions
                    shutil.copymode(target, temporary)
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):  # do not hide the first error
                temporary.unlink(missing_ok=True)
            raise
        sync_path(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `atomic_write`."""
    with atomic_write(path) as stream:
        stream.write(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file with `atomic_write`; the target's directory is made."""
    target.parent.mkdir(exist_ok=True)
    with source.open("rb") as stream, atomic_write(target) as out:
        shutil.copyfileobj(stream, out)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with `atomic_write`."""
    with atomic_write(path) as stream:
        stream.write(_encoded(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line with `atomic_write`."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(_encoded(json.dumps(row, ensure_ascii=False) + "\n"))


def _encoded(text: str) -> bytes:
    """Return UTF-8; half of a surrogate pair is escaped, as JSON reads it."""
    return text.encode("utf-8", "backslashreplace")


# ---- manifests ---------------------------------------------------------------------------------
def write_manifest(
    directory: Path, digests: dict[str, FileDigest], info: dict[str, Any] | None = None
) -> None:
    """Write `MANIFEST.json`: the digests of the files, `info` and a hash of the manifest itself."""
    files = {n: {"size": d.size, "sha256": d.sha256} for n, d in sorted(digests.items())}
    manifest = {"format": MANIFEST_FORMAT, **(info or {}), "files": files}
    write_json(directory / MANIFEST, {**manifest, "sha256": fingerprint(manifest)})


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(_encoded(text)).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the content of `MANIFEST.json`.

    Raises:
        CheckpointError: it is missing, damaged or from another program.
    """
    path = directory / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: incomplete, it has no {MANIFEST}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if manifest.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(f"{path}: not a manifest of this program ({MANIFEST_FORMAT!r})")
    if manifest.pop("sha256", None) != fingerprint(manifest):
        raise CheckpointError(f"{path}: damaged: it does not match its own hash")
    return manifest


def has_manifest(directory: Path) -> bool:
    """Return whether `read_manifest` succeeds."""
    try:
        read_manifest(directory)
    except CheckpointError:
        return False
    return True


def verify_manifest(directory: Path, *, hashes: bool = True) -> dict[str, Any]:
    """Compare the files in `directory` with its manifest and return the manifest.

    With `hashes=False` only sizes are compared.

    Raises:
        CheckpointError: files are missing, truncated or altered; the message lists all of them.
    """
    manifest = read_manifest(directory)

    def problem(name: str, go_on: GoOn) -> str | None:
        path, expected = directory / name, manifest["files"][name]
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{path}: {size} bytes instead of {expected['size']}: truncated?"
            if hashes and digest_file(path, go_on).sha256 != expected["sha256"]:
                return f"{path}: content differs from its hash: damaged"
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None

    found = in_threads(problem, manifest["files"], FILES_AT_ONCE if hashes else 1)
    if problems := list(filter(None, found)):
        raise CheckpointError("; ".join(problems))
    return manifest


def remove_files(directory: Path, chosen: Callable[[str], Any], info: dict[str, Any]) -> int:
    """Delete files of a directory that we wrote, those with `chosen(name)`; return their bytes.

    The manifest, which gets `info`, loses them first: so the directory is whole after a kill, and
    another call deletes what is left.

    Raises:
        CheckpointError: there is no manifest, or a damaged one; nothing is deleted.
        StorageError: the disk is full or the files cannot be deleted.
    """
    manifest = read_manifest(directory)
    listed = {name: FileDigest(**facts) for name, facts in manifest.pop("files").items()}
    with storage_errors("cannot delete files", directory):
        if any(map(chosen, listed)):
            kept = {name: digest for name, digest in listed.items() if not chosen(name)}
            write_manifest(directory, kept, manifest | info)
        found = [file for file in directory.rglob("*") if file.is_file()]
        doomed = [file for file in found if chosen(file.relative_to(directory).as_posix())]
        freed = sum(file.stat().st_size for file in doomed)
        for file in doomed:
            file.unlink()
    return freed


# ---- directories -------------------------------------------------------------------------------
def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _discard(path: Path) -> None:
    """Delete a directory that we wrote; the marker is deleted last, in case of a kill."""
    for entry in sorted(path.iterdir()):
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (path / MARKER).unlink(missing_ok=True)
    path.rmdir()


def recover(path: Path) -> None:
    """Clean up after a killed writer: delete `<path>.tmp`, restore or delete `<path>.old`.

    Raises:
        StorageError: `<path>.tmp` was not written by this program, or cannot be deleted.
    """
    old, temporary = _sibling(path, ".old"), _sibling(path, ".tmp")
    with storage_errors("cannot clean up", path):
        # A `.old` without our marker may be a user's backup, unless it is empty.
        if old.is_dir() and ((old / MARKER).exists() or not any(old.iterdir())):
            if path.exists():
                _discard(old)
            else:
                old.rename(path)
                sync_path(path.parent)
        (path / MARKER).unlink(missing_ok=True)
        if temporary.exists():
            if not _is_ours(temporary):
                raise StorageError(f"{temporary} is in the way and not ours: move it away")
            _discard(temporary)


def _is_ours(path: Path) -> bool:
    if not path.is_dir():
        return False
    return (path / MARKER).exists() or has_manifest(path) or not any(path.iterdir())


def remove_directory(path: Path) -> None:
    """Delete a directory that we wrote; it is renamed first, so a kill leaves no partial one.

    Raises:
        StorageError: the directory cannot be deleted.
    """
    with storage_errors("cannot delete", path):
        (path / MARKER).touch()
        doomed = _sibling(path, ".tmp")  # `recover` deletes it after a kill
        if doomed.exists():
            _discard(doomed)
        path.rename(doomed)
        sync_path(path.parent)
        _discard(doomed)


def write_directory(
    path: Path,
    write: Callable[[Path], dict[str, FileDigest]],
    *,
    info: dict[str, Any] | None = None,
    manifest_all: bool = True,
    unlisted: Collection[str] = (),
) -> None:
    """Create the directory `path` atomically from the files that `write` writes.

    An existing `path` is replaced only if it is empty or has our manifest; of a symbolic link it is
    the directory that the link leads to. Every rank must call it: `write` runs on each rank, for
    that rank's files in the one directory; rank 0 does the rest.
    Steps of `write` that can fail on one rank alone must run inside `consensus.fail_together`.

    Args:
        path: the directory to create or replace.
        write: writes files into the temporary directory that it is given and returns the digests
            that it already knows, file name -> digest.
        unlisted: names of files that users may edit, which the manifest leaves out.
        info: further entries of the manifest.
        manifest_all: True to list in the manifest the files too that `write` returns no digest of.

    Raises:
        UserError: `path` exists and is anything else.
        StorageError: the disk is full or `path` cannot be written. The old directory is kept.
    """
    path = path.resolve()
    temporary = _sibling(path, ".tmp")
    with consensus.fail_together():
        if process_group.is_main():
            _begin(path, temporary)
    try:
        with storage_errors("cannot write", path):
            digests = dict(write(temporary))
        gathered = process_group.all_gather_objects(digests)
        with consensus.fail_together():
            if process_group.is_main():
                merged = {name: digest for part in gathered for name, digest in part.items()}
                _finish(path, temporary, merged, info, manifest_all, {MARKER, *unlisted})
    except BaseException:
        if process_group.is_main():
            with storage_errors("cannot write", path):
                recover(path)
        raise


def _begin(path: Path, temporary: Path) -> None:
    check_replaceable(path)
    with storage_errors("cannot write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        temporary.mkdir()
        (temporary / MARKER).touch()


def _finish(
    path: Path,
    temporary: Path,
    digests: dict[str, FileDigest],
    info: dict[str, Any] | None,
    manifest_all: bool,
    unlisted: set[str],
) -> None:
    with storage_errors("cannot write", path):
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            name = file.relative_to(temporary).as_posix()
            if manifest_all and name not in digests and file.name not in unlisted:
                digests[name] = digest_file(file)
            sync_path(file)
        write_manifest(temporary, digests, info)
        _publish(temporary, path)


def check_replaceable(path: Path) -> None:
    """Check that `write_directory` may replace `path`.

    Raises:
        UserError: `path` is a file, or a directory with content that we did not write.
    """
    if path.is_dir():
        if any(path.iterdir()) and not has_manifest(path):
            raise UserError(
                f"{path} exists, is not empty and was not written by this program: "
                "give another path or move it away"
            )
    elif path.exists():
        raise UserError(f"{path} exists and is not a directory")


def _publish(temporary: Path, path: Path) -> None:
    (temporary / MARKER).unlink()
    sync_path(temporary)
    old = _sibling(path, ".old")
    replaced = path.exists() and any(path.iterdir())
    if replaced:
        (path / MARKER).touch()
        path.rename(old)
    temporary.rename(path)  # over an empty directory too
    sync_path(path.parent)
    if replaced:
        _discard(old)
