"""Checkpoints of a training stage: written whole or not at all, verified before they are used.

checkpoints/step_000500/
    model*.safetensors, config.json     the model, readable as a model directory
    optimizer*.safetensors              moments and master weights, under the names on disk
    state.json                          everything else: step, schedule, data position, RNG
    MANIFEST.json                       sizes and SHA-256 of all of these, written last
"""

from __future__ import annotations

import base64
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from ernie_train.core import consensus, process_group
from ernie_train.core.config import StrictConfig
from ernie_train.core.errors import CheckpointError, ConfigError, WeightsError, storage_errors
from ernie_train.io.files import (
    FileDigest,
    recover,
    remove_directory,
    verify_manifest,
    write_directory,
    write_json,
)
from ernie_train.io.safetensors import (
    TensorFiles,
    array_entries,
    parse_size,
    write_tensor_files,
)
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.weights.hf import from_hf, load_config, load_weights, to_hf, write_weights

_STEP = re.compile(r"step_(\d{6,})")


_LEFTOVER = re.compile(r"(step_\d{6,})\.(tmp|old)")


_log = logging.getLogger(__name__)


class CheckpointConfig(StrictConfig):
    """When checkpoints are written and which are kept."""

    every_steps: int = Field(200, ge=1)
    keep_last: int = Field(2, ge=1)
    best_metric: str | None = None  # kept besides the last ones; None: no best one is kept
    best_is: Literal["higher", "lower"] = "higher"
    max_shard_size: int | str = "5GB"

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: int | str) -> int | str:
        try:
            parse_size(value)
        except ConfigError as error:
            raise ValueError(error.problems[0]) from None
        return value


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; `optimizer` reads an array from the files when asked for it."""

    path: Path
    step: int
    state: dict[str, Any]
    metrics: dict[str, float]
    optimizer: Mapping[str, np.ndarray]

    def part(self, name: str) -> Mapping[str, np.ndarray]:
        """The arrays that were saved as `parts[name]`, read when asked for."""
        directory, _, stem = name.rpartition("/")
        return TensorFiles(self.path / directory, stem)

    def load_model(self, model: Ernie4_5_MoeForCausalLM) -> None:
        """Fills `model` with the weights and sets their RoPE base.

        `WeightsError` if the weights do not fit its configuration.
        """
        load_weights(model, self.path, verify=False)
        model.set_rope_theta(load_config(self.path).rope_theta)


# How parameters, or their moments, are named and laid out on disk, and back in memory.
Rename = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def to_disk(
    model: Ernie4_5_MoeForCausalLM, named: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """Parameters of a model, or their moments, under their names on disk."""
    return dict(to_hf(model.config, named, model.model.placement.experts))


def from_disk(
    model: Ernie4_5_MoeForCausalLM, named: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """The inverse of `to_disk`, from what all ranks wrote: what this rank holds."""
    return dict(from_hf(model.config, named, model.model.placement.experts))


class CheckpointStore:
    """The checkpoints in one directory. One process writes to it at a time (see `RunLock`)."""

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
        """Writes the checkpoint of `step`, then deletes those that need not be kept.

        Every rank must call it, with the arrays that it alone writes; `state` is rank 0's.

        `optimizer` holds arrays by any names (uint16 means bfloat16 bits), `state` anything that
        `encode_state` takes; `metrics` are what `best_metric` picks from. `parts` are further
        arrays: those of "critic/model" go to `critic/model*.safetensors`. Returns its directory.
        Raises `StorageError` (disk full, no permission): the earlier checkpoints are then
        untouched and nothing half-written is left. Raises `ConfigError`, after writing, if
        metrics were given and `best_metric` is not among them.
        """
        encoded = encode_state(dict(state))
        values = {name: float(value) for name, value in (metrics or {}).items()}
        path = self.path_of(step)
        consensus.run_on_main(self.sweep)

        def write(directory: Path) -> dict[str, FileDigest]:
            size = self.config.max_shard_size
            digests = write_weights(model, directory, max_shard_size=size)
            if process_group.any_rank(bool(optimizer)):
                entries = array_entries(optimizer)
                digests |= write_tensor_files(directory, "optimizer", entries, size)
            for name, arrays in (parts or {}).items():
                folder, _, stem = name.rpartition("/")
                with consensus.fail_together(), storage_errors("cannot write", directory):
                    (directory / folder).mkdir(exist_ok=True)
                written = write_tensor_files(directory / folder, stem, array_entries(arrays), size)
                digests |= {f"{folder}/{file}": digest for file, digest in written.items()}
            with consensus.fail_together():
                if process_group.is_main():
                    write_json(directory / "state.json", encoded)
            return digests

        write_directory(path, write, info={"step": step, "metrics": encode_state(values)})
        consensus.run_on_main(lambda: self._retain(step))
        wanted = self.config.best_metric
        if values and wanted is not None and wanted not in values:
            known = ", ".join(values)
            raise ConfigError(f"checkpoint.best_metric={wanted!r} is not measured, only {known}")
        return path

    def sweep(self) -> None:
        """Removes what a killed writer left behind; only for the process that owns the run."""
        if self.directory.is_dir():
            stems = {m[1] for p in self.directory.iterdir() if (m := _LEFTOVER.fullmatch(p.name))}
            for stem in sorted(stems):
                recover(self.directory / stem)

    def _retain(self, newest: int) -> None:
        """Deletes all up to `newest` but the last `keep_last` and the best.

        Later ones do not count: they are broken, or training would have gone on from them.
        """
        whole = [s for s in self.steps() if s <= newest and self._manifest(s) is not None]
        keep = set(whole[-self.config.keep_last :]) | {newest}
        if (best := self.best_step(up_to=newest)) is not None:
            keep.add(best)
        for step in whole:
            if step not in keep:
                remove_directory(self.path_of(step))

    # ---- reading -------------------------------------------------------------------------------

    def path_of(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending, whole or not."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def best_step(self, up_to: int | None = None) -> int | None:
        """The step with the best value of `best_metric`, the later one of equals, if any has it."""
        metric = self.config.best_metric
        sign = 1.0 if self.config.best_is == "higher" else -1.0
        scored = []
        for step in self.steps():
            manifest = self._manifest(step) if up_to is None or step <= up_to else None
            value = decode_state((manifest or {}).get("metrics", {})).get(metric, math.nan)
            if math.isfinite(value):
                scored.append((sign * value, step))
        return max(scored)[1] if scored else None

    def latest(self) -> Path | None:
        """The newest checkpoint whose files match their hashes; None if there is none at all.

        Damaged ones are skipped with a warning. Raises `CheckpointError` if all are damaged:
        starting anew would be the loss of a run.
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
        """Opens the checkpoint in `path`; `CheckpointError` names every missing or altered file.

        `verify=False` skips the hashes (for what `latest` has just returned).
        """
        path = Path(path)
        manifest = verify_manifest(path, hashes=verify)
        try:
            state = decode_state(json.loads((path / "state.json").read_text(encoding="utf-8")))
            has_optimizer = any(name.startswith("optimizer") for name in manifest["files"])
            optimizer = TensorFiles(path, "optimizer") if has_optimizer else {}
            step, metrics = int(manifest["step"]), decode_state(manifest["metrics"])
        except (OSError, ValueError, KeyError, TypeError, WeightsError) as error:
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
        return Checkpoint(path, step, state, metrics, optimizer)

    def load_latest(self) -> Checkpoint | None:
        """`load` of `latest`, hashed once, by rank 0; None if there is no checkpoint.

        Every rank must call it.
        """
        path = consensus.run_on_main(self.latest)
        checkpoint: Checkpoint | None = None
        with consensus.fail_together():
            checkpoint = None if path is None else self.load(path, verify=False)
        return checkpoint

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """The manifest of a checkpoint whose files have the right sizes."""
        try:
            return verify_manifest(self.path_of(step), hashes=False)
        except CheckpointError:
            return None


