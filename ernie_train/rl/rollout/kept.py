"""A rollout that a stop left without its update, kept on the disk for the next start.

kept_rollout/ of the stage's directory holds its groups in rollout.jsonl, and in the manifest the
iteration and the sampler's state behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError
from ernie_train.io.files import (
    FileDigest,
    recover,
    remove_directory,
    verify_manifest,
    write_directory,
)
from ernie_train.rl.rollout.files import read_rollout, write_rollout
from ernie_train.rl.rollout.records import PromptGroup

KEPT = "kept_rollout"
_GROUPS = "rollout.jsonl"
_log = logging.getLogger(__name__)


def keep_rollout(
    directory: Path, iteration: int, groups: Sequence[PromptGroup], sampler: dict[str, Any]
) -> None:
    """Write the rollout of an iteration in place of what was kept before; for every rank to call.

    sampler: the state of the sampler behind it, of JSON values.
    """

    def write(temporary: Path) -> dict[str, FileDigest]:
        with consensus.fail_together():
            if process_group.is_main():
                write_rollout(temporary / _GROUPS, groups)
        return {}

    write_directory(directory / KEPT, write, info={"iteration": iteration, "sampler": sampler})


def take_kept(directory: Path, iteration: int) -> tuple[list[PromptGroup], dict[str, Any]] | None:
    """Return what was kept of an iteration, groups and the sampler's state; for rank 0 alone.

    It is deleted: what ends the run once more should not do so at every start. None where there is
    nothing, that of another iteration or, with a warning, a damaged one: the iteration can be
    sampled again.
    """
    path = directory / KEPT
    recover(path)
    if not path.exists():
        return None
    try:
        kept = verify_manifest(path)
        groups = read_rollout(path / _GROUPS) if kept["iteration"] == iteration else None
    except CheckpointError as error:
        _log.warning("the kept rollout is sampled again: %s", error)
        groups = None
    remove_directory(path)
    return None if groups is None else (groups, kept["sampler"])
