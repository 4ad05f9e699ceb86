"""Find the weights and the tokenizer that a path names: of a model, a checkpoint or a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ernie_train.core.errors import CheckpointError, hub_hint, run_hint
from ernie_train.io.files import MANIFEST, verify_manifest
from ernie_train.io.run_dir import is_run, read_done
from ernie_train.weights.adapters import find_base, is_partial
from ernie_train.weights.checkpoint import CheckpointStore
from ernie_train.weights.checkpoint_config import CheckpointConfig


@dataclass(frozen=True)
class ModelDirectory:
    """Hold the directories of a model's weights (config.json, safetensors) and its tokenizer."""

    weights: Path
    tokenizer: Path


def find_model(path: str | Path, *, best: bool = False) -> ModelDirectory:
    """Find the model of a run directory, a stage's directory, a checkpoint or a model directory.

    That of a run is what its latest stage with a checkpoint hands on, or its newest whole
    checkpoint while the stage is not done; with `best` it is the one with the best `best_metric`.

    Raises:
        CheckpointError: the path is none of them, a checkpoint is damaged, or none was scored.
    """
    root = Path(path)
    if is_run(root):
        stages = sorted(root.glob("[0-9][0-9]-*/checkpoints"), reverse=True)
        for stage in (found.parent for found in stages if ".before-" not in found.parent.name):
            if (weights := _checkpoint_of_stage(stage, best=best)) is not None:
                return ModelDirectory(weights, root / "tokenizer")
        raise CheckpointError(f"{root}: no checkpoint yet")
    if (root / "stage.json").exists():
        if (weights := _checkpoint_of_stage(root, best=best)) is None:
            raise CheckpointError(f"{root}: no checkpoint yet")
        return ModelDirectory(weights, root.resolve().parent / "tokenizer")
    if best:
        raise CheckpointError(f"{root}: the best is one of a run's or a stage's checkpoints")
    if not (root / "config.json").exists() and is_partial(root):  # an adapter alone
        return ModelDirectory(root, find_model(find_base(root)).tokenizer)
    if not (root / "config.json").exists():
        raise CheckpointError(
            f"{root}: neither a model directory (config.json), a checkpoint nor a run directory "
            f"(recipe.yaml){run_hint(path) or hub_hint(path)}"
        )
    if (root / "state.json").exists():
        verify_manifest(root)
        run_dir = root.resolve().parents[2]  # run_dir/01-sft/checkpoints/step_000500
        return ModelDirectory(root, run_dir / "tokenizer")
    if (root / MANIFEST).exists():
        verify_manifest(root)
    return ModelDirectory(root, root)


def _checkpoint_of_stage(stage: Path, *, best: bool) -> Path | None:
    """Return the checkpoint that a finished stage hands on, else its newest; None without one."""
    store = CheckpointStore(stage / "checkpoints")
    if best:
        return _best_of_stage(stage) if store.steps() else None
    done = read_done(stage)
    if done is None:
        return store.latest()
    path = store.directory / str(done.result["checkpoint"])
    verify_manifest(path)
    return path


def _best_of_stage(stage: Path) -> Path:
    try:
        settings = json.loads((stage / "stage.json").read_text(encoding="utf-8"))["settings"]
        keys = ("best_metric", "best_is", "early_stopping_patience")
        chosen = {key: settings["checkpoint"].get(key) for key in keys}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{stage / 'stage.json'} cannot be read: {error}") from None
    if (metric := chosen["best_metric"]) is None:
        raise CheckpointError(
            f"{stage}: its recipe has no checkpoint.best_metric, so none is the best"
        )
    store = CheckpointStore(stage / "checkpoints", CheckpointConfig(**chosen))
    step = store.best_step()
    if step is None:
        raise CheckpointError(f"{stage}: no checkpoint has a value of best_metric={metric} yet")
    verify_manifest(store.path_of(step))
    return store.path_of(step)