# ---- state as JSON -----------------------------------------------------------------------------
_TAG = "__ernie_train__"


def encode_state(value: Any) -> Any:
    """JSON of nested dicts, lists, tuples, numbers, strings, bytes and numpy arrays, exactly.

    numpy numbers become Python's. Raises `TypeError` for anything else, dict keys other than
    strings included, since JSON would give it back as something different.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)  # NaN and infinities are no JSON
        return number if math.isfinite(number) else {_TAG: "float", "value": repr(number)}
    if isinstance(value, list):
        return [encode_state(item) for item in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [encode_state(item) for item in value]}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        shape, dtype = list(value.shape), value.dtype.str
        return {_TAG: "array", "dtype": dtype, "shape": shape, "base64": data}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        if _TAG in value:
            raise TypeError(f"{_TAG!r} is not a free key")
        return {key: encode_state(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} cannot be part of a checkpoint's state: {value!r:.80}")


def decode_state(value: Any) -> Any:
    """The inverse of `encode_state`; `ValueError` for a tag that it does not write."""
    if isinstance(value, list):
        return [decode_state(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: decode_state(item) for key, item in value.items()}
    if kind == "float":
        return float(value["value"])
    if kind == "tuple":
        return tuple(decode_state(item) for item in value["items"])
    if kind == "bytes":
        return base64.b64decode(value["base64"])
    if kind == "array":
        data = np.frombuffer(base64.b64decode(value["base64"]), dtype=value["dtype"])
        return data.reshape(value["shape"]).copy()
    raise ValueError(f"unknown kind of value {kind!r}")
