"""Keep encoded documents on disk, so that rows are encoded once for all ranks, starts and restarts.

    DIRECTORY/KEY/tokens.bin trainable.bin ends.bin origins.bin lengths.bin state.json

KEY is a hash of all that the arrays depend on: the contents of the data files, the tokenizer, the
settings and the code. The arrays grow by appending; `state.json` is written after them and says how
far they are valid, so that encoding goes on where it was interrupted. Finished arrays are
memory-mapped. Deleting a directory costs the time to encode again, nothing else.

DIRECTORY is $ERNIE_TRAIN_CACHE ("off" switches the cache off), else ernie_train in $XDG_CACHE_HOME
or ~/.cache. After rows were encoded, those used longest ago are removed until all together have at
most $ERNIE_TRAIN_CACHE_GB; what a process has opened stays.

A directory may also hold `found.json` alone: what was found out about rows (`remember`).
"""

import atexit
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from ernie_train.core.cpu import CACHE, cache_root
from ernie_train.core.errors import ConfigError, storage_errors
from ernie_train.core.foreign_files import read_json
from ernie_train.data.documents import DocumentBuilder, Documents, Origins
from ernie_train.io.files import digest_file, fingerprint, sync_path, write_json

_log = logging.getLogger(__name__)

BOUND = "ERNIE_TRAIN_CACHE_GB"
DEFAULT_GB = 100.0
# Smaller sources are encoded in a moment, and need no files. Files may be compressed: the 9350 rows
# of 265 kB with which `recipes/tiny.yaml` begins take 14 s.
LEAST_BYTES = 2**15
STATE, FOUND = "state.json", "found.json"
LOCK, IN_USE = "lock", "in_use"
ARRAYS = {
    "tokens": np.dtype(np.int32),
    "trainable": np.dtype(np.bool_),
    "ends": np.dtype(np.int64),
    "origins": np.dtype(np.int64),
    "lengths": np.dtype(np.int64),
}
POLL_S = 0.1
_CHUNK_BYTES = 2**24
_KEY = re.compile(r"[0-9a-f]{32}")
_REMOVED = re.compile(rf"{_KEY.pattern}\.removed-{_KEY.pattern}")


def cache_directory(files: Sequence[Path], facts: dict[str, Any]) -> Path | None:
    """Return the directory for what is encoded from `files`; None if nothing is to be kept.

    facts: everything else that the encoded documents depend on, as JSON values.
    """
    root = cache_root()
    if root is None or sum(file.stat().st_size for file in files) < LEAST_BYTES:
        return None
    contents = [[str(file), digest_file(file).sha256] for file in files]
    directory = root / fingerprint([_code(), contents, facts])[:32]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # It may be someone else's, or on a file system without locks, as some clusters have.
        with suppress(FileNotFoundError), (directory / LOCK).open("ab") as stream:
            _locks(stream, fcntl.LOCK_SH)
    except OSError as error:
        _log.warning(
            "rows are encoded at every start: %s (%s names another directory)", error, CACHE
        )
        return None
    return directory


def recall(facts: Any) -> dict[str, Any]:
    """Return what `remember` was given with these facts, by this code; {} if there is nothing."""
    directory = _place_of(facts)
    try:
        return {} if directory is None else read_json(directory / FOUND)
    except (OSError, ValueError):
        return {}


def remember(facts: Any, found: dict[str, Any]) -> None:
    """Keep what was found out, which depends on `facts` and the code of this package alone.

    Both are JSON values. Where nothing can be kept it is found out at every start.
    """
    directory = _place_of(facts)
    if directory is None:
        return
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK).touch()  # by which `evict` knows a directory of the cache
        write_json(directory / FOUND, found)


def _place_of(facts: Any) -> Path | None:
    root = cache_root()
    return None if root is None else root / fingerprint([_code(), FOUND, facts])[:32]


@functools.cache
def _code() -> str:
    """Return a hash of the code that reads and encodes rows."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Let one process at a time into a directory of the cache; the others wait.

    The lock ends with its process, however that ends.
    """
    with storage_errors("cannot lock", directory), _waited_for(directory):
        yield


def _waited_for(directory: Path) -> IO[bytes]:
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)  # it may have been removed meanwhile
            stream = (directory / LOCK).open("wb")
        except FileNotFoundError:  # removed between the two
            continue
        if _locks(stream, fcntl.LOCK_EX) and _is_at(stream, directory / LOCK):
            return stream
        stream.close()
        time.sleep(POLL_S)  # a blocking call would not see signals


