"""Errors and warnings that a user sees, and the exit status that each error gives.

Exit status: 0 done; 1 anything else (a full disk, an engine that died); 2 a mistake in a recipe, in
data or in arguments; 3 stopped on a signal after saving; 4 training became non-finite; 5 a gate was
not met.
"""

from __future__ import annotations

import difflib
import errno
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ErnieTrainError(Exception):
    """Base of every error raised on purpose; its text is the whole message for the user."""

    exit_status: int = 1
    on_all_ranks: bool = False  # every rank raises it at the same place, so one may print it


class UserError(ErnieTrainError):
    """A mistake in recipe, data or arguments, which the user can correct: exit status 2."""

    exit_status = 2


class ConfigError(UserError):
    """All that is wrong with a recipe or with settings, in one message.

    Attributes:
        problems: one line each, `stages.0.optim.lr: must be a number, got the text 'fast'`.
        source: the file (or the command line) that the settings came from; may be empty.
    """

    def __init__(self, problems: str | Sequence[str], source: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        prefix = f"{source}: " if source else ""
        if len(self.problems) == 1:
            message = prefix + self.problems[0]
        else:
            listed = "\n".join(f"  - {problem}" for problem in self.problems)
            message = f"{prefix}{len(self.problems)} problems\n{listed}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str], str]]:
        # Exceptions are rebuilt from their arguments when they cross a process boundary; the
        # default would take the finished message for a problem and lose the source.
        return type(self), (self.problems, self.source)


class DataError(UserError):
    """Input data that cannot be used; names file and line and gives the reason."""


class WeightsError(UserError):
    """A model directory or safetensors file that does not fit; lists the tensors concerned."""


class CheckpointError(UserError):
    """A truncated, corrupted or foreign checkpoint or run directory."""


class StorageError(ErnieTrainError):
    """The disk is full or a path cannot be written: exit status 1."""


class EngineError(ErnieTrainError):
    """An engine that samples is dead, slow or answers wrongly: exit status 1."""

    on_all_ranks = True


class ToolFailure(ErnieTrainError):
    """A tool of an environment, or the sandbox, cannot run: exit status 1."""

    on_all_ranks = True


class Interrupted(ErnieTrainError):
    """Stopped on SIGTERM or SIGINT after everything was saved: exit status 3."""

    exit_status = 3
    on_all_ranks = True


class NonFiniteError(ErnieTrainError):
    """A loss or gradient became NaN or infinite; the steps before are kept: exit status 4."""

    exit_status = 4
    on_all_ranks = True


class GateError(ErnieTrainError):
    """A stage finished below the metric that its recipe demands: exit status 5."""

    exit_status = 5
    on_all_ranks = True


class FailedElsewhere(ErnieTrainError):
    """Another rank failed and prints why; this one ends silently with the same exit status."""

    def __init__(self, rank: int, exit_status: int) -> None:
        super().__init__(f"rank {rank} failed")
        self.rank, self.exit_status = rank, exit_status

    def __reduce__(self) -> tuple[type[FailedElsewhere], tuple[int, int]]:
        return type(self), (self.rank, self.exit_status)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'lr'?` for an unknown word, or all known ones if none is near."""
    known = list(dict.fromkeys(known))
    parts = word.lower().replace("-", "_").split("_")
    initials = "".join(part[:1] for part in parts)  # `learning_rate` for `lr`
    near = [initials] if len(parts) > 1 and initials in known else []
    near += difflib.get_close_matches("_".join(parts), known, n=1, cutoff=0.65)
    return f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"


def describe(value: Any) -> str:
    """Describe a value for a message: `the text 'x'`, `a list of 3`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a section with the keys {', '.join(value)}" if value else "an empty section"
    return repr(value)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DIRECTORIES = {"models", "runs", "checkpoints", "data"}  # which recipes name before they are there


def hub_hint(path: str | Path) -> str:
    """Return the remedy for a path that may be a model's name on a hub, else "".

    It is none if its first directory exists, as in `runs/nope`, or is one of every project.
    """
    place = Path(path).parent
    if not _HUB_NAME.fullmatch(str(path)) or place.exists() or place.name in _DIRECTORIES:
        return ""
    return (
        f"; if it is a name on a hub, download it first: hf download {path} --local-dir DIR, and "
        "give DIR"
    )


def run_hint(path: str | Path) -> str:
    """Return the remedy for the name of a run that stands for its directory, else ""."""
    near = Path("runs") / path
    return f"; did you mean {near}?" if not Path(path).exists() and near.is_dir() else ""


# Reasons that lie in a path itself, or in what is there; not in a full disk or a broken one.
_WRONG_PATH = {
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES,
    errno.EPERM, errno.ENXIO, errno.ENOTSUP,
}  # fmt: skip


def wrong_path(error: OSError) -> UserError | None:
    """Return the message for a path that a user gave and that cannot be used, else None."""
    if error.filename is None or error.errno not in _WRONG_PATH:
        return None
    return UserError(f"{error.filename}: {error.strerror}")


# As Paddle's allocator says it, whatever class of exception it arrives in.
_GPU_IS_FULL = re.compile(r"Out of memory error on GPU \d+\. Cannot allocate [^\n]*")


def full_gpu(error: Exception) -> ErnieTrainError | None:
    """Return the message for a GPU whose memory does not suffice, else None."""
    found = _GPU_IS_FULL.search(str(error))
    if found is None:
        return None
    return ErnieTrainError(
        f"{found[0]} What takes less, first of all a smaller micro_batch_size with more "
        "grad_accum_steps: docs/troubleshooting.md, Out of memory. `ernie-train plan` says how much"
    )


@contextmanager
def storage_errors(what: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` inside into a `StorageError` that says what failed, where and why.

    A path that no disk could hold becomes a `UserError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{what}: the disk is full{_free(path)}: {path}") from error
        if error.errno == errno.EFBIG:
            raise StorageError(f"{what}: file size limit reached: {path}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{what}: no permission to write: {path}") from error
        reason = error.strerror or str(error)
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{what}: {reason}: {error.filename or path}") from error
        raise StorageError(f"{what}: {reason}: {error.filename or path}") from error


def _free(path: Path) -> str:
    for parent in (path, *path.parents):
        if parent.exists():
            return f" ({shutil.disk_usage(parent).free / 2**20:.1f} MB left)"
    return ""


class WarnOnce:
    """Prints a warning when a condition begins, and again only after it has ended in between."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[Hashable] = set()

    def check(self, key: Hashable, wrong: bool, text: str, *, worse: bool = False) -> None:
        """Warn of the condition `key` if it is `wrong` and new, or if it got `worse`."""
        if wrong and (worse or key not in self._warned):
            self._warn(f"warning: {text}")
            self._warned.add(key)
        elif not wrong:
            self._warned.discard(key)
