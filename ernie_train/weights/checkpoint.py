"""Write checkpoints of a training stage whole or not at all, and verify them before use.

checkpoints/step_000500/
    model*.safetensors, config.json     the model, readable as a model directory
    optimizer*.safetensors              moments and master weights, under the names on disk
    state*.safetensors                  the arrays of the state
    state.json                          the rest of the state: schedule, position in the data
    MANIFEST.json                       sizes and SHA-256 of all of these, written last
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, ConfigError, WeightsError, storage_errors
from ernie_train.core.foreign_files import read_text
from ernie_train.io.files import (
    MANIFEST,
    FileDigest,
    recover,
    remove_directory,
    remove_files,
    verify_manifest,
    write_directory,
    write_text,
)
from ernie_train.io.run_dir import saved_steps
from ernie_train.io.safetensors import (
    TensorEntry,
    TensorFiles,
    array_entries,
    write_tensor_files,
)
from ernie_train.io.threads import FILES_AT_ONCE
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.weights.adapters import BASE, load_pairs, saved_parameters, write_part
from ernie_train.weights.checkpoint_config import CheckpointConfig
from ernie_train.weights.hf import load_config, load_weights
from ernie_train.weights.saving import write_weights
from ernie_train.weights.state import merge_state, read_metrics, split_state

STATE = "state.json"
# Of a stage's optimizer, and of a critic's in a folder of its own.
_OPTIMIZER = re.compile(r"(?:.+/)?optimizer(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")
WITHOUT_OPTIMIZER = (
    "cannot be trained on: its optimizer state was removed when the next stage began "
    "(checkpoint.keep_optimizer)"
)
_LEFTOVER = re.compile(r"(step_\d{6,})\.(tmp|old)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Hold a verified checkpoint; `optimizer` reads each array from the files on access."""

    path: Path
    step: int
    state: dict[str, Any]
    metrics: dict[str, float]
    optimizer: Mapping[str, np.ndarray]

    def part(self, name: str) -> Mapping[str, np.ndarray]:
        """Return the arrays that were saved as `parts[name]`; each is read on access."""
        directory, _, stem = name.rpartition("/")
        return TensorFiles(self.path / directory, stem)

    def load_model(self, model: Ernie4_5_MoeForCausalLM) -> None:
        """Load the weights into `model` and set the RoPE base and context they were saved with.

        Raises:
            WeightsError: the weights do not fit the model's configuration.
        """
        load_weights(model, self.path, verify=False, merge=model.partial is None)
        load_pairs(model, self.path)
        saved = load_config(self.path)
        model.set_context(saved.rope_theta, saved.max_position_embeddings)


