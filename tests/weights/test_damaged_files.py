"""Files of other programs with a value that does not belong there: read, or told in one message."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import UserError
from ernie_train.data import load_tokenizer
from ernie_train.model.foreign_keys import _SAME_AS, _UNSUPPORTED
from ernie_train.weights.adapters import find_base
from ernie_train.weights.gguf_tokenizer import write_gguf_tokenizer
from ernie_train.weights.hf import load_config
from ernie_train.weights.llama import open_source
from ernie_train.weights.peft_config import _PLAIN, read_settings
from ernie_train.weights.quantize import QuantizationScheme
from tests import small_llama
from tests.workspace import make_workspace, save_model

ODD = (None, "x", -1, 0, [], {}, float("inf"), float("nan"), "y" * 10**6, 1.5, True, 10**309, "1",
       [1], [[]], {"a": []})  # fmt: skip
Read = Callable[[], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    make_workspace(root)
    return save_model(root)


def places(values: Any, *above: Any) -> Iterator[tuple[Any, ...]]:
    """Every place in nested values; of a list and of a table of ids the first alone."""
    keys = range(len(values[:1])) if isinstance(values, list) else list(values)
    for key in keys[:1] if above else keys:
        yield (*above, key)
        if isinstance(values[key], dict | list):
            yield from places(values[key], *above, key)


def with_value(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = at = copy.deepcopy(values)
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return changed


def told(read: Read, file: Path) -> bool:
    """Whether a file is refused by a message that names it; anything but a message is raised."""
    try:
        read()
    except UserError as error:
        assert str(file.parent) in str(error)
        return True
    return False


def refused(file: Path, read: Read, more: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """Try odd values at each key of a JSON file, and of `more`; return what was refused."""
    text = file.read_text()
    good = json.loads(text)
    found = set()
    for place in [*places(good), *((key,) for key in more)]:
        for value in ODD:
            odd = json.dumps(with_value(good, place, value)).replace("Infinity", "1e400")
            file.write_text(odd)
            if told(read, file):
                found.add((".".join(map(str, place)), repr(value)[:9]))
    for cut in (0, 1, len(text) // 2, len(text) - 2):
        file.write_text(text[:cut])
        assert told(read, file), f"cut off behind {cut} characters"
    file.write_text(text)
    read()
    return found


def test_a_config_of_ernie(model: Path) -> None:
    keys = (*_UNSUPPORTED, *_SAME_AS, "layer_types", "rope_scaling")
    found = refused(model / "config.json", lambda: load_config(model), keys)
    assert {("model_type", "[]"), ("rope_theta", "1" + "0" * 8)} <= found
    assert {("hidden_size", "'1'"), ("layer_types", "-1"), ("layer_types", "1.5")} <= found


def test_a_config_of_quantized_weights(tmp_path: Path) -> None:
    file, scheme = tmp_path / "config.json", QuantizationScheme(4, 32)
    for key, value in ((key, value) for key in ("num_bits", "group_size") for value in ODD):
        odd = with_value(scheme.to_config(), ("config_groups", "group_0", "weights", key), value)
        was_told = told(partial(QuantizationScheme.from_config, odd, str(file)), file)
        assert was_told or value == 10**309, (key, value)  # a size that no weight has


def test_a_config_of_llama(tmp_path: Path) -> None:
    small_llama.write_directory(tmp_path / "llama")
    found = refused(tmp_path / "llama/config.json", lambda: open_source(tmp_path / "llama"))
    assert {("model_type", "{}"), ("rope_theta", "inf"), ("num_attention_heads", "0")} <= found


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_files_of_a_tokenizer(model: Path, kind: str) -> None:
    directory = model.parent / "tokenizer"
    aside = (directory / "tokenizer.json").rename(model.parent / "aside.json")
    if kind == "tokenizer.json":
        aside.rename(directory / kind)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2]}')
    (directory / "added_tokens.json").write_text("{}")

    def read() -> None:
        load_tokenizer(directory).encode("2 + 2")

    found = refused(directory / "tokenizer_config.json", read)
    assert {(f"{role}_token", "[1]") for role in ("bos", "eos", "pad")} <= found
    assert ("eos_token_id", "'x'") in refused(directory / "generation_config.json", read)
    assert ("<new>", "-1") in refused(directory / "added_tokens.json", read, ("<new>",))
    if aside.exists():
        aside.rename(directory / "tokenizer.json")


def test_settings_of_an_adapter(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    plain = {"r": 2, "lora_alpha": 4, "use_rslora": False, "use_dora": False}
    file.write_text(json.dumps({**_PLAIN, **plain, "base_model_name_or_path": "."}))
    found = refused(file, lambda: read_settings(file), ("init_lora_weights",))
    assert {("lora_alpha", odd) for odd in ("inf", "nan", "True", "1" + "0" * 8)} <= found
    assert {("use_rslora", "'x'"), ("use_dora", "[1]"), ("rank_pattern", "1.5")} <= found
    for base in (str(tmp_path), "y" * 10**6, 1):
        file.write_text(json.dumps({"base_model_name_or_path": base}))
        assert told(lambda: find_base(tmp_path), file)


def test_keys_of_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    good = {"split.count": 1, "tokenizer.ggml.unknown_token_id": 0, **small_llama.TOKENIZER}
    good |= {f"llama.{key}": 8 for key in ("attention.key_length", "attention.value_length")}
    own = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv",
           "rope.freq_base", "attention.layer_norm_rms_epsilon")  # fmt: skip

    def read() -> None:
        write_gguf_tokenizer(open_source(file).tensors.metadata, tmp_path, str(file))

    accepted: dict[str, list[Any]] = {}
    for key in (*good, *(f"llama.{name}" for name in own)):
        for value in ("x", 0, 1, 1.5, True, [1], ["a"], float("inf"), float("nan"), "y" * 10**6):
            small_llama.write_gguf(file, metadata={**good, key: value})
            if not told(read, file):
                accepted.setdefault(key, []).append(value)
    assert {type(value) for value in accepted["tokenizer.chat_template"]} == {str}
    assert accepted["tokenizer.ggml.unknown_token_id"] == [0, 1]
    assert accepted["split.count"] == [0, 1, True]
    assert accepted["llama.rope.freq_base"] == [1.5]
