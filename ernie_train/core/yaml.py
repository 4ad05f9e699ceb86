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


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


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
        _check_nodes(node, source, ())
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


def _check_nodes(node: yaml.Node, source: str, parents: tuple[yaml.Node, ...]) -> None:
    """Refuse duplicate keys, keys that are no text, and aliases that hold themselves."""
    place = f"{source}:{node.start_mark.line + 1}"
    if node in parents:
        raise ConfigError("an alias (*name) holds itself; write the value out", place)
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"the tag {node.tag} is not allowed; write a plain value", place)
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_nodes(child, source, (*parents, node))
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, child in node.value:
        place = f"{source}:{key.start_mark.line + 1}"
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            text = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(f"a key must be text, got {text}; quote it", place)
        if key.value in seen:
            raise ConfigError(f"the key '{key.value}' stands twice; keep one of them", place)
        seen.add(key.value)
        _check_nodes(child, source, (*parents, node))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, empty, no mapping, or has an error in it
            (named with its line).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text (byte {error.start})", str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from None
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
