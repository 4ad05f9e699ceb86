"""Settings: strict schemas, overrides from the command line, and errors that name their path.

A schema is a class derived from `StrictConfig`. `parse_config` reports everything that is wrong
with the settings at once, each problem with its dotted path as it stands in the recipe.
"""

import ast
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import pydantic
from pydantic import Field
from pydantic_core import ErrorDetails

from ernie_train.core.errors import ConfigError, describe, did_you_mean
from ernie_train.core.yaml import dump_yaml as dump_yaml
from ernie_train.core.yaml import load_yaml as load_yaml
from ernie_train.core.yaml import parse_yaml

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
SampleWeight = Annotated[float, Field(gt=0, le=10_000)]  # how often a source is used in an epoch
Share = Annotated[float, Field(ge=0, le=1)]
PathText = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]  # `~` is the home directory


class Harmless:
    """Marks a setting, in its `Annotated`, that may change between two starts of a run.

    What is trained does not depend on it: it sets what is kept, shown or judged, or it is a path
    whose content is compared in its place.
    """


HARMLESS = Harmless()

# In the context of a validation: the settings are those of a run, and what had no effect may stand.
RECORDED = "recorded"


def is_recorded(info: pydantic.ValidationInfo) -> bool:
    """Return whether a validator, given `info`, sees settings that a run was made with."""
    return bool((info.context or {}).get(RECORDED))


KeyPath = tuple[str | int, ...]


class StrictConfig(pydantic.BaseModel):
    """Base of all settings: unknown keys and wrong types are errors, instances are frozen.

    Types are strict: no text for a number, no boolean for an integer; an integer is accepted where
    a number with a fraction is wanted. NaN and infinity are refused. Defaults are checked too.
    """

    # Keys that others use, of the outermost section: a path in it, or advice in several words.
    foreign_keys: ClassVar[Mapping[str, str]] = {}
    foreign_kinds: ClassVar[Mapping[str, str]] = {}  # values of a `kind` that others use -> advice

    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Config = TypeVar("Config", bound=StrictConfig)


@cache
def describe_keys(schema: type[pydantic.BaseModel]) -> None:
    """Make the docstring below each key its description, as JSON Schemas and the docs show it.

    Its parents and the schemas of its sections are done too. Pydantic's own
    `use_attribute_docstrings` would read the source of every class at each start: 0.3 s.
    """
    texts: dict[str, str] = {}
    for cls in (c for c in reversed(schema.__mro__) if issubclass(c, StrictConfig)):
        texts |= _key_docstrings(cls)
        if cls is not schema:
            describe_keys(cls)
    for name, field in schema.model_fields.items():
        field.description = texts.get(name)
        for section in schemas_in(field.annotation):
            describe_keys(section)
    schema.model_rebuild(force=True)


def _key_docstrings(cls: type[StrictConfig]) -> dict[str, str]:
    """Return the string that follows each annotated name in the source of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        key.target.id: inspect.cleandoc(text.value.value)
        for key, text in pairwise(definition.body)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def decisive_settings(config: StrictConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that results depend on: `values` without the `HARMLESS` ones.

    `values` are plain: those of `config`, or others of the same schema such as a run recorded.
    """
    kept = dict(values)
    for name, field in type(config).model_fields.items():
        if HARMLESS in field.metadata:
            kept.pop(name, None)
        elif name in kept:
            kept[name] = _decisive(getattr(config, name), kept[name])
    return kept


def _decisive(setting: Any, value: Any) -> Any:
    if isinstance(setting, StrictConfig) and isinstance(value, dict):
        return decisive_settings(setting, value)
    if isinstance(setting, list | tuple) and isinstance(value, list):
        pairs = zip(setting, value, strict=False)
        return [*(_decisive(one, other) for one, other in pairs), *value[len(setting) :]]
    return value


