"""Tokenizers of imported models: from GGUF files, damaged ones, and those carried as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ernie_train.core.errors import DataError
from ernie_train.run.import_model import import_model
from ernie_train.weights.hf import load_config
from tests.small_llama import TOKENIZER, pieces, write_directory, write_gguf


@pytest.mark.parametrize(
    ("pre", "twelve"), [("smollm", ["1", "2"]), ("gpt-2", ["12"]), ("llama-bpe", ["12"]),
                        ("qwen2", ["1", "2"])],
)  # fmt: skip
def test_the_tokenizer_of_a_gguf_file(tmp_path: Path, pre: str, twelve: list[str]) -> None:
    metadata = {**TOKENIZER, "tokenizer.ggml.pre": pre}
    write_gguf(tmp_path / "m.gguf", metadata=metadata, vocab_size=256)
    out = tmp_path / "out"
    import_model(tmp_path / "m.gguf", out)
    assert pieces(out, "<|im_start|>ab a12\n") == ["<|im_start|>", "ab", "Ġa", *twelve, "Ċ"]
    written = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert written.decode(written.encode("ab é12 a").ids) == "ab é12 a"
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (out / "chat_template.jinja").read_text() == TOKENIZER["tokenizer.chat_template"]
    assert load_config(out).eos_token_id == 2


def test_a_sentencepiece_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)),
              "▁", "a", "b", "ab", "▁ab"]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-3.0, -4.0, -5.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    write_gguf(tmp_path / "m.gguf", metadata=metadata, vocab_size=264)
    import_model(tmp_path / "m.gguf", tmp_path / "out")
    assert pieces(tmp_path / "out", "ab abé") == ["<s>", "ab", "▁ab", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "made-up"}, "pre-tokenizer 'made-up'"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is none of gpt2, llama"),
        ({"tokenizer.ggml.eos_token_id": 4000}, "eos token 4000"),
        ({"tokenizer.ggml.token_type": [1]}, "contradicts itself"),
        ({"tokenizer.ggml.merges": ["Ġ zzz"]}, "is damaged"),
    ],
)
def test_damaged_tokenizers(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={**TOKENIZER, **change}, vocab_size=5000)
    with pytest.raises(DataError, match=message):
        import_model(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata=TOKENIZER, vocab_size=96)
    with pytest.raises(DataError, match=r"the id 195, the model only vocab_size=96"):
        import_model(tmp_path / "m.gguf", tmp_path / "out")


def test_files_of_a_directory_are_carried_as_they_are(tmp_path: Path) -> None:
    write_directory(tmp_path / "llama")
    files = {
        "chat_template.jinja": "{{ 1 }}\n",
        "additional_chat_templates/tool_use.jinja": "{{ 2 }}\n",
        "tokenizer_config.json": '{"x": 1}',
        "LICENSE": "free",
        "generation_config.json": '{"top_p": 0.9}',
    }
    (tmp_path / "llama/additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / "llama" / name).write_text(text)
    import_model(tmp_path / "llama", tmp_path / "out")
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()
