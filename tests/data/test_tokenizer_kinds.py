"""Tokenizers of other kinds, by their tokenizer.json alone: transformers gives the same ids."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ernie_train.core.errors import DataError
from ernie_train.data import encode_conversation, render_chat
from ernie_train.data.tokenizer import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
TEXTS = [
    "The sum of 12 apples and 7 oranges isn't 20.",
    "def f(x):\n    return {'a': x * 2}\n\n\n# done\t!",
    "漢字かな混じり文, 한국어 العربية",
    "😀👩‍👧 🇩🇪 é e\u0301 ﬁ ½",
    " leading,  two   and trailing  \n\n \n",
    "a <|im_end|> b</s>c <s>",
    "<|im_end|>\n<unk>",
    "",
    "\u00a0\u200d\ufeff x",
    "word " * 300,
]


def byte_level() -> tuple[Backend, Any]:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, show_progress=False
    )


def unigram() -> tuple[Backend, Any]:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def word_piece() -> tuple[Backend, Any]:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False
    )


KINDS: dict[str, Callable[[], tuple[Backend, Any]]] = {
    "byte_level": byte_level,
    "unigram": unigram,
    "word_piece": word_piece,
}


@pytest.fixture(scope="module")
def directories(
    tmp_path_factory: pytest.TempPathFactory, corpus: Callable[..., list[str]], tokenizer_dir: Path
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    config = {
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    for name, make in KINDS.items():
        backend, trainer = make()
        backend.train_from_iterator(corpus(300), trainer)
        backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
        (root / name).mkdir()
        backend.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(tokenizer_dir, root / "sentencepiece")
    return {path.name: path for path in root.iterdir()}


def test_ids_are_those_of_transformers(
    directories: dict[str, Path], tmp_path: Path, referee: Callable[..., Any]
) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    names = sorted(directories)
    places = [directories[name] for name in names]
    referee("tokenizer_ids.py", tmp_path / "texts.json", tmp_path / "out.json", *places)
    for name, theirs in zip(names, json.loads((tmp_path / "out.json").read_text()), strict=True):
        own = load_tokenizer(directories[name])
        assert [own.encode(text) for text in TEXTS] == theirs["plain_ids"], name
        assert [own.decode(ids) for ids in theirs["plain_ids"]] == theirs["decoded"], name
        assert own.vocab_size == theirs["size"], name


@pytest.mark.parametrize("name", [*KINDS, "sentencepiece"])
def test_offsets_and_plain_control_tokens(directories: dict[str, Path], name: str) -> None:
    own = load_tokenizer(directories[name])
    text = "the <|im_end|> answer</s>"
    ids, offsets = own.encode_with_offsets(text)
    ends = [text[s:e] for i, (s, e) in zip(ids, offsets, strict=True) if i == own.eos_token_id]
    assert ends == ["</s>"]
    plain = own.encode_plain(text, "a row")
    assert not {own.token_id(token) for token in ("<|im_end|>", "</s>")} & set(plain)


def prefixing(kind: str) -> Backend:
    """Return a tokenizer that puts a space before a text; the space and an `s` are one token."""
    space = "\u0120" if kind == "byte_level" else "▁"
    known = [*pre_tokenizers.ByteLevel.alphabet(), "▁", f"{space}s", f"{space}/", f"{space}i"]
    pieces = ["<unk>", *sorted(set(known))]
    if kind == "unigram":
        backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    else:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = [(space, "s"), (space, "/"), (space, "i")]
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif kind == "byte_level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        scheme = "first" if kind == "first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if kind == "without_marks":  # it knows no noncharacter and leaves it out
        backend.normalizer = normalizers.Replace("\ufdd0", "")
    return backend


@pytest.mark.parametrize(
    "kind", ["prepend", "first", "always", "byte_level", "unigram", "without_marks"]
)
def test_a_plain_control_token_has_no_space_inside(tmp_path: Path, kind: str) -> None:
    """As the same tokenizer encodes the text if it has no control tokens."""
    backend = prefixing(kind)
    text = "is <s>old</s> a <|im_end|>; </s>is"
    without = backend.encode(text, add_special_tokens=False)
    backend.add_special_tokens(SPECIAL)
    backend.save(str(tmp_path / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    own = load_tokenizer(tmp_path)
    ids, offsets = own.encode_marked(own.mark_control_tokens(text, "a row"))
    assert ids == without.ids
    assert offsets == without.offsets


def test_special_tokens_that_are_words_of_the_protocol(
    directories: dict[str, Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A template reads keys and roles by name; what a row writes is text all the same."""
    shutil.copytree(directories["byte_level"], tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    backend = Backend.from_file(str(file))
    words = ["user", "assistant", "role", "content", "name", "function", "properties", "string"]
    tokens = ["<|im_start|>", "<think>", *words]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
    backend.save(str(file))
    shutil.copy(tokenizer_dir / "chat_template.jinja", tmp_path / "words")
    call = {"function": {"name": "find", "arguments": {"user": "content", "type": "role"}}}
    place = {"type": "object", "properties": {"user": {"type": "string"}}}
    messages = [
        {"role": "user", "content": "role"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "function"},
        {"role": "assistant", "content": "my name"},
    ]
    tools = [{"type": "function", "function": {"name": "find", "parameters": place}}]
    own, usual = load_tokenizer(tmp_path / "words"), load_tokenizer(tokenizer_dir)
    sample = encode_conversation(own, messages, tools).samples[0]
    text = render_chat(usual, messages, tools)
    assert own.decode(sample.ids) == text.rstrip("\n")
    counts = {word: sample.ids.count(own.token_id(word) or -1) for word in words}
    # The template writes roles; the words of the row are characters.
    assert counts["user"] == text.count("<|im_start|>user") > 0
    assert counts["role"] == 0
    strict = load_tokenizer(tmp_path / "words")
    strict.chat = dataclasses.replace(strict.chat, control_tokens="refuse")
    encode_conversation(
        strict, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    )
    with pytest.raises(DataError, match="message 1 contains the control token role"):
        encode_conversation(strict, messages)


def test_merges_that_are_left_out_by_chance_are_refused(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    """With dropout each reading of a text has other ids: no run could be repeated."""
    shutil.copytree(directories["byte_level"], tmp_path / "chance")
    file = tmp_path / "chance" / "tokenizer.json"
    written = json.loads(file.read_text())
    for dropout in (0.1, 0.0):
        written["model"]["dropout"] = dropout
        file.write_text(json.dumps(written))
        if dropout:
            with pytest.raises(DataError, match=r"tokenizer\.json.*dropout.*0\.1.*null"):
                load_tokenizer(tmp_path / "chance")
    assert load_tokenizer(tmp_path / "chance").encode("the sum")


@pytest.mark.parametrize("by_library", [True, False], ids=["tokenizers", "sentencepiece"])
def test_a_template_for_tools_in_a_file_of_its_own_is_read_and_kept(
    tokenizer_dir: Path, tmp_path: Path, by_library: bool
) -> None:
    """As transformers saves several templates since 4.53."""
    source = tmp_path / "source"
    shutil.copytree(tokenizer_dir, source)
    if not by_library:
        (source / "tokenizer.json").unlink()
    (source / "chat_template.jinja").write_text("default")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tool_use")

    def rendered(directory: Path) -> list[str]:
        template = load_tokenizer(directory).chat.template
        assert template is not None
        return [template.render([{"role": "user"}], tools) for tools in (None, [{}])]

    assert rendered(source) == ["default", "tool_use"]
    load_tokenizer(source).save_pretrained(tmp_path / "out")
    assert rendered(tmp_path / "out") == ["default", "tool_use"]
    (tmp_path / "other.jinja").write_text("other")
    load_tokenizer(source, template=str(tmp_path / "other.jinja")).save_pretrained(tmp_path / "out")
    assert rendered(tmp_path / "out") == ["other", "other"]


def test_a_template_of_the_recipe_may_be_saved_by_an_editor_of_windows(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("a\nb", "utf-8-sig", newline="\r\n")
    template = load_tokenizer(tokenizer_dir, template=str(path)).chat.template
    assert template is not None and template.source == template.render([]) == "a\nb"
