"""Write model directories with Hugging Face safetensors.

Only one layout is written, that of the released "-PT" checkpoints (see `layout.py`): one tensor
per expert and projection, Linear weights [out, in], router and router bias always float32, sharded
with an index.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import UserError
from ernie_train.io.files import GENERATION_CONFIG, FileDigest, write_directory, write_json
from ernie_train.io.safetensors import (
    TensorEntry,
    array_entries,
    from_bfloat16,
    parse_size,
    write_tensor_files,
)
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.dtypes import dtype_name
from ernie_train.model.lora import Adapter, merge_pair
from ernie_train.model.partial import adapter_of
from ernie_train.parallel import owned_names
from ernie_train.weights.hf import DTYPES, check_dtype
from ernie_train.weights.layout import TensorMapping, tensor_mappings
from ernie_train.weights.quantize import QUANTIZATION_KEY, Quantization, packed_entries


class SavesPretrained(Protocol):
    """Describe the attributes of a tokenizer that `save_pretrained` uses."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_token_ids(self) -> list[int]: ...
    def save_pretrained(self, directory: Path, /) -> Any: ...


def write_weights(
    model: Ernie4_5_MoeForCausalLM,
    directory: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    only: set[str] | None = None,
    quantization: Quantization | None = None,
    merge: bool = False,
    files_at_once: int = 1,
) -> dict[str, FileDigest]:
    """Write `model*.safetensors`, `config.json` and the `generation_config.json` that was read.

    Every rank must call it and writes the tensors that it owns. Needs memory for the model and one
    more parameter, to merge a pair for about three of it in float32; or for so many files, if
    `files_at_once` is more than one.

    Args:
        model: the model to write.
        directory: an existing directory.
        dtype: "float32", "bfloat16" or "float16"; None keeps the dtype of each parameter.
        max_shard_size: the size of a file, in bytes or as "5GB".
        only: names of the parameters to write; None writes all, and what the model carries.
        quantization: of this model, which is stored in place of the weights that it is of.
        merge: LoRA pairs of a model in training are added to the parameters beside them.
        files_at_once: files that are hashed and written at a time.

    Returns:
        The digests of this rank's files, by file name.

    Raises:
        ConfigError: `dtype` or `max_shard_size` is invalid.
        StorageError: the disk is full or the directory cannot be written.
    """
    digests: dict[str, FileDigest] = {}
    if only is None or only:
        entries = tensor_entries(model, dtype, only, quantization, merge=merge)
        digests = write_tensor_files(
            directory, "model", entries, max_shard_size, files_at_once=files_at_once
        )
    stored_as = dtype or dtype_name(model.model.embed_tokens.weight)
    with consensus.fail_together():
        if process_group.is_main():
            config = model.config.to_dict(torch_dtype=stored_as)
            if quantization is not None:
                config[QUANTIZATION_KEY] = quantization.scheme.to_config()
            write_json(directory / "config.json", config)
            if model.generation:
                write_json(directory / GENERATION_CONFIG, model.generation)
    return digests


def tensor_entries(
    model: Ernie4_5_MoeForCausalLM,
    dtype: str | None = None,
    only: set[str] | None = None,
    quantization: Quantization | None = None,
    *,
    merge: bool = False,
) -> list[TensorEntry]:
    """Return the tensors of a model that this rank writes, of all parameters or `only` some.

    Of all, rank 0 writes those that the model carries from the directory that was read too. Of a
    quantized weight these are its codes and scales. With `merge` LoRA pairs are added to the
    parameters beside them.

    Raises:
        ConfigError: `dtype` is unknown.
    """
    if dtype is not None:
        check_dtype(dtype)
    read = _CachedParameter(model, adapter_of(model) if merge else None)
    mine = owned_names(read.state)
    entries = []
    for mapping in tensor_mappings(model.config, experts=model.model.placement.experts):
        if mapping.parameter not in mine or (only is not None and mapping.parameter not in only):
            continue
        kept = dtype_name(read.state[mapping.parameter])
        stored = "F32" if mapping.keep_float32 else DTYPES[dtype or kept]
        shape = mapping.stored_shape
        entries.append(TensorEntry(mapping.stored, shape, stored, read.producer(mapping)))
    if quantization is not None:
        entries = list(packed_entries(entries, quantization.tensors))
    carried = model.carried if only is None and process_group.is_main() else {}
    return entries + array_entries(carried)


