"""The hashes that say what a model was made from, so that changed inputs are noticed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data import Tokenizer, find_files
from ernie_train.io.files import digest_file, fingerprint
from ernie_train.run.recipe import Recipe
from ernie_train.weights.model_directory import find_model


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
    def of_recipe(cls, recipe: Recipe, tokenizer: Tokenizer) -> Lineage:
        """Return the lineage of the model before the first stage."""
        source = recipe.model
        settings = fingerprint(source.model_dump(mode="json"))
        weights = hash_files([find_model(source.path).weights]) if source.path else None
        return cls(
            str(recipe.seed),
            settings,
            f"{tokenizer.fingerprint()} {tokenizer.chat.fingerprint}",
            weights,
        )

    def with_data(self, paths: list[Path]) -> Lineage:
        """Return the lineage of a model that is trained on these files next."""
        return replace(self, data=hash_files(paths))

    def after(self, stage: str, result: dict[str, Any]) -> Lineage:
        """Return the lineage of what follows a finished stage."""
        return replace(self, finished=(*self.finished, (stage, fingerprint(result))))

    def to_dict(self) -> dict[str, str]:
        """Return name -> hash, as run directories record it; their format, so keep the names."""
        hashes = {"seed": self.seed, "model": self.model, "tokenizer": self.tokenizer}
        optional = {"weights": self.weights, "data": self.data}
        hashes |= {name: value for name, value in optional.items() if value is not None}
        return hashes | {f"after {stage}": value for stage, value in self.finished}


def hash_files(paths: list[Path]) -> str:
    """Return one hash of the contents of files and of those in directories, in a fixed order."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(found for found in path.rglob("*") if found.is_file())
        elif path.exists():
            files.append(path)
        elif has_magic(str(path)):
            files += find_files(path).files
        else:
            raise DataError(f"{path}: no such file or directory")
    digests = [digest_file(path).sha256 for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
