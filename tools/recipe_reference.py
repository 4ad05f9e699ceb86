"""Write the tables of docs/recipes.md and recipes/schema.json from the schema of recipes.

    python -m tools.recipe_reference

A key's meaning is the docstring below it in its settings class. The page has a table below each
heading that names a section; all else in it is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from ernie_train.core.config import schemas_in
from ernie_train.run.recipe import Recipe, recipe_schema, schema_text
from ernie_train.train.stage import StageConfig

ROOT = Path(__file__).resolve().parents[1]
MODELINE = "# yaml-language-server: $schema=schema.json"  # the first line of a recipe
PAGE, SCHEMA = ROOT / "docs/recipes.md", ROOT / "recipes/schema.json"

_TABLE = r"(?:Stages of kind `[^\n]*\n\n)?\| key \| .*?(?=\n\n|\Z)"
_BOUNDS = {
    "minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}",
}  # fmt: skip


class Key(NamedTuple):
    """A key: the section that it stands in, its name, and the class that declares it."""

    section: str  # such as `stages[].optim`, or `stages[] of kind dpo`
    name: str
    owner: type[BaseModel]

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section != "recipe" else self.name


KINDS: dict[type[BaseModel], str] = {
    cls: get_args(cls.model_fields["kind"].annotation)[0]
    for cls in schemas_in(Recipe.model_fields["stages"].annotation)
}


def recipe_keys() -> list[Key]:
    """Return every key of every section once, also where kinds of stage share the section."""
    keys: dict[tuple[type[BaseModel], str], Key] = {}
    walked: set[type[BaseModel]] = set()
    taken: dict[str, type[BaseModel]] = {}

    def section_of(cls: type[BaseModel], path: str, stage: type[BaseModel]) -> str:
        # Two kinds of stage may have sections of one name with different keys.
        return path if taken.setdefault(path, cls) is cls else f"{path} of kind {KINDS[stage]}"

    def declared(cls: type[BaseModel], name: str) -> tuple[type[BaseModel], str]:
        """Return the class that declares a key of a stage, and the section for its kinds."""
        parents = [c for c in reversed(cls.__mro__) if issubclass(c, StageConfig)]
        owner = next(c for c in parents if name in c.model_fields)
        owner = StageConfig if name == "kind" else owner
        own = [kind for kind_class, kind in KINDS.items() if issubclass(kind_class, owner)]
        return owner, "stages[]" + (f" of kind {', '.join(own)}" if len(own) < len(KINDS) else "")

    def walk(cls: type[BaseModel], path: str, stage: type[BaseModel]) -> None:
        if cls in walked:
            return
        walked.add(cls)
        for name, field in cls.model_fields.items():
            if cls in KINDS:
                owner, section = declared(cls, name)
            else:
                owner, section = cls, section_of(cls, path, stage)
            keys.setdefault((owner, name), Key(section, name, owner))
            below = name + ("[]" if "list[" in str(field.annotation) else "")
            for inner in schemas_in(field.annotation):
                inner_path = below if path == "recipe" else f"{path}.{below}"
                walk(inner, inner_path, inner if inner in KINDS else stage)

    walk(Recipe, "recipe", Recipe)
    return list(keys.values())


# ---- the page ------------------------------------------------------------------------------------


def render_page(text: str) -> str:
    """Return the page with the tables of all sections made anew.

    Raises `SystemExit` for a section without a heading, and for a heading without a section.
    """
    schema = recipe_schema()
    tables: dict[str, list[str]] = {}
    for key in recipe_keys():
        tables.setdefault(key.section, _head(key)).append(_row(key, schema))
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    for index, part in enumerate(parts):
        heading = part.partition("\n")[0].removeprefix("## ").strip("` ")
        rows = tables.pop(heading, None)
        if (rows is None) == ("| key | type |" in part or "| key | default |" in part):
            raise SystemExit(f"{PAGE}: no section of a recipe is called {heading!r}, or it has no "
                             "table: the heading is followed by one, of any content")  # fmt: skip
        if rows is not None:
            table = "\n".join(rows)
            parts[index] = re.sub(_TABLE, lambda _: table, part, count=1, flags=re.DOTALL)  # noqa: B023
    if tables:
        raise SystemExit(f"{PAGE}: add a heading ## `NAME` with a table for {', '.join(tables)}")
    return "".join(parts)


def _head(key: Key) -> list[str]:
    kinds = [kind for cls, kind in KINDS.items() if key.owner in _reached(cls)]
    told = key.section.startswith("stages[]") and " of kind " not in key.section
    some = told and len(kinds) < len(KINDS)
    of_kinds = [f"Stages of kind {', '.join(f'`{kind}`' for kind in kinds)}.", ""] if some else []
    return [*of_kinds, "| key | type | default | meaning |", "| --- | --- | --- | --- |"]


def _reached(cls: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a settings class, its parents, and the classes of all sections in it."""
    inner = [s for field in cls.model_fields.values() for s in schemas_in(field.annotation)]
    return {*cls.__mro__, *(one for section in inner for one in _reached(section))}


