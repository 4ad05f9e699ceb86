"""Find the data files of a path: a file, a directory with all below it, or a glob pattern."""

import glob
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ernie_train.core.errors import DataError
from ernie_train.core.foreign_files import read_json

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
TABLES = (".parquet", ".arrow")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
COMPRESSIONS = (".gz", ".zst")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy")
KNOWN = f"{', '.join((*TEXTS, *TABLES))} (texts also as {' or '.join(COMPRESSIONS)})"
MOST_NAMED = 5
_BLANK = b"\xef\xbb\xbf \t\r\n"
# Names of files and directories that hold one split of a data set, as hubs write them.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?:[-_.]|$)")
_HELD_OUT = ("valid", "val", "dev", "eval")


@dataclass
class FoundFiles:
    """Hold the data files of a path, in the order of their names, and what else lies there."""

    files: list[Path] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    def splits(self) -> list[str]:
        """Return the splits that the names of the files tell of, if they are several."""
        shared = os.path.commonpath([file.parent for file in self.files])
        parts = {part for file in self.files for part in file.relative_to(shared).parts}
        named = {found[1] for part in parts if (found := _SPLIT.match(part.lower()))}
        found_splits = sorted({"validation" if name in _HELD_OUT else name for name in named})
        return found_splits if len(found_splits) > 1 else []

    def note(self) -> str:
        """Return a text that names what was passed over; empty if nothing was."""
        named = ", ".join(self.passed_over[:MOST_NAMED])
        more = len(self.passed_over) - MOST_NAMED
        return named + (f" and {more} more" if more > 0 else "")


def container(file: Path) -> tuple[str, str]:
    """Return (container, compression) of a file by its name, such as (".jsonl", ".gz").

    The container is "" for a file whose rows cannot be read.
    """
    name = file.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    known = TEXTS if compression else (*TEXTS, *TABLES)
    return next((suffix for suffix in known if name.endswith(suffix)), ""), compression


def find_files(path: str | Path) -> FoundFiles:
    """Return the data files of a path; `**` in a pattern stands for directories of any depth.

    Raises:
        DataError: there is none, one cannot be read, or a symbolic link leads in a circle.
    """
    path = Path(path)
    found = FoundFiles()
    try:
        if path.exists():
            _add(path, found, ())
        elif glob.has_magic(str(path)):
            for match in sorted(glob.glob(_pattern(path), recursive=True)):
                if not Path(match).is_dir() or "**" not in str(path):  # ** gives its files too
                    _add(Path(match), found, (), of_pattern=True)
            if not found.files:
                raise DataError(f"no data file matches the pattern {path}")
        elif path.is_symlink():
            raise DataError(f"{path} is a symbolic link that leads nowhere or in a circle")
        else:
            hub = "" if path.suffix else " (a data set of a hub must be downloaded first)"
            raise DataError(f"data file {path} does not exist{hub}")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not found.files:
        others = f"; it holds {found.note()}" if found.passed_over else ""
        raise DataError(f"the directory {path} holds no data file: {KNOWN}{others}")
    return found


def _pattern(path: Path) -> str:
    """Return a pattern in which the directories that are there stand for themselves alone."""
    there = next(parent for parent in path.parents if parent.exists())
    return os.path.join(glob.escape(str(there)), *path.parts[len(there.parts) :])


def _add(path: Path, found: FoundFiles, above: tuple[Path, ...], of_pattern: bool = False) -> None:
    among_others = bool(above) or of_pattern
    if path.is_dir():
        _add_directory(path, found, above)
    elif path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a symbolic link that leads nowhere or in a circle; remove it")
    elif path.is_file() and container(path)[0] and not (among_others and _is_metadata(path)):
        found.files.append(path)
    elif among_others:
        found.passed_over.append(path.name)
    else:
        raise DataError(_refusal(path))


def _refusal(path: Path) -> str:
    if not path.is_file():
        return f"{path} is neither a file nor a directory, so its rows cannot be read twice"
    if path.suffix.lower() in PICKLES:
        return (
            f"{path} may be a pickle, which can run any program when it is loaded, so it is never "
            "loaded; save the rows as JSON lines or Parquet"
        )
    if path.suffix.lower() in SPREADSHEETS:
        return f"{path} is a spreadsheet: save it as CSV in UTF-8"
    return f"{path} is not a {KNOWN} file: its name must end so, for what it holds"


def _add_directory(path: Path, found: FoundFiles, above: tuple[Path, ...]) -> None:
    real = path.resolve()
    if real in above:
        raise DataError(f"{path} is a symbolic link that leads back to {real}; remove it")
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(child) for child in sorted(path.iterdir()) if child.is_dir())
        raise DataError(f"{path} holds several splits of a data set; name one of {splits}")
    shards = _saved_shards(path)
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or (shards is not None and child not in shards):
            found.passed_over.append(child.name)
        else:
            _add(child, found, (*above, real))
    if missing := [shard for shard in shards or [] if not shard.exists()]:
        raise DataError(f"{missing[0]} is missing, which {path / 'state.json'} names")


def _saved_shards(path: Path) -> list[Path] | None:
    """Return the files of a data set that `save_to_disk` wrote; None for another directory.

    Its directory may also hold intermediate results under names of the same kind.
    """
    try:
        state = read_json(path / "state.json")
    except (OSError, ValueError):
        return None
    if not (path / "dataset_info.json").is_file() or "_data_files" not in state:
        return None
    return [path / str(entry["filename"]) for entry in state["_data_files"]]


def _is_metadata(path: Path) -> bool:
    """Return whether a .json file of a directory is one object, as descriptions of data are."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as stream:
        begins_an_object = stream.read(64).lstrip(_BLANK).startswith(b"{")
        stream.seek(0)
        return begins_an_object and not is_json_lines(stream)


def is_json_lines(stream: BinaryIO) -> bool:
    """Return whether the first line of a text is a whole JSON object and another line follows."""
    line = stream.readline(64)
    if not line.lstrip(_BLANK).startswith(b"{"):
        return False  # without reading on: a list may be one line of any length
    line += b"" if line.endswith(b"\n") else stream.readline(2**26)
    try:
        json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return False
    return any(line.strip() for line in stream)