class CheckpointStore:
    """Manage the checkpoints in one directory. Only one process may write at a time: `RunLock`."""

    def __init__(self, directory: str | Path, config: CheckpointConfig | None = None) -> None:
        self.directory = Path(directory)
        self.config = config or CheckpointConfig()

    # ---- writing -------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        model: Ernie4_5_MoeForCausalLM,
        optimizer: Mapping[str, np.ndarray],
        state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        parts: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, then delete those that need not be kept.

        Every rank must call it, with the arrays that it alone writes; `state` is rank 0's.

        `optimizer` holds arrays by any names (uint16 means bfloat16 bits). `state` holds JSON
        values and arrays in nested dicts. `best_metric` names one of `metrics`. `parts` are further
        arrays: those of "critic/model" are written to `critic/model*.safetensors`.

        Returns:
            The checkpoint's directory.

        Raises:
            TypeError, ValueError, WeightsError: `state` has a value that cannot be stored, or NaN.
            StorageError: disk full or no permission; the earlier checkpoints are untouched and
                nothing half-written is left.
            ConfigError: `best_metric` is not among the metrics; raised after writing.
        """
        plain, arrays = split_state(state)
        text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
        values = {name: float(value) for name, value in (metrics or {}).items()}
        path = self.path_of(step)
        consensus.run_on_main(self.sweep)
        size = self.config.max_shard_size
        named = {"optimizer": optimizer, **(parts or {}), "state": arrays}
        entries = {name: array_entries(held) for name, held in named.items()}
        if not process_group.is_main():
            entries["state"] = []

        def write(directory: Path) -> dict[str, FileDigest]:
            only = saved_parameters(model)
            digests = write_weights(
                model, directory, max_shard_size=size, only=only, files_at_once=FILES_AT_ONCE
            )
            digests |= write_part(model, directory)
            for name, own in entries.items():
                if process_group.any_rank(bool(own)):
                    digests |= _write_arrays(directory, name, own, size)
            with consensus.fail_together():
                if process_group.is_main():
                    write_text(directory / STATE, text + "\n")
            return digests

        shown = {name: v if math.isfinite(v) else repr(v) for name, v in values.items()}
        write_directory(path, write, info={"step": step, "metrics": shown}, unlisted=[BASE])
        consensus.run_on_main(lambda: self._retain(step))
        wanted = self.config.best_metric
        if values and wanted is not None and wanted not in values:
            known = ", ".join(values)
            raise ConfigError(f"checkpoint.best_metric={wanted!r} is not measured, only {known}")
        return path

    def sweep(self) -> None:
        """Remove files that a killed writer left; only the owner of the run may call it."""
        if self.directory.is_dir():
            stems = {m[1] for p in self.directory.iterdir() if (m := _LEFTOVER.fullmatch(p.name))}
            for stem in sorted(stems):
                recover(self.directory / stem)

    def _retain(self, newest: int) -> None:
        """Delete the checkpoints up to `newest`, except the last `keep_last` and the best one.

        Later checkpoints are ignored: they are damaged, else training would have resumed from them.
        """
        whole = [s for s in self.steps() if s <= newest and self._manifest(s) is not None]
        keep = set(whole[-self.config.keep_last :]) | {newest}
        if (best := self.best_step(up_to=newest)) is not None:
            keep.add(best)
        for step in whole:
            if step not in keep:
                remove_directory(self.path_of(step))

    def remove_optimizer(self) -> int:
        """Remove the optimizer state from all checkpoints; return how many bytes that frees.

        They can be loaded at every moment, but not trained on afterwards. A checkpoint without a
        readable manifest stays as it is, with a warning.
        """
        freed = 0
        for step in self.steps():
            is_gone = {"optimizer": "removed"}
            try:
                freed += remove_files(self.path_of(step), _OPTIMIZER.fullmatch, is_gone)
            except CheckpointError as error:
                _log.warning("optimizer state of a damaged checkpoint is not removed: %s", error)
        return freed

    def has_optimizer(self) -> bool:
        """Return whether no checkpoint has lost its optimizer state by `remove_optimizer`."""
        manifests = (self._manifest(step) for step in self.steps())
        return not any(manifest and "optimizer" in manifest for manifest in manifests)

    def ends_with(self, step: int) -> bool:
        """Return whether a stage ends with the checkpoint of `step`; every rank must call it."""
        if self.config.early_stopping_patience is None:
            return False
        return consensus.run_on_main(lambda: self.is_out_of_patience(step))

    def is_out_of_patience(self, step: int) -> bool:
        """Return whether `early_stopping_patience` ends a stage at `step`; for rank 0 alone.

        Checkpoints that are gone count by their interval.
        """
        patience, every = self.config.early_stopping_patience, self.config.every_steps
        if patience is None or step % every:
            return False
        best = self.best_step(up_to=step)
        return best is not None and step - best >= patience * every

    def says_out_of_patience(self, step: int, last: int) -> str:
        """Return the message for a stage that ends with the checkpoint of `step`."""
        patience, metric = self.config.early_stopping_patience, self.config.best_metric
        return (
            f"{metric} was not better in {patience} checkpoints: the stage ends after step {step} "
            f"of {last} (checkpoint.early_stopping_patience)"
        )

    def finish(self, last: int, model: Ernie4_5_MoeForCausalLM) -> Path:
        """Return the checkpoint that the stage hands on after step `last`; `model` becomes it.

        Every rank must call it. It is the best one under `load_best_at_end`, else the last one.
        """
        if not self.config.load_best_at_end:
            return self.path_of(last)
        best = consensus.run_on_main(lambda: self.best_step(up_to=last))
        path = self.path_of(last if best is None else best)
        with consensus.fail_together():
            self.load(path, verify=process_group.is_main()).load_model(model)
        return path

    # ---- reading -------------------------------------------------------------------------------

    def path_of(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending, damaged ones included."""
        return saved_steps(self.directory)

    def best_step(self, up_to: int | None = None) -> int | None:
        """Return the step with the best `best_metric`; the later one of equals.

        The earlier one under `early_stopping_patience`, which waits for something better. None if
        no checkpoint (up to step `up_to`, if given) has a finite value of it.
        """
        metric = self.config.best_metric
        sign = 1.0 if self.config.higher_is_better else -1.0
        newer = 1 if self.config.early_stopping_patience is None else -1
        scored = []
        for step in self.steps():
            manifest = self._manifest(step) if up_to is None or step <= up_to else None
            value = read_metrics(manifest or {"metrics": {}}).get(metric or "", math.nan)
            if math.isfinite(value):
                scored.append((sign * value, newer * step))
        return abs(max(scored)[1]) if scored else None

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose files match their hashes; None if there is none.

        Damaged ones are skipped with a warning.

        Raises:
            CheckpointError: all are damaged; starting again at step 0 would lose the run.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                verify_manifest(self.path_of(step))
            except CheckpointError as error:
                _log.warning("checkpoint skipped: %s", error)
                problems.append(str(error))
                continue
            return self.path_of(step)
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is whole; delete the directory to start anew: "
                + "; ".join(problems)
            )
        return None

    def load(self, path: str | Path, *, verify: bool = True) -> Checkpoint:
        """Open the checkpoint in `path`.

        `verify=False` compares sizes only, not hashes (for a path that `latest` just returned).

        Raises:
            CheckpointError: files are missing or altered; the message names each of them.
        """
        path = Path(path)
        manifest = verify_manifest(path, hashes=verify)
        try:
            text = read_text(path / STATE)
            state = merge_state(json.loads(text), _tensors(path, "state", manifest["files"]))
            optimizer = _tensors(path, "optimizer", manifest["files"])
            step, metrics = int(manifest["step"]), read_metrics(manifest)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, WeightsError) as error:
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
        return Checkpoint(path, step, state, metrics, optimizer)

    def load_latest(self) -> Checkpoint | None:
        """Load the newest checkpoint, to train on from it; None if there is none.

        Every rank must call it; rank 0 alone computes the hashes.

        Raises:
            CheckpointError: on all ranks as `latest` does, or the optimizer state was removed.
        """
        path = consensus.run_on_main(self._latest_to_train_on)
        checkpoint: Checkpoint | None = None
        with consensus.fail_together():
            checkpoint = None if path is None else self.load(path, verify=False)
        return checkpoint

    def _latest_to_train_on(self) -> Path | None:
        path = self.latest()
        if path is not None and not self.has_optimizer():
            raise CheckpointError(f"{path}: the stage {WITHOUT_OPTIMIZER}: --from repeats it")
        return path

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """Return the manifest of a checkpoint whose files have the right sizes, else None."""
        try:
            return verify_manifest(self.path_of(step), hashes=False)
        except CheckpointError:
            return None


def may_change(file: Path) -> bool:
    """Return whether `remove_optimizer` changes or deletes a file of a checkpoint."""
    if file.name == MANIFEST:
        return (file.parent / STATE).exists()
    return _OPTIMIZER.fullmatch(file.name) is not None


def _tensors(path: Path, stem: str, listed: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Return the arrays of `<stem>*.safetensors`; none if no such file is listed."""
    pattern = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors")
    return TensorFiles(path, stem) if any(map(pattern.fullmatch, listed)) else {}


def _write_arrays(
    directory: Path, name: str, entries: list[TensorEntry], size: int | str
) -> dict[str, FileDigest]:
    """Write the entries of all ranks to `name`*.safetensors; a name may hold a folder."""
    folder, _, stem = name.rpartition("/")
    with consensus.fail_together(), storage_errors("cannot write", directory):
        (directory / folder).mkdir(exist_ok=True)
    written = write_tensor_files(
        directory / folder, stem, entries, size, files_at_once=FILES_AT_ONCE
    )
    return {str(Path(folder, file)): digest for file, digest in written.items()}
