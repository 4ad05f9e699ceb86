"""The keys of a recipe, walked from its schema: what documents and probes must cover."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from ernie_train.run.recipe import Recipe
from ernie_train.train.stage import StageConfig


class Key(NamedTuple):
    """A key: the section that it stands in, its name, and the class that declares it."""

    section: str  # such as `stages[].optim`, or `stages[] of kind dpo`
    name: str
    owner: type[BaseModel]

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section != "recipe" else self.name


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that a key's type names, in unions and lists too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def recipe_keys() -> list[Key]:
    """Every key of every section once, also where several kinds of stage share the section."""
    keys: dict[tuple[type[BaseModel], str], Key] = {}
    walked: set[type[BaseModel]] = set()
    taken: dict[str, type[BaseModel]] = {}
    kinds = {cls: get_args(cls.model_fields["kind"].annotation)[0]
             for cls in sections_in(Recipe.model_fields["stages"].annotation)}  # fmt: skip

    def section_of(cls: type[BaseModel], path: str, stage: type[BaseModel]) -> str:
        # Two kinds of stage may have sections of one name with different keys.
        return path if taken.setdefault(path, cls) is cls else f"{path} of kind {kinds[stage]}"

    def declared(cls: type[BaseModel], name: str) -> tuple[type[BaseModel], str]:
        """The class that declares a key of a stage, and the section for its kinds."""
        parents = [c for c in reversed(cls.__mro__) if issubclass(c, StageConfig)]
        owner = next(c for c in parents if name in c.model_fields)
        owner = StageConfig if name == "kind" else owner
        own = [kind for kind_class, kind in kinds.items() if issubclass(kind_class, owner)]
        return owner, "stages[]" + (f" of kind {', '.join(own)}" if len(own) < len(kinds) else "")

    def walk(cls: type[BaseModel], path: str, stage: type[BaseModel]) -> None:
        if cls in walked:
            return
        walked.add(cls)
        for name, field in cls.model_fields.items():
            if cls in kinds:
                owner, section = declared(cls, name)
            else:
                owner, section = cls, section_of(cls, path, stage)
            keys.setdefault((owner, name), Key(section, name, owner))
            below = name + ("[]" if "list[" in str(field.annotation) else "")
            for inner in sections_in(field.annotation):
                inner_path = below if path == "recipe" else f"{path}.{below}"
                walk(inner, inner_path, inner if inner in kinds else stage)

    walk(Recipe, "recipe", Recipe)
    return list(keys.values())
