"""Walks settings classes: the keys that one has, and the place in a recipe of pydantic's errors.

Pydantic puts the names of union members into its locations; they are no keys of the recipe.
"""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Leaf:
    """One key of a schema that holds a value rather than further keys.

    Attributes:
        path: `stages[sft].optim.lr`: `[sft]` marks an item of a list that the key `kind` selects,
            `[]` any item of a list.
        field: its type (`field.annotation`), default and description.
    """

    path: str
    field: FieldInfo


def iterate_leaves(cls: type[pydantic.BaseModel], prefix: str = "") -> Iterator[Leaf]:
    """Every leaf key of a schema, through nested schemas, lists and unions of schemas."""
    for name, info in cls.model_fields.items():
        members = list(_nested_schemas(info.annotation, info.discriminator))
        if not members:
            yield Leaf(prefix + name, info)
        for label, member in members:
            yield from iterate_leaves(member, f"{prefix}{name}{label}.")


def _nested_schemas(
    annotation: Any, discriminator: Any, label: str = ""
) -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    annotation, discriminator = _unwrap(annotation, discriminator)
    if is_schema(annotation):
        yield label, annotation
    elif get_origin(annotation) in (list, tuple, Sequence, dict):
        for argument in get_args(annotation):
            yield from _nested_schemas(argument, None, label + "[]")
    elif _is_union(annotation):
        for member in get_args(annotation):
            tags = _tags(member, discriminator)
            tagged = label.removesuffix("[]") + f"[{'|'.join(tags)}]" if tags else label
            yield from _nested_schemas(member, None, tagged)


def default_of(field: FieldInfo) -> Any:
    """Default value of a key; `PydanticUndefined` where it is required."""
    return field.get_default(call_default_factory=True, validated_data={})


@dataclass
class Place:
    """Where an error is.

    Attributes:
        path: keys and indices, as they stand in the recipe.
        holder: the schema that holds the last key.
        union_depth: length of the path at which a union without discriminator began, or -1.
    """

    path: tuple[str | int, ...]
    holder: Any
    union_depth: int = -1


def is_schema(annotation: Any) -> bool:
    """Whether a type is a settings class."""
    return isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _unwrap(annotation: Any, discriminator: Any = None) -> tuple[Any, Any]:
    """Takes Annotated and Optional off; gives the type inside and its discriminator."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            found = [m.discriminator for m in metadata if isinstance(m, FieldInfo)]
            discriminator = next((d for d in found if d is not None), discriminator)
            continue
        members = [m for m in get_args(annotation) if m is not type(None)]
        if _is_union(annotation) and len(members) == 1:
            annotation = members[0]
            continue
        return annotation, discriminator


def _tags(member: Any, discriminator: Any) -> tuple[str, ...]:
    """Values of the discriminator that select this member of a union."""
    member = _unwrap(member)[0]
    if not isinstance(discriminator, str) or not is_schema(member):
        return ()
    field = member.model_fields[discriminator]
    return tuple(str(value) for value in get_args(field.annotation))


def locate(cls: Any, loc: tuple[str | int, ...]) -> Place:
    """Walks the schema along pydantic's location and drops the names of union members from it."""
    path: list[str | int] = []
    annotation, discriminator, holder, union_depth = cls, None, cls, -1
    for element in loc:
        annotation, discriminator = _unwrap(annotation, discriminator)
        if _is_union(annotation):
            members = get_args(annotation)
            if discriminator is None:
                union_depth = len(path)
                chosen = [m for m in members if getattr(_unwrap(m)[0], "__name__", "") == element]
            else:
                chosen = [m for m in members if element in _tags(m, discriminator)]
            annotation = holder = _unwrap(chosen[0])[0] if chosen else None
            discriminator = None
            continue
        path.append(element)
        if is_schema(annotation):
            holder = annotation
            field = annotation.model_fields.get(str(element))
            annotation = field.annotation if field else None
            discriminator = field.discriminator if field else None
        else:
            # Of a list or tuple the item's type, of a mapping the value's.
            arguments = [a for a in get_args(annotation) if a is not Ellipsis]
            index = element if isinstance(element, int) and element < len(arguments) else -1
            annotation, discriminator = (arguments[index] if arguments else None), None
    return Place(tuple(path), holder, union_depth)
