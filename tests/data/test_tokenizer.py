"""Our tokenizer beside transformers (two versions), and everything that may be wrong with one."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import DataError
from ernie_train.data.chat_template import CONTROL_TOKENS, MARKUP_TOKENS
from ernie_train.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

Referee = Callable[..., Any]
Corpus = Callable[..., list[str]]
VOCABULARY = "the answer sum Liar knight true return energy response name def think"
WORDS = VOCABULARY.split()

FRAGMENTS = [
    *CONTROL_TOKENS,
    *MARKUP_TOKENS,
    "<s>", "</s>", "<unk>", "<0x41>", "<pad>", "<|im_sta", "rt|>", "<", "|", ">", "<<think>>",
    "\n", "\n\n", "\r\n", "\t", " ", "  ", "        ", "\u00a0", "\u2581", "\u200d", "\u3000",
    "0", "7", "12", "3.14", "1e-5", "٣", "½", "é", "e\u0301", "ß", "İ", "漢字", "한글", "😀",
    "👩‍👧", "\U0001f1e9\U0001f1ea", "ﬁ", "\ufeff", "\u0000", "\x7f", "Ω", "…", "»", "العربية",
]  # fmt: skip


def random_texts(count: int, seed: int, corpus: Corpus) -> list[str]:
    rng = random.Random(seed)
    texts = ["", " ", "\n", *FRAGMENTS, *corpus(50, seed)]
    while len(texts) < count:
        pick = rng.random()
        if pick < 0.6:
            parts = rng.choices(
                [*FRAGMENTS, *WORDS, *(w.upper() for w in WORDS)], k=rng.randint(1, 25)
            )
            texts.append("".join(p + rng.choice(["", "", " ", "\n"]) for p in parts))
        elif pick < 0.8:
            texts.append("".join(rng.choices("ab 01\n<>|/_{}\"':,.te", k=rng.randint(1, 80))))
        else:
            points = (rng.randint(1, 0x2FFF) for _ in range(rng.randint(1, 30)))
            texts.append("".join(chr(p) for p in points))
    return texts


@pytest.mark.parametrize("transformers", ["newest", "4.57"])
def test_transformers_gives_the_same_ids(
    tokenizer: Tokenizer, tmp_path: Path, referee: Referee, corpus: Corpus, transformers: str
) -> None:
    alone, beside_weights = tmp_path / "alone", tmp_path / "beside_weights"
    tokenizer.save_pretrained(alone)
    tokenizer.save_pretrained(beside_weights)
    config = {"model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"]}
    (beside_weights / "config.json").write_text(json.dumps(config))
    texts = random_texts(2500, 11, corpus)
    texts_path, out = tmp_path / "texts.json", tmp_path / "out.json"
    texts_path.write_text(json.dumps(texts))
    referee("tokenizer_ids.py", texts_path, out, alone, beside_weights, transformers=transformers)
    ours = [tokenizer.encode(text) for text in texts]
    for theirs in json.loads(out.read_text()):
        differing = [
            case for case in zip(texts, ours, theirs["ids"], strict=True) if case[1] != case[2]
        ]
        assert differing[:3] == []
        assert theirs["plain_ids"] == ours
        assert [tokenizer.decode(ids) for ids in ours] == theirs["decoded"]
        skipped = [tokenizer.decode(ids, skip_special_tokens=True) for ids in ours]
        assert skipped == theirs["decoded_skip"]
        assert theirs["special"] == {"pad": 0, "unk": 0, "bos": 1, "eos": 2}
        assert theirs["size"] == tokenizer.vocab_size


def test_special_ids_are_those_of_ernie(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.stop_token_ids == [
        tokenizer.token_id("<|im_end|>"),
        2,
        tokenizer.token_id("<|end_of_sentence|>"),
    ]
    for piece in (*CONTROL_TOKENS, *MARKUP_TOKENS, "\n"):
        assert tokenizer.encode(piece) == [tokenizer.token_id(piece)]
    assert tokenizer.token_id("no such piece") is None
    assert tokenizer.control_tokens == {*CONTROL_TOKENS, "<s>", "</s>", "<unk>"}
    assert tokenizer.control_pattern.search("a <|im_end|>") and not (
        tokenizer.control_pattern.search("<think>im_end")
    )


def test_the_model_file_alone_gives_the_same_ids(
    tokenizer: Tokenizer, bare: Tokenizer, corpus: Corpus
) -> None:
    assert isinstance(bare, SentencePieceTokenizer)
    assert not isinstance(tokenizer, SentencePieceTokenizer)
    for text in random_texts(600, 4, corpus):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert bare.encode_with_offsets(text) == (ids, offsets)
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
        if text.isascii():
            assert "".join(text[start:end] for start, end in offsets) == text


@pytest.mark.parametrize("kind", ["tokenizer", "bare"])
def test_control_tokens_as_text_are_no_tokens(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "<s>old</s> <|im_end|>\n<think>"
    ids = tokenizer.encode_plain(text, "a row")
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.token_id(t) for t in tokenizer.control_tokens} & set(ids)
    assert ids[-2:] == tokenizer.encode("\n<think>")
    assert tokenizer.encode_plain("a <think> b", "a row") == tokenizer.encode("a <think> b")


@pytest.mark.parametrize("kind", ["tokenizer", "bare"])
def test_ids_beyond_the_vocabulary_show_as_unknown(
    request: pytest.FixtureRequest, kind: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("the sum")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, *ids, 10**6]) == "the sum\ufffd" * 2


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("90210")] == list("90210")


@given(st.text(), st.text(), st.sampled_from(["\n", "<think>", "<|im_end|>", "</s>"]))
def test_no_token_crosses_a_boundary_token(
    tokenizer: Tokenizer, left: str, right: str, boundary: str
) -> None:
    try:
        both = tokenizer.encode(left + boundary + right)
        apart = tokenizer.encode(left + boundary) + tokenizer.encode(right)
    except DataError:
        return  # a lone surrogate
    assert both == apart


def test_a_lone_surrogate_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_training_is_deterministic(corpus: Corpus, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        train_tokenizer(iter(corpus(200)), 400, tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert digests[0] == digests[1]
    assert (
        load_tokenizer(tmp_path / "a").fingerprint() == load_tokenizer(tmp_path / "b").fingerprint()
    )


def test_training_again_replaces_every_file(corpus: Corpus, tmp_path: Path) -> None:
    train_tokenizer(corpus(200), 400, tmp_path)
    old = load_tokenizer(tmp_path)
    train_tokenizer(corpus(200), 420, tmp_path)
    new = load_tokenizer(tmp_path)
    assert (old.vocab_size, new.vocab_size) == (400, 420)
    assert old.fingerprint() != new.fingerprint()
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocabulary) == 420


@pytest.mark.parametrize("vocab_size", [20, 50_000])
def test_an_impossible_vocabulary_is_a_data_error(
    corpus: Corpus, tmp_path: Path, vocab_size: int
) -> None:
    with pytest.raises(DataError, match=f"tokenizer of {vocab_size} pieces"):
        train_tokenizer(corpus(20), vocab_size, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_writes_the_template_in_use(
    tokenizer: Tokenizer, plain: Tokenizer, tmp_path: Path
) -> None:
    for saved, thinks in ((tokenizer, True), (plain, False)):
        saved.save_pretrained(tmp_path)
        template = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
        assert template == (tmp_path / "chat_template.jinja").read_text()
        again = load_tokenizer(tmp_path).chat.template
        assert again is not None and again.source == template and again.opens_thinking == thinks


def test_saving_copies_a_users_files_and_drops_stale_ones(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tokenizer_dir, source)
    own = (source / "tokenizer.json").read_text() + "\n\n"
    (source / "tokenizer.json").write_text(own)
    out.mkdir()
    (out / "vocab.txt").write_text("stale")
    load_tokenizer(source).save_pretrained(out)
    assert (out / "tokenizer.json").read_text() == own
    assert not (out / "vocab.txt").exists()
    assert load_tokenizer(out).fingerprint() == load_tokenizer(source).fingerprint()


def test_a_class_in_code_of_its_own_is_not_asked_for(tokenizer_dir: Path, tmp_path: Path) -> None:
    """As ERNIE 4.5's first releases name it: the file of code is not saved."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tokenizer_dir, source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Ernie4_5_Tokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(config | own))
    load_tokenizer(source).save_pretrained(out)
    saved = json.loads((out / "tokenizer_config.json").read_text())
    assert saved == config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_added_tokens_beside_the_model_are_used(tokenizer_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.model", source)
    (source / "added_tokens.json").write_text(json.dumps({"<|extra|>": 600}))
    tokenizer = load_tokenizer(source)
    text = "a <|extra|>\n<|im_end|> b"
    assert tokenizer.vocab_size == 601 and tokenizer.token_id("<|extra|>") == 600
    assert 600 in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    (source / "added_tokens.json").unlink()
    assert tokenizer.fingerprint() != load_tokenizer(source).fingerprint()
    tokenizer.save_pretrained(out)
    assert Backend.from_file(str(out / "tokenizer.json")).encode(text).ids == tokenizer.encode(text)
    (source / "added_tokens.json").write_text(json.dumps({"<|extra|>": 605}))
    with pytest.raises(DataError, match="leave a gap"):
        load_tokenizer(source).save_pretrained(out)


def test_what_files_beside_the_model_say_is_saved(
    tokenizer: Tokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tokenizer_dir, source)
    (source / "tokenizer.json").unlink()
    own = {
        "eos_token": "<|im_end|>", "pad_token": "</s>", "padding_side": "left",
        "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]},
        "added_tokens_decoder": {
            str(tokenizer.vocab_size): {"content": "<cite>", "special": True},
            str(tokenizer.vocab_size + 1): {"content": "<plain>", "special": False},
        },
    }  # fmt: skip
    (source / "tokenizer_config.json").write_text(json.dumps(own))
    before = load_tokenizer(source)
    before.save_pretrained(out)
    after = load_tokenizer(out)
    assert type(after) is not type(before)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "control_tokens"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.encode("a<cite>b<plain></s>") == before.encode("a<cite>b<plain></s>")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["padding_side"] == "left" and "auto_map" not in config


def test_a_bare_model_gets_its_files(
    tokenizer: Tokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.model", bare)
    loaded = load_tokenizer(bare)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.encode("<think>\n a</s>") == tokenizer.encode("<think>\n a</s>")
    loaded.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == (tokenizer_dir / name).read_text()


def _make_missing(path: Path) -> None:
    shutil.rmtree(path)


def _make_empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def _truncate(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    model = path / "tokenizer.model"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])


def _garbage(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(b"\xff" * 1000)


def _bad_config(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("{")


def _dummy_prefix(path: Path) -> None:
    model = path / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\x1a\x02\x18\x01")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


def _cut_json(path: Path) -> None:
    json_file = path / "tokenizer.json"
    json_file.write_text(json_file.read_text()[:1000])


def _no_eos(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("{}")
    (path / "special_tokens_map.json").write_text("{}")


def _foreign_eos(path: Path) -> None:
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|done|>"}')


def _shifted_token(path: Path) -> None:
    (path / "added_tokens.json").write_text('{"a": 99}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_make_missing, "does not exist"),
        (_make_empty, "holds no tokenizer"),
        (_truncate, "not a SentencePiece model"),
        (_garbage, "not a SentencePiece model"),
        (_bad_config, "not valid JSON"),
        (_dummy_prefix, "space in front"),
        (_cut_json, "is not a tokenizer"),
        (_no_eos, "names no eos_token"),
        (_foreign_eos, "not in the vocabulary"),
        (_shifted_token, "the id 99"),
    ],
)
def test_a_broken_directory_is_a_data_error(
    tokenizer_dir: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    directory = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, directory)
    spoil(directory)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("by_library", [True, False], ids=["tokenizers", "sentencepiece"])
def test_a_special_flag_changes_the_fingerprint(
    tokenizer: Tokenizer, tmp_path: Path, by_library: bool
) -> None:
    """Whether a text of the data becomes the token or plain characters depends on it."""
    found = []
    for special in (False, True):
        path = tmp_path / str(special)
        shutil.copytree(tokenizer.directory, path)
        config = json.loads((path / "tokenizer_config.json").read_text())
        token = {"content": "<cite>", "special": special}
        config.setdefault("added_tokens_decoder", {})[str(tokenizer.vocab_size)] = token
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        if not by_library:
            (path / "tokenizer.json").unlink()
        found.append(load_tokenizer(path))
    assert [("<cite>" in one.control_tokens) for one in found] == [False, True]
    assert found[0].fingerprint() != found[1].fingerprint()
