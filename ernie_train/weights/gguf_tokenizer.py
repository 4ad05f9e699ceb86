"""Write the tokenizer and the chat template of a GGUF file as Hugging Face's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (  # type: ignore[import-untyped]
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ernie_train.core.errors import DataError, describe
from ernie_train.data.tokenizer import bpe_merges
from ernie_train.io.files import write_json, write_text

_log = logging.getLogger(__name__)
# Kinds of tokens, numbered as in SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# Names of pre-tokenizers (llama.cpp's) by what they do before the bytes are merged.
_SPLIT_AS_GPT2 = {"default", "gpt-2", "gpt2", "mpt", "olmo", "jais"}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_BY = {
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _WORDS % ""),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _WORDS % "{1,3}"),
}
# The type of a key's value; of a list, that of its items too.
_TYPES: dict[str, tuple[type, ...]] = {
    "chat_template": (str,), "ggml.model": (str,), "ggml.pre": (str,), "ggml.tokens": (list, str),
    "ggml.token_type": (list, int), "ggml.merges": (list, str), "ggml.scores": (list, float),
    "ggml.add_bos_token": (bool,), "ggml.add_space_prefix": (bool,), "ggml.bos_token_id": (int,),
    "ggml.eos_token_id": (int,), "ggml.unknown_token_id": (int,), "ggml.padding_token_id": (int,),
}  # fmt: skip
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def write_gguf_tokenizer(metadata: Mapping[str, Any], directory: Path, source: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory`.

    Nothing is written if the file holds no tokenizer. `source` names the file in errors.

    Raises:
        DataError: the tokenizer is damaged or of a kind that cannot be written.
    """
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    _check_types(metadata, source)
    tokens: list[str] = own.get("tokens") or []
    if not tokens:
        _log.warning("%s holds no tokenizer: put its files into the directory yourself", source)
        return
    types = own.get("token_type") or [_NORMAL] * len(tokens)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = own.get("model")
    if kind not in builders:
        raise DataError(f"{source}: tokenizer.ggml.model {kind!r} is none of {', '.join(builders)}")
    roles = {name: own.get(f"{role}_token_id") for role, name in _ROLES.items()}
    wrong = {n: i for n, i in roles.items() if i is not None and not 0 <= i < len(tokens)}
    if len(types) != len(tokens) or wrong:
        raise DataError(
            f"{source}: the tokenizer contradicts itself: {len(tokens)} tokens, {len(types)} types"
            + "".join(f", {name} token {i}" for name, i in wrong.items())
        )
    named = {f"{name}_token": tokens[i] for name, i in roles.items() if i is not None}
    try:
        tokenizer = builders[kind](own, tokens, types, named.get("unk_token"))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{source}: the tokenizer is damaged: {error}") from None
    for text, token_type in zip(tokens, types, strict=True):
        if token_type in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    if own.get("add_bos_token", kind == "llama") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, roles["bos"])],
        )  # fmt: skip
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], **named,
    }  # fmt: skip
    template = metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
        write_text(directory / "chat_template.jinja", template)
    write_json(directory / "tokenizer_config.json", config)


def _check_types(metadata: Mapping[str, Any], source: str) -> None:
    """Raise `DataError` that names a key of which the value has another type."""
    for key, (kind, *items) in _TYPES.items():
        value = metadata.get(f"tokenizer.{key}")
        if value is None:
            continue
        within = {type(item) for item in value} if isinstance(value, list) else set()
        if type(value) is not kind or within - {*items}:
            wanted = " of ".join(t.__name__ for t in (kind, *items))
            raise DataError(f"{source}: tokenizer.{key} must be a {wanted}, got {describe(value)}")


def _byte_level(
    own: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str | None
) -> Any:
    """Return a byte-level BPE tokenizer, split into words as `tokenizer.ggml.pre` says."""
    name = own.get("pre", "default")
    merges = [tuple(pair.split(" ", 1)) for pair in own.get("merges") or []]
    vocabulary = {text: token_id for token_id, text in enumerate(tokens)}
    # Llama 3's merges do not reach every token of its vocabulary.
    whole = name in _SPLIT_BY and _SPLIT_BY[name] == _WORDS % "{1,3}"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    if name in _SPLIT_BY:
        split = pre_tokenizers.Split(Regex(_SPLIT_BY[name]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif name in _SPLIT_AS_GPT2 | _SINGLE_DIGITS:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name in _SINGLE_DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise DataError(
            f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is unknown: import the model's "
            "Hugging Face directory, or one with its tokenizer.json"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    own: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str | None
) -> Any:
    """Return a BPE tokenizer with SentencePiece's spaces; merges follow from the scores."""
    scores = own.get("scores") or []
    if len(scores) != len(tokens):
        raise DataError(f"{len(tokens)} tokens have {len(scores)} scores")
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    normal = {text: i for text, i in ids.items() if types[i] == _NORMAL}
    model = models.BPE(
        vocab=ids, merges=bpe_merges(normal, scores), unk_token=unknown,
        fuse_unk=True, byte_fallback=_BYTE in types,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    prefix = own.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer
