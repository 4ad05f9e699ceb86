"""Finds the model that a path means: a Hugging Face directory, a checkpoint or a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ernie_train.core.errors import CheckpointError
from ernie_train.io.files import MANIFEST, verify_manifest
from ernie_train.weights.checkpoint import CheckpointStore


@dataclass(frozen=True)
class ModelDirectory:
    """`weights` holds config.json and safetensors, `tokenizer` the tokenizer's files."""

    weights: Path
    tokenizer: Path


def find_model(path: str | Path) -> ModelDirectory:
    """The newest whole checkpoint of a run directory, or the given checkpoint or model directory.

    Raises `CheckpointError` when the path is none of them or a checkpoint is damaged.
    """
    root = Path(path)
    if (root / "recipe.yaml").exists():
        return ModelDirectory(_newest_checkpoint(root), root / "tokenizer")
    if not (root / "config.json").exists():
        raise CheckpointError(
            f"{root}: neither a model directory (config.json), a checkpoint nor a run directory "
            "(recipe.yaml)"
        )
    if (root / "state.json").exists():
        verify_manifest(root)
        run_dir = root.parent.parent.parent  # run_dir/01-sft/checkpoints/step_000500
        return ModelDirectory(root, run_dir / "tokenizer")
    if (root / MANIFEST).exists():
        verify_manifest(root)
    return ModelDirectory(root, root)


def _newest_checkpoint(run_dir: Path) -> Path:
    for stage in sorted(run_dir.glob("[0-9][0-9]-*/checkpoints"), reverse=True):
        if ".before-" not in stage.parent.name and (found := CheckpointStore(stage).latest()):
            return found
    raise CheckpointError(f"{run_dir}: no checkpoint yet")
