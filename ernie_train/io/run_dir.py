"""Lock a run directory, and record which of its stages are finished.

`RunLock` keeps a second process out. The file `DONE` in a stage's directory records the settings
and the inputs of its result, so that a changed recipe is refused instead of mixed with old results.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, StorageError, UserError, storage_errors
from ernie_train.core.foreign_files import read_json
from ernie_train.io.files import fingerprint, verify_manifest, write_json

# Files of a run directory, and of an export in it.
RECIPE = "recipe.yaml"  # the resolved recipe
ENVIRONMENT = "environment.json"  # versions of this toolkit and of its libraries
RECEIPT = "export_receipt.json"
DONE = "DONE"
LOCK = ".lock"
SHOWN_WITHIN_S = 10.0  # a shared file system shows what another machine wrote
_STEP = re.compile(r"step_(\d{6,})")


def is_run(directory: Path) -> bool:
    """Return whether a directory holds a run's recipe; that of a model may hold another one."""
    return (directory / RECIPE).is_file() and not (directory / "config.json").exists()


class RunLock:
    """Lock a run directory for this process: `with RunLock(run_dir): ...`.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds the lock; the message names it.
        StorageError: the directory cannot be written.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._descriptor: int | None = None

    def acquire(self) -> None:
        with storage_errors("cannot use the run directory", self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if (owner := _blocked_by(descriptor, fcntl.LOCK_EX)) is not None:
                    raise _in_use(self.run_dir, owner)
            except OSError as error:
                os.close(descriptor)
                raise StorageError(
                    f"{self.run_dir}: its file system has no locks ({error.strerror}), by which a "
                    "second run is kept out: give a --run-dir elsewhere, or mount it with flock"
                ) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            os.fsync(descriptor)  # for other machines, see `require_shared`
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


def refuse_if_in_use(run_dir: str | Path) -> None:
    """Check that no process holds the lock of a run directory; change nothing.

    Raises:
        UserError: a process holds the lock; the message names it.
    """
    if (owner := lock_owner(run_dir)) is not None:
        raise _in_use(Path(run_dir), owner)


def lock_owner(run_dir: str | Path) -> str | None:
    """Return which process holds the lock of a run directory, None if none does."""
    try:
        descriptor = os.open(Path(run_dir) / LOCK, os.O_RDONLY)
    except OSError:
        return None  # no run has started here yet; `RunLock` reports other problems
    try:
        return _blocked_by(descriptor, fcntl.LOCK_SH)
    except OSError:
        return None  # there are no locks
    finally:
        os.close(descriptor)


def require_shared(run_dir: Path) -> None:
    """Check that all ranks see the run directory whose lock rank 0 holds; every rank must call it.

    Each of them writes a part of every checkpoint there.

    Raises:
        UserError: on all ranks, where one has another directory under that name.
    """
    if process_group.world_size() == 1:
        return
    lock = run_dir / LOCK
    owner = consensus.run_on_main(lock.read_text)
    with consensus.fail_together():
        if not _is_shown(lock, owner):
            raise UserError(
                f"--run-dir {run_dir}: rank {process_group.rank()} on {socket.gethostname()} does "
                f"not see what rank 0 ({owner.strip()}) wrote there: several machines need a run "
                "directory that all of them share"
            )


def _is_shown(path: Path, text: str) -> bool:
    end = time.monotonic() + SHOWN_WITHIN_S
    while True:
        with suppress(OSError):
            if path.read_text() == text:
                return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)


def _blocked_by(descriptor: int, kind: int) -> str | None:
    """Take the lock and return None, or return which process holds it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        time.sleep(0.1)  # `lock_owner` in another process holds it for a moment
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 200).decode(errors="replace").strip() or "just starting"
    return None


def _in_use(run_dir: Path, owner: str) -> UserError:
    return UserError(
        f"{run_dir} is in use by another run ({owner}): "
        "wait for it, stop it, or give another --run-dir"
    )


# ---- finished stages ---------------------------------------------------------------------------


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return a line such as "optim.lr: 0.001 -> 0.002" for each difference of two JSON values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{path}.{key}" if path else key
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}.{i}")]
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def recorded_version(run_dir: Path) -> str:
    """Return which ernie_train wrote a run directory last, with its commit where that is known."""
    try:
        facts = read_json(run_dir / ENVIRONMENT)
        commit = facts.get("code", {}).get("commit")
        return f"ernie_train {facts['ernie_train']}" + (f" at commit {commit}" if commit else "")
    except (OSError, ValueError, KeyError, AttributeError):
        return "an unknown version of ernie_train"


@dataclass(frozen=True)
class StageDone:
    """Describe a finished stage: its settings, inputs (name -> hash) and result."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    result: dict[str, Any]


def write_done(stage_dir: str | Path, done: StageDone) -> None:
    """Mark a stage as finished; call it after everything else is on the disk."""
    value = {"settings": done.settings, "inputs": done.inputs, "result": done.result}
    write_json(Path(stage_dir) / DONE, {**value, "sha256": fingerprint(value)})


def read_done(stage_dir: str | Path) -> StageDone | None:
    """Read the file `DONE` of a stage; return None if the stage is not finished.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(stage_dir) / DONE
    try:
        value = read_json(path)
        expected = value.pop("sha256")
        done = StageDone(value["settings"], value["inputs"], value["result"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it to redo the stage") from None
    if fingerprint(value) != expected:
        raise CheckpointError(f"{path}: does not match its own hash; delete it to redo the stage")
    return done


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps of all checkpoints in a directory, ascending, damaged ones included."""
    if not checkpoints.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in checkpoints.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def total_steps(settings: Mapping[str, Any]) -> int | None:
    """Return the steps or iterations that a stage's settings ask for, None if not in such."""
    found = (settings.get("steps"), settings.get("iterations"))
    return next((n for n in found if type(n) is int and n > 0), None)


def stopped_state(saved: int | None, last: int, total: int | None) -> str:
    """Return how an unfinished stage ended that nothing runs: with all saved, or broken off.

    saved: the step of its last checkpoint; last: the last step that it logged.
    """
    if saved is None or saved < last:
        return "broken off"
    return f"stopped, saved at step {saved:,}" + (f" of {total:,}" if total else "")


def is_whole_export(directory: Path, *, hashes: bool = True) -> bool:
    """Return whether every file of a proven export is still there; with `hashes`, unchanged."""
    try:
        verify_manifest(directory, hashes=hashes)
    except CheckpointError:
        return False
    return (directory / RECEIPT).exists()


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the result in a file, None if there is none; `CheckpointError` if it is damaged."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it to repeat the work") from None
    return found
