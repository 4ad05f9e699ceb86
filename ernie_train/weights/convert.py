"""Write an imported model as an ERNIE 4.5 directory, one tensor at a time."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from ernie_train.core.errors import DataError, UserError
from ernie_train.io.files import (
    GENERATION_CONFIG,
    FileDigest,
    copy_file,
    write_directory,
    write_json,
    write_text,
)
from ernie_train.io.safetensors import TensorEntry, write_tensor_files
from ernie_train.weights.gguf_file import GgufFile
from ernie_train.weights.gguf_tokenizer import write_gguf_tokenizer
from ernie_train.weights.hf import DTYPES, check_dtype
from ernie_train.weights.layout import EMBED_TOKENS, tensor_mappings
from ernie_train.weights.llama import Source
from ernie_train.weights.saving import generation_config
from ernie_train.weights.upcycle import UpcycledSource

# Files of a tokenizer, its chat template and the conditions of use, copied as they are.
_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*", "vocab.json", "merges.txt", "vocab.txt",
    GENERATION_CONFIG, "LICENSE*", "NOTICE*",
)  # fmt: skip


def convert_model(
    source: Source | UpcycledSource,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    card: str = "",
) -> list[TensorEntry]:
    """Write the model, its tokenizer, chat template and `card` to the directory `out`.

    The directory appears whole or not at all. Needs memory for the largest tensor, twice.

    Args:
        source: the model to write.
        out: the directory to create, or to replace if this program wrote it.
        dtype: of the weights on disk; None keeps that of the source, of quantized ones float32.
        max_shard_size: the size of a file, in bytes or as "5GB".
        card: the text of README.md.

    Returns:
        The tensors that were written; each can be produced again.

    Raises:
        UserError: `out` is in use, or the tokenizer has ids that the model lacks.
        WeightsError: a tensor of the source is damaged.
    """
    entries = _entries(source, dtype)
    stored_as = {entry.name: entry.dtype for entry in entries}[EMBED_TOKENS]
    written = source.config.to_dict(next(n for n, v in DTYPES.items() if v == stored_as))
    dense = source.source if isinstance(source, UpcycledSource) else source
    if out.resolve() in (dense.path.resolve(), dense.path.resolve().parent):
        raise UserError(f"{out} is where the source lies: give another directory")

    def write(directory: Path) -> dict[str, FileDigest]:
        _write_tokenizer(dense, directory)
        digests = write_tensor_files(directory, "model", entries, max_shard_size)
        write_json(directory / "config.json", written)
        write_text(directory / "README.md", card)
        return digests

    write_directory(out, write, manifest_all=False)
    return entries


def _entries(source: Source | UpcycledSource, dtype: str | None) -> list[TensorEntry]:
    if dtype is not None:
        check_dtype(dtype)
    entries = []
    for mapping in tensor_mappings(source.config):
        name = mapping.stored
        dense = source if isinstance(source, Source) else source.source
        origin = name if isinstance(source, Source) else source.origin(name)
        kept = "F32" if origin is None else dense.dtypes[origin].replace("F64", "F32")
        stored = "F32" if mapping.keep_float32 else DTYPES[dtype] if dtype else kept
        entries.append(TensorEntry(name, mapping.stored_shape, stored, partial(source.read, name)))
    return entries


def _write_tokenizer(source: Source, directory: Path) -> None:
    if isinstance(source.tensors, GgufFile):
        write_gguf_tokenizer(source.tensors.metadata, directory, str(source.path))
    else:
        for pattern in _CARRIED:
            for file in sorted(source.path.glob(pattern)):
                if file.is_file():
                    copy_file(file, directory / file.relative_to(source.path))
    if not (directory / GENERATION_CONFIG).exists():
        write_json(directory / GENERATION_CONFIG, generation_config(source.config))
    largest = _largest_id(directory / "tokenizer.json")
    if largest >= source.config.vocab_size:
        raise DataError(
            f"{source.path}: the tokenizer has the id {largest}, the model only "
            f"vocab_size={source.config.vocab_size}: it is another model's"
        )


def _largest_id(file: Path) -> int:
    """Return the largest id in `tokenizer.json`; -1 without one."""
    if not file.exists():
        return -1
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        count = len(vocabulary) - 1  # Unigram lists its pieces
        ids = vocabulary.values() if isinstance(vocabulary, dict) else [count]
        return max([*map(int, ids), *(int(t["id"]) for t in content.get("added_tokens") or [])])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file.name} is damaged: {error}") from None
