"""Models on disk: Hugging Face safetensors, read and written.

Written is one layout only, that of the released "-PT" checkpoints (see `layout.py`): per-expert
tensors, Linear weights [out, in], router and router bias always float32, sharded with an index.
Read are also the stacked experts of newer `transformers` and Baidu's "-Paddle" layout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, ConfigError, UserError, WeightsError
from ernie_train.io.files import MANIFEST, FileDigest, verify_manifest, write_directory, write_json
from ernie_train.io.safetensors import (
    TensorEntry,
    TensorFiles,
    from_bfloat16,
    parse_size,
    to_bfloat16,
    write_tensor_files,
)
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.configuration import read_config_json
from ernie_train.parallel import new_model, owned_names
from ernie_train.weights.layout import (
    EMBED_TOKENS,
    LM_HEAD,
    Layout,
    Piece,
    assemble,
    canonical_name,
    describe_names,
    detect_layout,
    from_hf,
    is_skipped,
    parameter_shapes,
    pieces,
    to_hf,
)

__all__ = [
    "LoadReport", "from_hf", "load_config", "load_pretrained", "load_weights", "read_parameters",
    "save_pretrained", "to_hf", "write_weights",
]  # fmt: skip

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_log = logging.getLogger(__name__)


class SavesPretrained(Protocol):
    """What `save_pretrained` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_token_ids(self) -> list[int]: ...
    def save_pretrained(self, directory: Path, /) -> Any: ...


@dataclass(frozen=True)
class LoadReport:
    """What was found in a model directory."""

    layout: Layout
    tensors: int  # stored tensors that were used
    skipped: tuple[str, ...]  # names of stored tensors of multi-token prediction, not loaded
    verified: bool  # whether the files' hashes were compared with a manifest


# ---- reading -----------------------------------------------------------------------------------


def load_pretrained(path: str | Path, dtype: str = "float32") -> Ernie4_5_MoeForCausalLM:
    """The model in the directory `path`, with its parameters as `dtype` ("float32", "bfloat16").

    Router and router bias stay float32; under expert parallelism it holds this rank's experts.
    Beside the model at most one parameter is in memory.
    Raises `ConfigError` for a `config.json` that cannot be computed and `WeightsError` for files
    that are missing, damaged or do not fit it, or that hold numbers which are not finite.
    """
    _check_dtype(dtype)
    config = load_config(path)
    _open(Path(path), config, verify=False)  # misfits are told before a large model is built
    model = new_model(config, dtype)
    report = load_weights(model, path)
    if report.skipped:
        _log.warning("%s: not loaded: %s", path, ", ".join(report.skipped))
    return model


def load_config(path: str | Path) -> Ernie4_5_MoeConfig:
    """`config.json` of a model directory, with Baidu's defaults if the weights have its layout."""
    file = Path(path) / "config.json"
    values = read_config_json(file)
    if "tie_word_embeddings" not in values:
        # Hugging Face's default is true, that of Baidu's own configurations false.
        layout = detect_layout(TensorFiles(Path(path)))
        values["tie_word_embeddings"] = layout != "paddle"
    return Ernie4_5_MoeConfig.from_dict(values, source=str(file))


def load_weights(
    model: Ernie4_5_MoeForCausalLM, path: str | Path, *, verify: bool = True
) -> LoadReport:
    """Fills `model` from the directory `path`; every parameter keeps its own dtype.

    With `verify`, files that this program wrote are compared with the hashes in their manifest.
    Raises `WeightsError`, before anything is changed if names or shapes do not fit.
    """
    state = model.state_dict()
    experts = model.model.placement.experts
    expected = parameter_shapes(model.config, experts)
    if expected.keys() != state.keys():
        odd = ", ".join(sorted(expected.keys() ^ state.keys())[:20])
        raise WeightsError(f"the model's parameters are not those of its configuration: {odd}")
    source = _open(Path(path), model.config, experts, verify=verify and process_group.is_main())
    for name, array in source.parameters():
        target = state[name]
        # From numpy the numbers go straight into the parameter, without a copy in between.
        target.set_value(to_bfloat16(array) if target.dtype == paddle.bfloat16 else array)
        del array  # before the next one is read
    return source.report()