def _locks(stream: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(stream: IO[bytes], path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(stream.fileno()).st_ino
    except FileNotFoundError:
        return False


_held = ExitStack()  # locks of what this process maps
atexit.register(_held.close)


def hold(directory: Path) -> None:
    """Keep a directory, which this process has locked, from being removed while it runs."""
    with storage_errors("cannot lock", directory):
        while True:
            stream = (directory / IN_USE).open("wb")
            fcntl.flock(stream, fcntl.LOCK_SH)
            if _is_at(stream, directory / IN_USE):
                break
            stream.close()  # of a directory that was removed meanwhile
        os.utime(directory / IN_USE)
    _held.enter_context(stream)


def cache_bound() -> int:
    """Return the bytes that all directories of the cache may have; raises `ConfigError`."""
    text = os.environ.get(BOUND) or str(DEFAULT_GB)
    try:
        bound = float(text)
    except ValueError:
        bound = -1.0
    if not 0 <= bound < float("inf"):
        raise ConfigError(f"{BOUND}={text}: it must be a number of GB, such as {DEFAULT_GB:g}")
    return int(bound * 1e9)


def evict(root: Path, bound: int) -> list[Path]:
    """Remove what was used longest ago until the cache in `root` has at most `bound` bytes.

    Nothing that a process holds or encodes is removed, and no directory that is not the cache's;
    one that belongs to someone else stays, which is logged. Returns what was removed.
    """
    entries: list[Path] = []
    found: list[tuple[float, int, Path]] = []
    with _problems_logged(root):
        entries += root.iterdir()
    for directory in entries:
        with _problems_logged(directory):
            if _REMOVED.fullmatch(directory.name):  # what a process left that was ended
                shutil.rmtree(directory)
            elif _KEY.fullmatch(directory.name) and (directory / LOCK).is_file():
                files = [file.stat() for file in directory.iterdir()]
                used = max(file.st_mtime for file in files)
                found.append((used, sum(file.st_size for file in files), directory))
    total, removed = sum(size for _, size, _ in found), []
    for _, size, directory in sorted(found):
        if total <= bound:
            break
        with _problems_logged(directory):
            if _remove_unused(directory):
                total -= size
                removed.append(directory)
    return removed


@contextmanager
def _problems_logged(path: Path) -> Iterator[None]:
    """Log what keeps a part of the cache from being removed, instead of stopping the work."""
    try:
        yield
    except FileNotFoundError:
        pass  # another process removes it too
    except OSError as error:
        _log.warning("the cache %s stays: %s", path, error)


def _remove_unused(directory: Path) -> bool:
    """Remove a directory that no process holds; its name is free before its files are gone.

    Whoever waits for its lock finds then that the lock is no more at that name.
    """
    doomed = directory.with_name(f"{directory.name}.removed-{uuid.uuid4().hex}")
    with (directory / LOCK).open("rb+") as lock, (directory / IN_USE).open("ab") as use:
        for stream, name in ((lock, LOCK), (use, IN_USE)):
            if not (_locks(stream, fcntl.LOCK_EX) and _is_at(stream, directory / name)):
                return False
        directory.rename(doomed)
        with _problems_logged(doomed):
            shutil.rmtree(doomed)
    return True


class DocumentStore:
    """Hold encoded documents in a directory; `state` is what was committed with them.

    Only the process that holds the directory's lock may append.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = self._committed()

    @property
    def finished(self) -> bool:
        return "checksum" in self.state

    def append(
        self, builder: DocumentBuilder, lengths: "array[int]", state: dict[str, Any]
    ) -> None:
        """Append the documents of `builder` and the rows' lengths, and commit `state` with them.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        sizes = self.state.get("sizes", dict.fromkeys(ARRAYS, 0))
        with storage_errors("cannot keep encoded rows", self.directory):
            for name, part in {**builder.arrays(), "lengths": lengths}.items():
                with (self.directory / f"{name}.bin").open("ab") as stream:
                    stream.truncate(sizes[name])  # what an interrupted process left
                    part.tofile(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                sizes[name] += len(part) * part.itemsize
            sync_path(self.directory)
        self.state = {**state, "sizes": sizes, "prefixes": builder.prefixes}
        write_json(self.directory / STATE, self.state)

    @property
    def num_tokens(self) -> int:
        return self._count("tokens")

    def finish(self) -> None:
        """Mark the documents as complete."""
        ends = self._array("ends")
        checksum = self._checksum("tokens", 0)
        checksum = self._checksum("trainable", checksum)
        checksum = zlib.crc32(np.concatenate([[0], ends]).astype(np.int64).data, checksum)
        self.state = {**self.state, "checksum": checksum}
        write_json(self.directory / STATE, self.state)

    def documents(self) -> Documents:
        """Return the documents; tokens and masks stay on the disk until they are used."""
        offsets = np.concatenate([[0], self._array("ends")]).astype(np.int64)
        ids, numbers = self._array("origins").reshape(-1, 2).T
        origins = Origins(self.state["prefixes"], ids, numbers)
        tokens, trainable = self._mapped("tokens"), self._mapped("trainable")
        return Documents(tokens, trainable, offsets, origins, self.state["checksum"])

    def lengths(self) -> Any:
        """Return the lengths of the encoded rows in tokens, before anything was cut, [R]."""
        return self._array("lengths")

    def _committed(self) -> dict[str, Any]:
        """Return the committed state; an empty one if there is none or its arrays are damaged."""
        try:
            state = read_json(self.directory / STATE)
            sizes = {name: (self.directory / f"{name}.bin").stat().st_size for name in ARRAYS}
            if all(sizes[name] >= state["sizes"][name] for name in ARRAYS):
                return dict(state)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for name in (*(f"{name}.bin" for name in ARRAYS), STATE):
            (self.directory / name).unlink(missing_ok=True)
        return {}

    def _count(self, name: str) -> int:
        return int(self.state["sizes"][name]) // ARRAYS[name].itemsize

    def _array(self, name: str) -> Any:
        return np.fromfile(self.directory / f"{name}.bin", ARRAYS[name], self._count(name))

    def _mapped(self, name: str) -> Any:
        if not self._count(name):  # nothing cannot be mapped
            return np.zeros(0, ARRAYS[name])
        path = self.directory / f"{name}.bin"
        return np.memmap(path, ARRAYS[name], "r", shape=(self._count(name),))

    def _checksum(self, name: str, value: int) -> int:
        with (self.directory / f"{name}.bin").open("rb") as stream:
            left = int(self.state["sizes"][name])
            while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
                value, left = zlib.crc32(chunk, value), left - len(chunk)
        return value
