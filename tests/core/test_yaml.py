"""YAML: scalars as in 1.2, errors with their line, writing that reads back the same."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.config import dump_yaml, load_yaml
from ernie_train.core.errors import ConfigError
from ernie_train.core.yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E+3", 1000.0), ("+12e03", 12e3), ("-.5", -0.5), ("1.", 1.0),
        ("32_000", 32000), ("1_0.5", 10.5), ("010", 10), ("-3", -3), ("+3", 3),
        (".inf", math.inf), ("-.inf", -math.inf),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("'1e-5'", "1e-5"), ("1e", "1e"),
        ("=", "="), (".", "."), ("_1", "_1"), ("1__0", "1__0"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    read = parse_yaml(f"key: {text}", "x")["key"]
    assert read == value and type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml("a: .nan", "x")["a"])


def test_anchors_and_merge_keys_work() -> None:
    text = "base: &b {x: 1, y: 2}\nuse: {<<: *b, x: 3}\nagain: {<<: *b}\n"
    assert parse_yaml(text, "x") == {
        "base": {"x": 1, "y": 2},
        "use": {"x": 3, "y": 2},
        "again": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "t.yaml:4: the key 'c' stands twice"),
        ("a: 1\nb: [1,\nc: 2", "t.yaml:3: expected ',' or ']'"),
        ("a:\n\tb: 1", "t.yaml:2: found character '\\t'"),
        ("a:\n\tb: 1", "indent with spaces, not tabs"),
        ("a: 1\n7: 2", "t.yaml:2: a key must be text, got 7; quote it"),
        ("null: 2", "t.yaml:1: a key must be text, got null; quote it"),
        ("? [1]\n: 2", "t.yaml:1: a key must be text, got a list or mapping; quote it"),
        ("a: b: c", "t.yaml:1: mapping values are not allowed here"),
        ("a: *gone", "t.yaml:1: found undefined alias 'gone'"),
        ("a: &a\n  b: *a", "t.yaml:1: an alias (*name) holds itself"),
        ("a: &a [*a]", "t.yaml:1: an alias (*name) holds itself"),
        ("a: 1\nb: !!python/name:os.system", "t.yaml:2: the tag"),
        ("a: !!timestamp 2024-01-01", "t.yaml:1: the tag"),
        ("a: !!int many", "t.yaml: not readable as YAML: invalid literal"),
        ("a: 1\n---\nb: 2", "t.yaml:2: but found another document"),
        ("a: \x01", "t.yaml: not readable as YAML: unacceptable character #x0001"),
        ("a: " + "[" * 1100, "t.yaml: nested too deeply"),
        ("", "t.yaml: the file is empty"),
        ("# nothing\n", "t.yaml: the file is empty"),
        ("- 1", "t.yaml: expected `key: value` lines at the top level"),
    ],
)
def test_a_bad_file_is_one_message_with_its_line(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml("t.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 6\)"):
        load_yaml(tmp_path / "latin.yaml")


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
    | st.sampled_from(["1e-5", "no", "010", "1_0", "~", "null", "12:30", "", "=", "<<", "0o7", "-"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1-", min_size=1), inner),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.dictionaries(st.text("abc_", min_size=1), values, min_size=1))
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "data.yaml"
    path.write_text(dump_yaml(data), "utf-8")
    again = load_yaml(path)
    assert again == data
    assert repr(again) == repr(data)  # types, the sign of zero and the order of keys too


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))
def test_text_stays_text_for_readers_of_yaml_1_1(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "data.yaml"
    path.write_text(dump_yaml({"key": text}), "utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"key": text}


def test_aliases_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="multiply to more than 100000 values"):
        parse_yaml("\n".join(lines), "x.yaml")
    merged = ["a0: &a0 {x: 1}"]
    merged += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="multiply"):
        parse_yaml("\n".join(merged), "x.yaml")
    chain = ["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))]
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_yaml("\n".join(chain), "x.yaml")
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "x") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_a_recipe_that_is_no_file_or_a_huge_one(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").write_text("a: 1\n" * 200_000)
    for name, message in (("pipe.yaml", "a pipe"), ("huge.yaml", "more than")):
        with pytest.raises(ConfigError, match=message):
            load_yaml(tmp_path / name)
    with pytest.raises(ConfigError, match="too long"):
        load_yaml("x" * 300)