def _row(key: Key, schema: Mapping[str, Any]) -> str:
    if key.name == "kind" and key.owner is StageConfig:
        kinds = {kind: cls.model_fields["kind"].description for cls, kind in KINDS.items()}
        meaning = " ".join(f"`{kind}`: {text}" for kind, text in kinds.items())
        return f"| `kind` | {_listed([f'`{kind}`' for kind in kinds])} | required | {meaning} |"
    field = key.owner.model_fields[key.name]
    if not field.description:
        raise SystemExit(f"{key.owner.__name__}.{key.name} needs a docstring below it")
    meaning = " ".join(field.description.split())
    meaning = re.sub(r"docs/([\w/]+\.md)(#[\w-]+)?", r"[\1](\1\2)", meaning)
    default = field.get_default(call_default_factory=True)
    shown = (
        "required" if field.is_required()
        else "none" if default is None
        else "section" if isinstance(default, BaseModel)
        else f"`{json.dumps(default)}`"
    )  # fmt: skip
    sections = schema["$defs"]
    owner = sections.get(key.owner.__name__) or _own_schema(key.owner)
    section = owner.get("anyOf", [owner])[0]  # the others are short forms
    kind = _type_name(section["properties"][key.name], sections)
    return f"| `{key.name}` | {kind} | {shown} | {meaning} |"


@cache
def _own_schema(cls: type[BaseModel]) -> dict[str, Any]:
    return cls.model_json_schema()


def _type_name(schema: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """Return the type of a JSON Schema in words."""
    if "anyOf" in schema or "oneOf" in schema:
        members = schema.get("anyOf") or schema["oneOf"]
        names = [_type_name(one, sections) for one in members if one.get("type") != "null"]
        return _listed(list(dict.fromkeys(names)))
    if "$ref" in schema:
        found = sections[schema["$ref"].rpartition("/")[2]]
        return "section" if "properties" in found else _type_name(found, sections)
    if "enum" in schema or "const" in schema:
        return _listed([f"`{value}`" for value in schema.get("enum", [schema.get("const")])])
    if "type" not in schema:
        return "any value"
    if schema["type"] == "array":
        inner = _type_name(schema["items"], sections)
        return "list of " + ("sections" if inner == "section" else inner)
    if schema["type"] == "object":
        return "section" if "properties" in schema else "mapping"
    name = {"string": schema.get("format", "text")}.get(schema["type"], schema["type"])
    bounds = [text.format(f"{schema[key]:.10g}") for key, text in _BOUNDS.items() if key in schema]
    return " ".join([name, ", ".join(bounds)]).strip()


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def main() -> None:
    """Write the page and the schema."""
    PAGE.write_text(render_page(PAGE.read_text("utf-8")), "utf-8")
    SCHEMA.write_text(schema_text(), "utf-8")


if __name__ == "__main__":
    main()
