"""YAML files of settings: strict reading with line numbers, exact writing.

Scalars follow YAML 1.2 rather than PyYAML's 1.1: `1e-5` is a number, `no`, `on` and `12:30` are
text, `010` is ten and dates are text. Numbers may hold underscores (`32_000`).

ruamel.yaml 0.19.1 follows YAML 1.2 by itself, but would not shorten this file: it reads 4 of the 29
scalars in tests/core/test_yaml.py otherwise (a date, `0x10`, `=`, `1__0`), lets keys that are no
text and aliases that hold themselves pass, and writes the text `no` without quotes.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ernie_train.core.errors import ConfigError
from ernie_train.core.foreign_files import read_text
from ernie_train.core.terminal import one_line

MOST_BYTES = 2**17  # of a file of settings; PyYAML takes seconds for it
MOST_DEPTH = 100  # of lists and sections within each other
MOST_VALUES = 100_000  # in a file of settings, each alias counted with all that it stands for

_INT = re.compile(r"[-+]?[0-9](_?[0-9])*$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9](_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")

_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")
}


class _Loader(yaml.SafeLoader):
    """Loader of YAML 1.2 scalars."""

    # Of PyYAML's own rules only `<<` stays; those for numbers, booleans and dates are replaced.
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile(r"<<$"))]}


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    # JSON, which is YAML, may write one character as two escapes, a surrogate pair.
    text = str(loader.construct_scalar(node))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which YAML 1.1 or 1.2 would read as another type, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Integers come before floats, whose rule matches integers too: the first match wins.
for _kind, _rule, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _rule, list(_first))


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: a syntax error or a duplicate key, with its line in `source`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _NodeCheck(source).visit(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{error.problem}{context}{hint}", place) from None
    except (yaml.YAMLError, ValueError) as error:  # odd characters; a tag such as `!!int x`
        reason = " ".join(str(error).split())
        raise ConfigError(f"not readable as YAML: {reason}", source) from None
    except RecursionError:
        raise ConfigError("nested too deeply", source) from None


class _NodeCheck:
    """Refuses duplicate keys, keys that are no text, and aliases that hold themselves or multiply.

    Each node is visited once, however many aliases lead to it.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        # Values in a node and how deep they lie, aliases written out; None while it is visited.
        self._extent: dict[yaml.Node, tuple[int, int] | None] = {}

    def visit(self, node: yaml.Node) -> tuple[int, int]:
        place = f"{self._source}:{node.start_mark.line + 1}"
        if node in self._extent:
            if (known := self._extent[node]) is None:
                raise ConfigError("an alias (*name) holds itself; write the value out", place)
            return known
        if node.tag not in _PLAIN_TAGS:
            tag = one_line(node.tag)
            raise ConfigError(f"the tag {tag} is not allowed; write a plain value", place)
        self._extent[node] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            children = [child for _, child in node.value]
        inside = [self.visit(child) for child in children]
        size = 1 + sum(count for count, _ in inside)
        depth = 1 + max((deep for _, deep in inside), default=0)
        if size > MOST_VALUES:
            raise ConfigError(f"aliases (*name) multiply to more than {MOST_VALUES} values", place)
        if depth > MOST_DEPTH:
            raise ConfigError("nested too deeply", place)
        self._extent[node] = size, depth
        return size, depth

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            place = f"{self._source}:{key.start_mark.line + 1}"
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                text = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise ConfigError(f"a key must be text, got {one_line(text)}; quote it", place)
            if key.value in seen:
                name = one_line(key.value)
                raise ConfigError(f"the key '{name}' stands twice; keep one of them", place)
            seen.add(key.value)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, empty, no mapping, or has an error in it
            (named with its line).
    """
    path = Path(path)
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise ConfigError("no such file", str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
    except ValueError as error:
        raise ConfigError(str(error), str(path)) from None
    value = parse_yaml(text, str(path))
    if value is None:
        raise ConfigError("the file is empty", str(path))
    if not isinstance(value, dict):
        raise ConfigError("expected `key: value` lines at the top level", str(path))
    return value


def dump_yaml(data: dict[str, Any]) -> str:
    """Return plain values as YAML from which `load_yaml` reads the same ones."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