class _CachedParameter:
    """Copy parameters to numpy arrays and keep the last one, which several tensors share.

    Those with a pair of `adapter` are merged with it, in float32.
    """

    def __init__(self, model: Ernie4_5_MoeForCausalLM, adapter: Adapter | None) -> None:
        self.state, self.adapter = model.state_dict(), adapter
        self.name = ""
        self.array = np.empty(0)

    def producer(self, mapping: TensorMapping) -> Callable[[], np.ndarray]:
        def produce() -> np.ndarray:
            if self.name != mapping.parameter:
                self.name, self.array = mapping.parameter, self._read(mapping.parameter)
            return mapping.to_stored(self.array)

        return produce

    def _read(self, name: str) -> np.ndarray:
        array: np.ndarray = self.state[name].numpy()
        pair = None if self.adapter is None else self.adapter.pairs.get(name)
        if self.adapter is None or pair is None:
            return array
        wide, a, b = map(_as_float32, (array, pair.a.numpy(), pair.b.numpy()))
        magnitude = None if pair.lengths is None else pair.lengths.magnitude.numpy()
        return merge_pair(name, wide, a, b, magnitude, self.adapter.config.scale)


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Return an array as float32; uint16 holds the bits of bfloat16."""
    if array.dtype == np.uint16:
        return from_bfloat16(array)
    return array.astype(np.float32, copy=False)


def save_pretrained(
    model: Ernie4_5_MoeForCausalLM,
    path: str | Path,
    tokenizer: SavesPretrained | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    quantization: Quantization | None = None,
) -> None:
    """Write a directory that `transformers` loads: weights, configs and the tokenizer's files.

    The directory appears whole or not at all. An existing one is replaced if it is empty or was
    written by this function (it has our `MANIFEST.json`, which holds the weights' hashes). LoRA
    pairs of a model in training are merged, to the bits that its checkpoint reads as. Every rank
    must call it.

    Args:
        model: the model to write.
        path: the directory to create or replace.
        tokenizer: its files are written too; None writes none.
        dtype: "float32", "bfloat16" or "float16"; None keeps the dtype of each parameter.
        max_shard_size: the size of a file, in bytes or as "5GB".
        quantization: see `write_weights`.

    Raises:
        UserError: `path` exists and is anything else, or the tokenizer has more tokens than the
            model.
        ConfigError: `dtype` or `max_shard_size` is invalid.
        StorageError: the disk is full or read-only.
    """
    config = model.config
    parse_size(max_shard_size)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"vocab_size={config.vocab_size}"
        )

    def write(directory: Path) -> dict[str, FileDigest]:
        digests = write_weights(
            model, directory, dtype=dtype, max_shard_size=max_shard_size,
            quantization=quantization, merge=True,
        )  # fmt: skip
        with consensus.fail_together():
            if process_group.is_main():
                if tokenizer is not None:
                    tokenizer.save_pretrained(directory)
                generation = {**model.generation, **generation_config(config, tokenizer)}
                write_json(directory / GENERATION_CONFIG, generation)
        return digests

    # Only the weights are hashed: the other files are small texts that users may edit.
    write_directory(Path(path), write, manifest_all=False)


def generation_config(
    config: Ernie4_5_MoeConfig, tokenizer: SavesPretrained | None = None
) -> dict[str, Any]:
    """Return what generation_config.json says of tokens: the special ones and what ends a turn."""
    eos = tokenizer.stop_token_ids if tokenizer is not None else config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}