def parse_config(
    cls: type[Config], data: dict[str, Any], source: str, *, recorded: bool = False
) -> Config:
    """Build `cls` from plain values such as `load_yaml` returns.

    `recorded`: a run was made with them, so that those without an effect are let stand.

    Raises:
        ConfigError: everything that is wrong, one line each, with the dotted path of the key.
    """
    try:
        # By way of JSON a list is accepted for a tuple and text for a path or an enumeration, as
        # a recipe needs it, while everything else stays strict.
        text = json.dumps(data, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 30) : error.end + 10]
        raise ConfigError(f"half of a surrogate pair is no text: {near}", source) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"settings must be plain values: {error}", source) from None
    try:
        return cls.model_validate_json(text, context={RECORDED: recorded})
    except pydantic.ValidationError as error:
        problems = list_problems(cls, data, error.errors(include_url=False))
        raise ConfigError(problems, source) from None


# ---- messages ------------------------------------------------------------------------------------


# Pydantic's words, and those that fit the author of a recipe.
_WORDS = {
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid array": "a list",
    "a valid list": "a list",
    "greater than or equal to": ">=",
    "less than or equal to": "<=",
    "greater than": ">",
    "less than": "<",
}


def list_problems(
    cls: type[pydantic.BaseModel], data: dict[str, Any], errors: list[ErrorDetails]
) -> list[str]:
    """Turn pydantic's errors about `data` into lines `path: message`, in the same order."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_path_of(error, data), []).append(error)
    lines = []
    for path, group in by_path.items():
        # For a value of type `int | Schema` pydantic reports that it is no int beside what is
        # wrong inside the schema; only the latter helps.
        if any(other[: len(path)] == path and other != path for other in by_path):
            continue
        prefix = f"{'.'.join(map(str, path))}: " if path else ""
        lines += [prefix + message for message in _messages(cls, group, _section(path, data))]
    return lines


def _path_of(error: ErrorDetails, data: Any) -> KeyPath:
    """Return the keys and indices of an error as they stand in the recipe."""
    loc = error["loc"]
    if error["type"] == "missing":
        return (*_keys_in(loc[:-1], data), loc[-1])
    if error["type"].startswith("union_tag_"):
        return (*_keys_in(loc, data), error["ctx"]["discriminator"].strip("'"))
    return _keys_in(loc, data) or loc[-1:]  # a wrong default is not in the data


def _keys_in(loc: KeyPath, data: Any) -> KeyPath:
    """Drop from a location what pydantic adds for members of unions: it is no key in `data`.

    A key may be named like a member, so of several readings the one with most keys counts.
    """
    if not loc:
        return ()
    head, rest = loc[0], loc[1:]
    without = _keys_in(rest, data)
    is_index = isinstance(data, list) and isinstance(head, int)
    is_key = is_index or (isinstance(data, dict) and head in data)
    with_head = (head, *_keys_in(rest, data[head])) if is_key else ()
    return max(with_head, without, key=len)


def _section(path: KeyPath, data: Any) -> list[str]:
    """Return the keys above the last as an override says them: items by their names."""
    section = []
    for key in path[:-1]:
        data = data[key]
        name = data.get("name") if isinstance(key, int) and isinstance(data, dict) else None
        section.append(name if isinstance(name, str) else str(key))
    return section


def _messages(
    cls: type[pydantic.BaseModel], errors: list[ErrorDetails], section: list[str]
) -> list[str]:
    """Return the messages for one key; the members of a union share one."""
    messages, wanted, hint = [], [], ""
    for error in errors:
        kind, context, value = error["type"], error.get("ctx", {}), error["input"]
        if kind in ("missing", "union_tag_not_found"):
            messages.append("missing; this key is required")
        elif kind == "extra_forbidden":
            messages.append("unknown key" + _unknown_key_hint(cls, error["loc"], section))
        elif kind in ("value_error", "assertion_error"):
            messages.append(str(context["error"]))
        elif kind in ("model_type", "dict_type"):
            wanted.append("a section of `key: value` lines")
        elif kind in ("literal_error", "enum", "union_tag_invalid"):
            expected = context.get("expected") or context["expected_tags"].replace(", ", " or ")
            wanted.append(expected)
            value = context.get("tag", value)
            if isinstance(value, str):
                advice = getattr(cls, "foreign_kinds", {}).get(value.lower())
                hint = did_you_mean(value, re.findall(r"'([^']*)'", expected))
                hint = f"; {advice}" if advice and kind == "union_tag_invalid" else hint
        elif error["msg"].startswith("Input should be "):
            want = error["msg"].removeprefix("Input should be ")
            wanted.append(re.sub("|".join(_WORDS), lambda found: _WORDS[found[0]], want))
        elif kind in ("too_short", "too_long"):
            messages.append(error["msg"])
        else:
            messages.append(f"{error['msg']}, got {describe(value)}")
    if wanted and not messages:
        listed = " or ".join(dict.fromkeys(wanted))
        messages.append(f"must be {listed}, got {describe(value)}{hint}")
    return list(dict.fromkeys(messages))


def _unknown_key_hint(cls: type[pydantic.BaseModel], loc: KeyPath, section: list[str]) -> str:
    """Name the key that was meant by the last element of `loc`, or those that its schema has."""
    schemas = [cls]
    for element in loc[:-1]:
        if len(schemas) > 1 and (chosen := [s for s in schemas if _is_member(element, s)]):
            schemas = chosen
        elif fields := [s.model_fields[element] for s in schemas if element in s.model_fields]:
            schemas = [s for field in fields for s in schemas_in(field.annotation)]
    word = str(loc[-1])
    foreign = getattr(cls, "foreign_keys", {}).get(word.lower().replace("-", "_"))
    if foreign is not None and " " in foreign:
        return f"; {foreign}"
    # Else the right key one section too high: `lr` for `optim.lr`.
    inside = (".".join((*section, path)) for schema in schemas for path in _paths_to(word, schema))
    if meant := foreign or next(inside, None):
        stage = ".".join(section[:2]) if loc[0] == "stages" and len(section) > 1 else "stages[]"
        return f"; did you mean '{meant.replace('stages[]', stage)}'?"
    return did_you_mean(word, [name for schema in schemas for name in schema.model_fields])


def schemas_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """Yield every schema in a type such as `list[A | B] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from schemas_in(argument)


def _is_member(element: str | int, schema: type[pydantic.BaseModel]) -> bool:
    """Return whether pydantic means this member of a union: by its name or by its `kind`."""
    kinds = [f.annotation for f in schema.model_fields.values() if f.is_required()]
    return element == schema.__name__ or any(
        get_origin(kind) is Literal and element in get_args(kind) for kind in kinds
    )


def _paths_to(key: str, schema: type[pydantic.BaseModel]) -> Iterator[str]:
    """Yield the dotted paths below `schema` that end in `key`; `[]` stands for any item."""
    for name, field in schema.model_fields.items():
        items = "[]" if get_origin(field.annotation) in (list, tuple) else ""
        for inner in schemas_in(field.annotation):
            if key in inner.model_fields:
                yield f"{name}{items}.{key}"
            yield from (f"{name}{items}.{path}" for path in _paths_to(key, inner))


# ---- overrides -----------------------------------------------------------------------------------


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `data` with `key.path=value` settings applied in order.

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
    """Copy lists and mappings; unlike deepcopy it separates those that a YAML alias shares."""
    if isinstance(value, dict):
        return {key: _copy(child) for key, child in value.items()}
    return [_copy(child) for child in value] if isinstance(value, list) else value


def _assign(data: dict[str, Any], parts: list[str], value: Any) -> None:
    holder: Any = data
    for depth, part in enumerate(parts[:-1]):
        if isinstance(holder, dict):
            # Make the section where the recipe leaves it out or empty (`optim:`).
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
    """Return the index of the list item that `parts[depth]` names."""
    path, part = ".".join(parts[: depth + 1]), parts[depth]
    if not isinstance(holder, list):
        parent = ".".join(parts[:depth])
        raise ConfigError(f"{path}: {parent} is {describe(holder)}, it has no keys")
    if re.fullmatch("-?[0-9]+", part):
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
        raise ConfigError(f"{path}: no item of this name{did_you_mean(part, known)}")
    return names.index(part)
