"""On every rank: runs commands of a JSON file, each with a fault of the disk on one rank.

A command is {"arguments": [...], "rank": which rank has the fault, and one of
"call": "module:name" that fails as on a full disk, "file": a file's name that cannot be written,
"blind": names of files that this rank does not see}. Exit statuses go to
`<file>.status-<rank>.json`.
"""

import errno
import importlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import ernie_train  # noqa: F401
from ernie_train.cli.main import main
from ernie_train.core import process_group
from ernie_train.core.errors import StorageError
from ernie_train.io import run_dir
from tests.kept_workers import kept_workers


def fault(command: dict[str, Any], held: ExitStack) -> None:
    if "call" in command:
        module, _, label = command["call"].partition(":")
        owner, _, attribute = label.rpartition(".")
        target = importlib.import_module(module)
        holder = getattr(target, owner) if owner else target

        def full(*values: object, **named: object) -> NoReturn:
            raise StorageError(f"no room for {label}")

        held.enter_context(patch.object(holder, attribute, full))
    if "file" in command:
        opened = Path.open

        def open_or_fail(path: Path, *values: Any, **named: Any) -> Any:
            if path.name == f"{command['file']}.tmp":
                raise OSError(errno.ENOSPC, "no space", str(path))
            return opened(path, *values, **named)

        held.enter_context(patch.object(Path, "open", open_or_fail))
    for name, value in (("read_text", None), ("open", None), ("exists", False)):
        held.enter_context(hide(name, command.get("blind", []), value))


def hide(name: str, files: list[str], value: object) -> Any:
    """Lets a method of paths not see some files, as where a shared disk's news come late."""
    seeing = getattr(Path, name)

    def blind(path: Path, *values: Any, **named: Any) -> Any:
        if path.name not in files:
            return seeing(path, *values, **named)
        if value is None:
            raise FileNotFoundError(errno.ENOENT, "not here", str(path))
        return value

    return patch.object(Path, name, blind)


run_dir.SHOWN_WITHIN_S = 0.1
statuses = []
for number, command in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    with ExitStack() as held, kept_workers():
        if command.get("rank") == process_group.rank():
            fault(command, held)
        try:
            main(command["arguments"])
        except SystemExit as stopped:
            statuses.append(int(stopped.code or 0))
    print(f"-- {number}", flush=True)
Path(f"{sys.argv[1]}.status-{process_group.rank()}.json").write_text(json.dumps(statuses))
