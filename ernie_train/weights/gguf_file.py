"""Read a Llama model from a GGUF file: its configuration and tensors in Hugging Face's terms.

llama.cpp's converter stores the rows of q and k in interleaved order, which is ERNIE's, and shapes
reversed. Quantized tensors are dequantized one at a time, on access.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import ConfigError, WeightsError

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Factors by which Llama 3 scales its rotary frequencies; ones change nothing.
_ROPE_FACTORS = "rope_freqs.weight"
# A key of the architecture -> Hugging Face's.
_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta"}
_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_ALSO_READ = ("vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned")
_REAL = {"attention.layer_norm_rms_epsilon", "rope.freq_base"}
_SPECIAL_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


class GgufFile(Mapping[str, np.ndarray]):
    """Map Hugging Face's names to the tensors of a GGUF file, each read on access.

    Raises:
        WeightsError: the file is truncated, damaged or one of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise WeightsError(f"{path}: not a GGUF file")
        try:
            reader = _bounded_reader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        # What else the library raises depends on where in its structures the file is damaged.
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise WeightsError(f"{path}: truncated or damaged ({error}); fetch it anew") from None
        if self._fields.get("split.count", 0) not in (0, 1):
            raise WeightsError(
                f"{path}: one of several files; merge them with llama-gguf-split --merge"
            )
        self._tensors = {_huggingface_name(t.name): t for t in reader.tensors}
        self._check_rope_factors()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the key-value pairs of the header, as Python values."""
        return self._fields

    def __getitem__(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise WeightsError(f"{self.path}: {tensor.name} is {kind}, which is unknown") from None
        return array.reshape(self.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, outermost axis first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> str:
        """Return the dtype ("F32", "F16", "BF16") that holds the tensor's numbers exactly."""
        kind = str(self._tensors[name].tensor_type.name)
        return kind if kind in ("F16", "BF16") else "F32"

    def _check_rope_factors(self) -> None:
        factors = self._tensors.pop(_ROPE_FACTORS, None)
        if factors is not None and not np.all(np.asarray(factors.data, np.float32) == 1):
            raise ConfigError(f"{_ROPE_FACTORS}: scaled RoPE is not implemented", str(self.path))

    def config(self) -> dict[str, Any]:
        """Return the configuration by the keys of Hugging Face's Llama.

        Raises:
            ConfigError: another architecture, a missing key, or one that changes the function in a
                way that ERNIE 4.5 cannot express.
        """
        known = self._fields
        if (architecture := known.get("general.architecture")) != "llama":
            raise ConfigError(
                f"general.architecture is {architecture!r}, only 'llama' can be imported",
                source=str(self.path),
            )
        own = {k.removeprefix("llama."): v for k, v in known.items() if k.startswith("llama.")}
        problems = [f"llama.{key} is missing" for key in _SIZES if key not in own]
        problems += _wrong_values(own) + _unknown_keys(own)
        if problems:
            raise ConfigError(problems, source=str(self.path))
        values: dict[str, Any] = {"model_type": "llama", "hidden_act": "silu"}
        values |= {_SIZES[key]: own[key] for key in _SIZES}
        values |= {name: own[key] for key, name in _OPTIONAL.items() if key in own}
        # A float32 in the file; its shortest decimal is what the author wrote.
        for name in ("rms_norm_eps", "rope_theta"):
            if name in values:
                values[name] = float(str(np.float32(values[name])))
        heads = own["attention.head_count"]
        rotated = own.get("rope.dimension_count", own["embedding_length"] // heads)
        values["head_dim"] = own.get("attention.key_length", rotated)
        if not rotated == values["head_dim"] == own.get("attention.value_length", rotated):
            raise ConfigError(
                "attention.key_length, attention.value_length and rope.dimension_count differ: "
                "partial rotary embedding is not implemented",
                source=str(self.path),
            )
        embedding = _NAMES["token_embd.weight"]
        if embedding in self:
            values["vocab_size"] = self.shape(embedding)[0]
        values["tie_word_embeddings"] = _NAMES["output.weight"] not in self
        for role, name in _SPECIAL_IDS.items():
            values[name] = known.get(f"tokenizer.ggml.{role}_token_id")
        return values


def _bounded_reader(path: Path) -> Any:
    """Open the file with a reader that stops where the file ends.

    The library's own reads on: a file that is cut off gives empty values, and a length in it that
    is damaged keeps it busy for ever.
    """
    import gguf

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = offset + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before byte {end}")
            return super()._get(offset, dtype, count, override_order)

    return BoundedReader(path)


def _huggingface_name(name: str) -> str:
    """Return Hugging Face's name of a tensor; an unknown one is kept, and refused later."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _BLOCK_NAMES:
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
    return _NAMES.get(name, name)


def _wrong_values(own: Mapping[str, Any]) -> list[str]:
    """Return what is no number above 0 of the keys that are computed with."""
    problems = []
    for key in (*_SIZES, *_OPTIONAL, *_WIDTHS):
        kind, words = (float, "number") if key in _REAL else (int, "whole number")
        if key in own and not (type(own[key]) is kind and 0 < own[key] < math.inf):
            problems.append(f"llama.{key} = {own[key]!r}: must be a {words} above 0")
    return problems


def _unknown_keys(own: Mapping[str, Any]) -> list[str]:
    """Return the keys that may change the function: experts, windows, scales, capping."""
    read = {*_SIZES, *_OPTIONAL, *_WIDTHS, *_ALSO_READ}
    harmless: tuple[Any, ...] = (None, False, 0, 1, "", "none")
    return [
        f"llama.{key} = {value!r}: ERNIE 4.5 has nothing like it"
        for key, value in own.items()
        if key not in read and not any(value == other for other in harmless)
    ]
