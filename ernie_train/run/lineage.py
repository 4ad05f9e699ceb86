"""The hashes that say what a model was made from, so that changed inputs are noticed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import Any

from ernie_train.core.config import apply_overrides, decisive_settings, parse_config
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.core.foreign_files import read_json
from ernie_train.data import Tokenizer, find_files
from ernie_train.io.files import digest_file, fingerprint, write_json
from ernie_train.io.run_dir import differences
from ernie_train.rl.config import UpoConfig, settings_without_effect
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import AnyStageConfig
from ernie_train.weights.adapters import hash_weights
from ernie_train.weights.checkpoint import may_change
from ernie_train.weights.model_directory import find_model

_SETTLED_NS = 50_000_000  # file systems keep times in steps of up to 10 ms


@dataclass(frozen=True)
class Lineage:
    """Hashes of everything that a model was made from, up to some point of a run."""

    seed: str
    model: str  # of the recipe's `model` section
    tokenizer: str
    weights: str | None = None  # of the files that the first stage starts from
    data: str | None = None  # of the files that the latest stage reads
    finished: tuple[tuple[str, str], ...] = ()  # (stage, hash of its result), in order

    @classmethod
    def of_recipe(
        cls,
        recipe: Recipe,
        tokenizer: Tokenizer,
        hashes: HashMemory | None = None,
        recorded: Mapping[str, Any] | None = None,
    ) -> Lineage:
        """Return the lineage of the model before the first stage.

        `recorded`: what the finished first stage recorded; its hash stands for weights that are no
        longer there, since nothing reads them any more.
        """
        source = recipe.model
        # The path is not: the content of what lies there is hashed in its place.
        settings = fingerprint(source.model_dump(mode="json") | {"path": None})
        weights = None
        if source.path is not None:
            known = (recorded or {}).get("weights")
            gone = known is not None and not Path(source.path).exists()
            weights = known if gone else hash_files([find_model(source.path).weights], hashes)
        return cls(
            str(recipe.seed),
            settings,
            f"{tokenizer.fingerprint()} {tokenizer.chat.fingerprint}",
            weights,
        )

    def with_data(self, paths: list[Path], hashes: HashMemory | None = None) -> Lineage:
        """Return the lineage of a model that is trained on these files next."""
        return replace(self, data=hash_files(paths, hashes))

    def after(self, stage: str, result: dict[str, Any]) -> Lineage:
        """Return the lineage of what follows a finished stage."""
        return replace(self, finished=(*self.finished, (stage, fingerprint(result))))

    def to_dict(self) -> dict[str, str]:
        """Return name -> hash, as run directories record it; their format, so keep the names."""
        hashes = {"seed": self.seed, "model": self.model, "tokenizer": self.tokenizer}
        optional = {"weights": self.weights, "data": self.data}
        hashes |= {name: value for name, value in optional.items() if value is not None}
        return hashes | {f"after {stage}": value for stage, value in self.finished}

    def of_start(self, weights: Path | None) -> dict[str, str]:
        """Return `to_dict` with a hash of the weights that the last finished stage left, if any."""
        left = {"start": hash_weights(weights)} if weights is not None and self.finished else {}
        return self.to_dict() | left


class HashMemory:
    """Hashes of files, kept in a file and taken from it while size and time of change are equal."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):  # none yet, or damaged: then files are hashed again
            self._known = read_json(path)

    def sha256(self, file: Path) -> str:
        """Return the SHA-256 of a file."""
        stat, name = file.stat(), str(file.resolve())
        facts = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(name)
        if isinstance(known, list) and known[:2] == facts:
            return str(known[2])
        found = digest_file(file).sha256
        # A file that is just being written may change again without a new time.
        if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
            self._known[name] = [*facts, found]
        return found

    def save(self) -> None:
        """Write what is known, for the next start of the run."""
        write_json(self._path, self._known)


def hash_files(paths: list[Path], hashes: HashMemory | None = None) -> str:
    """Return one hash of the contents of files and of those in directories, in a fixed order.

    Among several paths a directory counts as one, so that no file passes from one path to another
    unnoticed. Of a checkpoint the optimizer state does not count, nor the manifest, which lists it:
    it is removed when the checkpoint's run begins its next stage.
    """
    sha256 = hashes.sha256 if hashes is not None else lambda file: digest_file(file).sha256
    parts = [[sha256(file) for file in _files_of(path)] for path in paths]
    if len(parts) == 1:
        return _joined(parts[0])
    pairs = zip(paths, parts, strict=True)
    return _joined(part[0] if path.is_file() else _joined(part) for path, part in pairs)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(_below(path))
    if path.exists():
        return [path]
    if has_magic(str(path)):
        return find_files(path).files
    raise DataError(f"{path}: no such file or directory")


def _below(directory: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a directory and below it, behind symbolic links too, as data is read."""
    real = directory.resolve()
    for child in directory.iterdir() if real not in above else ():
        if child.is_dir():
            yield from _below(child, (*above, real))
        elif child.is_file() and not may_change(child):
            yield child


def _joined(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


# ---- records of stages ---------------------------------------------------------------------------


def stage_record(stage: AnyStageConfig, lineage: Lineage) -> dict[str, Any]:
    """Return the settings and inputs of a stage, as `stage.json` holds them."""
    return {"settings": stage.model_dump(mode="json"), "input": lineage.to_dict()}


def stage_changes(
    stage: AnyStageConfig, lineage: Lineage, recorded: Mapping[str, Any]
) -> list[str]:
    """Return how settings and inputs that a stage's result depends on differ from a record."""
    now = stage_record(stage, lineage)
    settings = recorded.get("settings")
    before = _read_today(stage, settings) if isinstance(settings, dict) else {}
    after = now["settings"]
    found = differences(decisive_settings(stage, before), decisive_settings(stage, after))
    if stage.checkpoint.depends_on_scores:
        found += differences(_scoring(before), _scoring(after))
    return found + differences(recorded.get("input"), now["input"], "input")


def _scoring(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that choose which checkpoints have a score, of which one is the best."""
    places = {"checkpoint": "every_steps", "evaluation": "every_iterations"}
    found = {f"{at}.{key}": (settings.get(at) or {}).get(key) for at, key in places.items()}
    return found | {"validate_every_steps": settings.get("validate_every_steps")}


def _read_today(stage: AnyStageConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings as the kind of `stage` reads them today.

    Keys that came later have their defaults, and settings that had no effect, and are refused
    today, are reset.
    """
    try:
        read = parse_config(type(stage), settings, "stage", recorded=True)
    except ConfigError:  # of a version that differs in more, as the comparison then tells
        return settings
    found = read.model_dump(mode="json")
    if not isinstance(read, UpoConfig):
        return found
    resets = [reset for idle in settings_without_effect(read) for reset in idle.same.items()]
    return apply_overrides(found, [f"{path}={json.dumps(value)}" for path, value in resets])
