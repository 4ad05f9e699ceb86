"""Recipes that come with the package, and the data that they name.

In a checkout they are `recipes/` and `data/` of the repository; an installed package has copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml
from ernie_train.core.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
SHARED_DIRECTORIES = ("recipes", "data")


def share_directory() -> Path:
    """Return the directory that holds `recipes/` and `data/`."""
    installed = _PACKAGE / "share"
    return installed if installed.is_dir() else _PACKAGE.parent


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    return {path.stem: path for path in sorted((share_directory() / "recipes").glob("*.yaml"))}


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Return the content of a recipe: a file, or the name of one that comes with the package.

    Data that a shipped recipe names is found from every working directory. Raises `ConfigError`.
    """
    path = Path(recipe)
    if path.is_file() or path.suffix or path.name != str(recipe):
        return load_yaml(path)
    shipped = shipped_recipes()
    if path.name not in shipped:
        if (named := path.with_suffix(".yaml")).is_file():
            raise ConfigError(f"{path}: no such file; did you mean {named}?")
        raise ConfigError(
            f"{path}: no such file, and no recipe of that name comes with ernie-train, which has "
            f"{', '.join(shipped)}"
        )
    content: dict[str, Any] = _located(load_yaml(shipped[path.name]))
    return content


def _located(value: Any) -> Any:
    """Return the value with every path that starts in a shared directory made absolute."""
    if isinstance(value, dict):
        return {key: _located(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_located(item) for item in value]
    if isinstance(value, str) and value.split("/")[0] in SHARED_DIRECTORIES:
        place = share_directory() / value
        return str(place) if place.exists() else value
    return value


def shared_path(text: str) -> Path:
    """Return a path in a shared directory: that in the working directory, if it is there."""
    return Path(text) if Path(text).exists() else share_directory() / text
