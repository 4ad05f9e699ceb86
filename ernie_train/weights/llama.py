"""Open a model of the Llama architecture as what it is in ERNIE 4.5's terms: a dense model.

Both compute the same function but for the order of rotary pairs: Hugging Face's Llama rotates the
numbers (i, i + D/2) of a head together (`rotate_half`), ERNIE 4.5 the pairs (2i, 2i+1). So the
rows of q and k are permuted and nothing else changes.

Shapes: N heads, D head dimension, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import ConfigError, WeightsError
from ernie_train.io.safetensors import TensorFiles
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.model.configuration import DENSE_MODEL_TYPE, read_config_json
from ernie_train.weights.gguf_file import GgufFile
from ernie_train.weights.layout import (
    EMBED_TOKENS,
    LM_HEAD,
    describe_names,
    tensor_mappings,
    wrong_shapes,
)

# The defaults of `transformers` for keys that a config.json leaves out.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MISTRAL_DEFAULTS = {
    **_LLAMA_DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
DEFAULTS = {"llama": _LLAMA_DEFAULTS, "mistral": _MISTRAL_DEFAULTS, DENSE_MODEL_TYPE: {}}


@dataclass(frozen=True)
class Source:
    """Hold a dense model that is to be converted; tensors are read on access.

    config: its configuration as an ERNIE 4.5 model.
    tensors: Hugging Face's name -> array, Linear weights [out, in].
    shapes, dtypes: of these, as stored ("F32", "BF16", ...).
    interleaved: the rows of q and k are in ERNIE's order already.
    is_ernie: it is an ERNIE 4.5 model already.
    """

    path: Path
    config: Ernie4_5_MoeConfig
    tensors: Mapping[str, np.ndarray]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    interleaved: bool
    is_ernie: bool = False

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in ERNIE's order of rows, in the dtype of the source.

        Raises:
            WeightsError: a number in it is not finite, or the file is truncated.
        """
        array = self.tensors[name]
        if not np.isfinite(array).all():
            raise WeightsError(f"{self.path}: {name} holds numbers that are NaN or infinite")
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        part = name.split(".")[-2]
        if self.interleaved or part not in heads:
            return array
        return interleave(array, heads[part])


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows [N*D,H] from `rotate_half` to interleaved order: i, i + D/2 -> 2i, 2i + 1."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])  # [N,2,D/2,H]
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def llama_config(values: Mapping[str, Any], source: str) -> Ernie4_5_MoeConfig:
    """Return the ERNIE 4.5 configuration that computes what a Llama `config.json` describes.

    Raises:
        ConfigError: ERNIE 4.5 cannot express it; each key is named.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ConfigError(
            f"model_type {kind!r} cannot be imported, only {', '.join(DEFAULTS)}: ERNIE 4.5 "
            "computes what Llama does, and nothing more",
            source=source,
        )
    merged = {**DEFAULTS[kind], **values}
    if merged.get("rope_parameters") and "rope_theta" not in values:
        del merged["rope_theta"]  # it stands there; `rope_theta` would be the default
    problems = []
    if merged["hidden_act"] not in ("silu", "swish"):
        problems.append(f"hidden_act = {merged['hidden_act']!r}: ERNIE 4.5 computes silu")
    if merged.pop("rope_interleaved", None) and kind != DENSE_MODEL_TYPE:
        problems.append("rope_interleaved = true: transformers computes rotate_half all the same")
    try:
        config = Ernie4_5_MoeConfig.from_dict({**merged, "model_type": DENSE_MODEL_TYPE}, source)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, source=source)
    if kind != DENSE_MODEL_TYPE:
        config = Ernie4_5_MoeConfig(**dict(config))  # without keys that mean something to Llamas
    return config


def open_source(path: Path) -> Source:
    """Open a directory of safetensors, or a GGUF file, and compare it with its configuration.

    Raises:
        ConfigError: the model is not one that ERNIE 4.5 can express.
        WeightsError: files are missing, damaged or do not fit the configuration.
    """
    file = _gguf_of(path)
    source = _open_directory(path) if file is None else _open_gguf(file)
    _check_names(source)
    return source


def _gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that `path` is, or holds in place of a config.json."""
    if path.is_file():
        if path.suffix == ".safetensors":
            raise WeightsError(f"{path}: give its directory, which holds config.json too")
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
            raise WeightsError(f"{path}: pickles are never loaded; save it as safetensors first")
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file or directory; a model of a hub is fetched first")
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() or not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise WeightsError(f"{path} holds several GGUF files, name one of them: {names}")
    return files[0]


def _open_gguf(path: Path) -> Source:
    file = GgufFile(path)
    config = llama_config(file.config(), str(path))
    shapes = {name: file.shape(name) for name in file}
    dtypes = {name: file.dtype(name) for name in file}
    return Source(path, config, file, shapes, dtypes, interleaved=True)


def _open_directory(path: Path) -> Source:
    values = read_config_json(path / "config.json")
    config = llama_config(values, str(path / "config.json"))
    files = TensorFiles(path)
    shapes = {name: stored.shape for name, stored in files.stored.items()}
    dtypes = {name: stored.dtype for name, stored in files.stored.items()}
    ernie = values["model_type"] == DENSE_MODEL_TYPE
    return Source(path, config, files, shapes, dtypes, interleaved=ernie, is_ernie=ernie)


def _check_names(source: Source) -> None:
    expected = {m.stored: m.stored_shape for m in tensor_mappings(source.config)}
    there = {n: s for n, s in source.shapes.items() if not n.endswith(".rotary_emb.inv_freq")}
    if LM_HEAD in there and LM_HEAD not in expected:
        del there[LM_HEAD]
        embedding = source.tensors.get(EMBED_TOKENS)  # None: told below
        if embedding is not None and not np.array_equal(source.tensors[LM_HEAD], embedding):
            raise WeightsError(
                f"{source.path}: tie_word_embeddings is true, but {LM_HEAD} differs from "
                f"{EMBED_TOKENS}: set it to false, or delete {LM_HEAD}"
            )
    missing = [name for name in expected if name not in there]
    unknown = [name for name in there if name not in expected]
    wrong = wrong_shapes(there, expected)
    wrong += [
        f"{name} has dtype {source.dtypes[name]}"
        for name in there
        if source.dtypes[name] not in ("F64", "F32", "F16", "BF16")
    ]
    if problems := describe_names(missing, unknown, wrong):
        raise WeightsError(f"{source.path}: not a dense Llama: {'; '.join(problems)}")
