"""Settings: strict schemas, overrides from the command line, and errors that name their path.

A schema is a class derived from `StrictConfig`. `parse_config` reports everything that is wrong
with the settings at once, each with its dotted path as it stands in the recipe.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from ernie_train.core.config_problems import describe, list_problems, nearest_hint
from ernie_train.core.config_schema import Leaf as Leaf
from ernie_train.core.config_schema import default_of as default_of
from ernie_train.core.config_schema import iterate_leaves as iterate_leaves
from ernie_train.core.errors import ConfigError
from ernie_train.core.yaml import dump_yaml as dump_yaml
from ernie_train.core.yaml import load_yaml as load_yaml
from ernie_train.core.yaml import parse_yaml

PositiveInt = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class StrictConfig(pydantic.BaseModel):
    """Base of all settings: unknown keys and wrong types are errors, instances are frozen.

    Types are strict: no text for a number, no boolean for an integer; an integer is accepted where
    a number with a fraction is wanted. NaN and infinity are refused. Defaults are checked too.
    """

    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Config = TypeVar("Config", bound=StrictConfig)


def parse_config(cls: type[Config], data: dict[str, Any], source: str) -> Config:
    """Builds `cls` from plain values such as `load_yaml` gives.

    Raises:
        ConfigError: everything that is wrong, a line each, with the dotted path of the key.
    """
    try:
        # By way of JSON a list is accepted for a tuple and text for a path or an enumeration, as
        # a recipe needs it, while everything else stays strict.
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings must be plain values: {error}", source) from None
    try:
        return cls.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise ConfigError(list_problems(cls, error.errors(include_url=False)), source) from None


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `key.path=value` settings applied in order.

    Items of a list are addressed by index or by their `name`; values are read as YAML. A key that
    the recipe does not set is added, and `parse_config` then checks that the schema knows it.

    Raises:
        ConfigError: all overrides that cannot be applied.
    """
    result = _copy(data)
    wrong: list[str] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            wrong.append(f"{override}: expected key.path=value, like stages.sft.optim.lr=1e-4")
            continue
        try:
            value = parse_yaml(text, path)
        except ConfigError as error:
            wrong.append(f"{path}: the value is no YAML: {error.problems[0]}")
            continue
        try:
            _assign(result, parts, value)
        except ConfigError as error:
            wrong += error.problems
    if wrong:
        raise ConfigError(wrong, "override")
    return result


def _copy(value: Any) -> Any:
    """Copies lists and mappings; unlike deepcopy it parts those that a YAML alias shares."""
    if isinstance(value, dict):
        return {key: _copy(child) for key, child in value.items()}
    return [_copy(child) for child in value] if isinstance(value, list) else value


def _assign(data: dict[str, Any], parts: list[str], value: Any) -> None:
    holder: Any = data
    for depth, part in enumerate(parts[:-1]):
        if isinstance(holder, dict):
            # A section that the recipe leaves out, or leaves empty (`optim:`), is made.
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        else:
            holder = holder[_list_index(holder, parts, depth)]
    last = len(parts) - 1
    if isinstance(holder, dict):
        holder[parts[last]] = value
    else:
        holder[_list_index(holder, parts, last)] = value


def _list_index(holder: Any, parts: list[str], depth: int) -> int:
    """Index of the list item that `parts[depth]` names."""
    path, part = ".".join(parts[: depth + 1]), parts[depth]
    if not isinstance(holder, list):
        parent = ".".join(parts[:depth])
        raise ConfigError(f"{path}: {parent} is {describe(holder)}, it has no keys")
    if part.lstrip("-").isdigit():
        if not 0 <= int(part) < len(holder):
            count = f"has {len(holder)} items, counted from 0" if holder else "is empty"
            raise ConfigError(f"{path}: no such item; the list {count}")
        return int(part)
    names = [item.get("name") if isinstance(item, dict) else None for item in holder]
    if names.count(part) > 1:
        raise ConfigError(f"{path}: several items have this name; use the index")
    if part not in names:
        known = [name for name in names if isinstance(name, str)]
        if not known:
            raise ConfigError(f"{path}: items of this list have no name; use the index, from 0")
        raise ConfigError(f"{path}: no item of this name{nearest_hint(part, known)}")
    return names.index(part)