def read_parameters(
    path: str | Path, config: Ernie4_5_MoeConfig | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(in-memory name, float32 array) of a model directory, one parameter at a time."""
    config = config or load_config(path)
    yield from _open(Path(path), config, verify=False).parameters()


@dataclass(frozen=True)
class _Source:
    """An opened model directory whose names and shapes fit the configuration."""

    files: TensorFiles
    names: dict[str, str]  # canonical name -> stored name
    layout: Layout
    wanted: list[Piece]
    no_bias: frozenset[str]  # router biases that the directory does not have: zero
    verified: bool
    skipped: tuple[str, ...]

    def read(self, name: str) -> np.ndarray:
        """A stored tensor as float32; `WeightsError` if a number in it is not finite."""
        array = self.files[self.names[name]]
        if array.dtype == np.uint16:  # Baidu's bfloat16
            array = from_bfloat16(array)
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            file = self.files.stored[self.names[name]].file
            raise WeightsError(f"{file}: {count} numbers of {name} are NaN or infinite")
        return array

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        if LM_HEAD in self.names and not any(p.stored == LM_HEAD for p in self.wanted):
            self._check_tied()
        present = [piece for piece in self.wanted if piece.stored not in self.no_bias]
        yield from assemble(present, self.read)
        for piece in self.wanted:
            if piece.stored in self.no_bias:
                yield piece.parameter, np.zeros(piece.shape, np.float32)

    def _check_tied(self) -> None:
        embedding = next(p.stored for p in self.wanted if p.parameter == EMBED_TOKENS)
        if not np.array_equal(self.read(LM_HEAD), self.read(embedding)):
            raise WeightsError(
                f"{self.files.directory}: config.json has tie_word_embeddings true, but "
                f"{LM_HEAD} differs from {embedding}: set it to false, or delete {LM_HEAD}"
            )

    def report(self) -> LoadReport:
        used = {piece.stored for piece in self.wanted} - self.no_bias
        return LoadReport(self.layout, len(used), self.skipped, self.verified)


def _open(
    path: Path, config: Ernie4_5_MoeConfig, experts: range | None = None, *, verify: bool
) -> _Source:
    verified = verify and _verify(path)
    files = TensorFiles(path)
    skipped = tuple(sorted(name for name in files if is_skipped(name)))
    names = {canonical_name(name): name for name in files if not is_skipped(name)}
    layout = detect_layout(names)
    wanted = pieces(config, layout)
    no_bias = _absent_biases(path, wanted, names) if layout == "paddle" else frozenset()
    shapes = {p.stored: p.stored_shape for p in wanted if p.stored not in no_bias}
    missing = [name for name in shapes if name not in names]
    unknown = [name for name in names if name not in shapes]
    if config.tie_word_embeddings and LM_HEAD in unknown:
        unknown.remove(LM_HEAD)  # compared with the embedding when it is read
    wrong = [
        f"{name} {list(files.stored[stored].shape)} instead of {list(shapes[name])}"
        for name, stored in names.items()
        if name in shapes and files.stored[stored].shape != shapes[name]
    ]
    wrong += [
        f"{name} has dtype {files.stored[stored].dtype}"
        for name, stored in names.items()
        if not _is_float(files.stored[stored].dtype, layout)
    ]
    if problems := describe_names(missing, unknown, wrong):
        raise WeightsError(f"{path}: the weights do not fit config.json: {'; '.join(problems)}")
    here = wanted if experts is None else pieces(config, layout, experts)
    return _Source(files, names, layout, here, no_bias, verified, skipped)


def _is_float(dtype: str, layout: Layout) -> bool:
    return dtype in ("F64", "F32", "F16", "BF16") or (dtype == "U16" and layout == "paddle")


def _absent_biases(path: Path, wanted: list[Piece], names: dict[str, str]) -> frozenset[str]:
    """Router biases that Baidu's checkpoints lack if they were trained without (their default)."""
    biases = frozenset(p.stored for p in wanted if p.stored.endswith("e_score_correction_bias"))
    trained_with = read_config_json(path / "config.json").get("moe_use_aux_free", False)
    return frozenset() if trained_with or any(b in names for b in biases) else biases


def _verify(path: Path) -> bool:
    if not (path / MANIFEST).exists():
        return False  # not written by this program: there is nothing to compare with
    try:
        verify_manifest(path)
    except CheckpointError as error:
        raise WeightsError(
            f"{error} (if a file was changed on purpose, delete {path / MANIFEST})"
        ) from None
    return True


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}: {dtype!r}")


