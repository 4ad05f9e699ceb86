"""A user's own tokenizer: a byte-level BPE directory, read by PaddleNLP."""

import json
from pathlib import Path

import pytest

from ernie_train.core.errors import DataError
from ernie_train.data.chat import encode_chat, prompt_ids
from ernie_train.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def own_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("own")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the answer is 42", "hello user assistant"] * 50, trainer)
    model = json.loads(backend.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    size = len(model["vocab"])
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "additional_special_tokens": SPECIAL[1:],
        "added_tokens_decoder": {
            str(size + i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)
        },
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def own(own_dir: Path) -> Tokenizer:
    return load_tokenizer(own_dir)


def test_special_tokens_keep_the_newlines_around_them(own: Tokenizer) -> None:
    text = "hello \n<|im_start|>\n é漢😀  <think>\n<|im_end|>\n\n"
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert own.token_id("<|im_start|>") in ids and own.token_id("<think>") is None
    without = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert own.decode(ids, skip_special_tokens=True) == without
    assert max(ids) < own.vocab_size


def test_ids_are_those_of_the_tokenizers_library(own: Tokenizer, own_dir: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    files = str(own_dir / "vocab.json"), str(own_dir / "merges.txt")
    theirs = Backend(models.BPE.from_file(*files))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("the answer is", " hello assistant user", "é漢😀 x"):
        assert own.encode(text) == theirs.encode(text).ids


def test_offsets_take_time_linear_in_the_text(
    own: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    real = own._decode_rest  # type: ignore[attr-defined]

    def counted(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(real(ids))

    text = "one and two \u00e9\u4e2d\U0001f600 \ufffd make three\n" * 6
    monkeypatch.setattr(own, "_decode_rest", counted)
    ids, offsets = own.encode_with_offsets(text)
    so_far = [min(len(real(ids[: n + 1])), len(text)) for n in range(len(ids))]
    assert [end for _, end in offsets] == so_far
    assert [begin for begin, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    assert len(ids) > 100
    assert decoded < 3 * len(ids)


def test_chat_works_and_lacking_tokens_are_named(own: Tokenizer) -> None:
    answer = {"role": "assistant", "content": "42", "reasoning": "7"}
    messages = [{"role": "user", "content": "hello"}, answer]
    prompt = prompt_ids(own, messages[:1])
    ids, trainable = encode_chat(own, messages)
    assert ids[: len(prompt)] == prompt and trainable.index(True) == len(prompt)
    assert own.stop_token_ids == [own.token_id("<|im_end|>"), own.token_id("<|endoftext|>")]
    with pytest.raises(DataError, match=r"no token <\|begin_of_sentence\|>"):
        load_tokenizer(own.directory, template="ernie_plain")
    text = prompt_ids(own, [{"role": "user", "content": "<|endoftext|>"}])
    assert own.token_id("<|endoftext|>") not in text and "<|endoftext|>" in own.decode(text)


def test_saving_copies_the_files(own: Tokenizer, own_dir: Path, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (own_dir / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer" and "<think>" in config["chat_template"]
    assert load_tokenizer(tmp_path).fingerprint() == own.fingerprint()
    config["eos_token"] = SPECIAL[2]  # it ends every text of pre-training
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).fingerprint() != own.fingerprint()


def test_refusals(own: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        own.encode("a\ud800")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(DataError, match="PaddleNLP cannot load") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
