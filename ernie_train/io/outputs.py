"""Refuse, before any work, to write over what is no earlier output of the same kind.

Programs that add to the same output take turns (`lock_directory`).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ernie_train.core.errors import UserError
from ernie_train.core.foreign_files import open_regular, parse_json
from ernie_train.io.files import check_replaceable

LONGEST_ROW_BYTES = 2**24
_NO_EARLIER_OUTPUT = (
    "{} exists and is no earlier output of this command: give another path, or --force to replace "
    "it"
)


def check_output_directory(
    path: Path, mark: str, *, inputs: Sequence[Path] = (), force: bool = False
) -> None:
    """Check that the directory `path` may be written, whole or in place of an earlier one.

    Args:
        path: the directory.
        mark: name of a file that only directories of the same kind have.
        inputs: paths that the work reads: not replaced either.
        force: True to replace these too, and anything else that this program wrote.

    Raises:
        UserError: something else is there; the message says what to do.
    """
    check_replaceable(path)
    if not path.is_dir() or not any(path.iterdir()) or force:
        return
    place = path.resolve()
    if any(place == used or place in used.parents for used in (i.resolve() for i in inputs)):
        raise UserError(f"{path} is read by this command: give another path, or --force")
    if not (path / mark).is_file():
        raise UserError(_NO_EARLIER_OUTPUT.format(path))


def check_output_file(
    path: Path, keys: Sequence[str], *, inputs: Sequence[Path] = (), force: bool = False
) -> None:
    """Check that the .jsonl file `path` may be written; its rows have `keys`.

    Pipes and devices are written to as they are. The other arguments are those of
    `check_output_directory`, as is the error; a file that `force` replaces may be anyone's, but
    none of `inputs`.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory, not a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path}: no permission to write")
    if not path.is_file() or not path.stat().st_size:
        return
    place, is_same_kind = path.resolve(), _has_rows(path, keys)
    for used in (i.resolve() for i in inputs):
        if place == used or (used in place.parents and not is_same_kind):
            raise UserError(f"{path} is read by this command: give another path")
    if not force and not is_same_kind:
        raise UserError(_NO_EARLIER_OUTPUT.format(path))


def check_run_directory(path: Path, mark: str, written: Sequence[str]) -> None:
    """Check that a run in the directory `path` replaces nothing: `mark` is there, or none of these.

    Args:
        path: the directory, which need not exist.
        mark: name of the file that a run writes first.
        written: names of what a run writes later.

    Raises:
        UserError: the directory is not a run's and holds something of these names.
    """
    taken = [name for name in written if (path / name).exists()]
    if taken and not (path / mark).exists():
        raise UserError(
            f"{path} is no run directory, and a run would replace its {', '.join(taken)}: give "
            "another --run-dir"
        )


def _has_rows(path: Path, keys: Sequence[str]) -> bool:
    with open_regular(path) as stream:
        line = stream.readline(LONGEST_ROW_BYTES)
    try:
        row = parse_json(line)
    except ValueError:
        return False
    return isinstance(row, dict) and set(keys) <= row.keys()


@contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Let one process at a time be in this context for a directory; others wait.

    On a file system without locks, which raises `OSError`, all of them go on.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # and with it the lock