# ---- writing -----------------------------------------------------------------------------------


def write_weights(
    model: Ernie4_5_MoeForCausalLM,
    directory: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> dict[str, FileDigest]:
    """Writes `model*.safetensors` and `config.json` into an existing directory.

    `dtype` None keeps the dtype of each parameter. Beside the model at most one parameter is in
    memory. Every rank must call it and writes the tensors that are its to write. Returns the
    digests of this rank's files. Raises `StorageError`.
    """
    if dtype is not None:
        _check_dtype(dtype)
    read = _CachedParameter(model)
    mine = owned_names(read.state)
    entries = []
    for piece in pieces(model.config, experts=model.model.placement.experts):
        if piece.parameter not in mine:
            continue
        stored = "F32" if piece.keep_float32 else DTYPES[dtype or read.dtype(piece.parameter)]
        shape = piece.stored_shape
        entries.append(TensorEntry(piece.stored, shape, stored, read.producer(piece)))
    digests = write_tensor_files(directory, "model", entries, max_shard_size)
    stored_as = dtype or read.dtype(EMBED_TOKENS)
    with consensus.fail_together():
        if process_group.is_main():
            write_json(directory / "config.json", model.config.to_dict(torch_dtype=stored_as))
    return digests


class _CachedParameter:
    """Read parameters as numpy arrays and keep the last one, since its pieces are read in turn."""

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        self.state = model.state_dict()
        self.name = ""
        self.array = np.empty(0)

    def dtype(self, name: str) -> str:
        return str(self.state[name].dtype).removeprefix("paddle.")

    def producer(self, piece: Piece) -> Callable[[], np.ndarray]:
        def produce() -> np.ndarray:
            if self.name != piece.parameter:
                self.name, self.array = piece.parameter, self.state[piece.parameter].numpy()
            return piece.take(self.array)

        return produce


def save_pretrained(
    model: Ernie4_5_MoeForCausalLM,
    path: str | Path,
    tokenizer: SavesPretrained | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a directory that `transformers` loads: weights, configs and the tokenizer's files.

    The directory appears whole or not at all. An existing one is replaced if it is empty or was
    written by this function (it has our `MANIFEST.json`, which holds the weights' hashes).
    Raises `UserError` for any other existing path or a tokenizer with more tokens than the model,
    `ConfigError` for an unknown dtype or size, `StorageError` if the disk is full or read-only.
    """
    config = model.config
    parse_size(max_shard_size)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"vocab_size={config.vocab_size}"
        )

    def write(directory: Path) -> dict[str, FileDigest]:
        digests = write_weights(model, directory, dtype=dtype, max_shard_size=max_shard_size)
        with consensus.fail_together():
            if process_group.is_main():
                generation = _generation_config(config, tokenizer)
                write_json(directory / "generation_config.json", generation)
                if tokenizer is not None:
                    tokenizer.save_pretrained(directory)
        return digests

    # Only the weights are hashed: the other files are small texts that people rightly edit.
    write_directory(Path(path), write, manifest_all=False)


def _generation_config(
    config: Ernie4_5_MoeConfig, tokenizer: SavesPretrained | None
) -> dict[str, Any]:
    eos = tokenizer.stop_token_ids if tokenizer is not None else config.eos_token_id
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}
