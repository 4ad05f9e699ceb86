"""Read model directories with Hugging Face safetensors, in each of the layouts of `layout.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_train.core import process_group
from ernie_train.core.errors import CheckpointError, ConfigError, WeightsError
from ernie_train.io.files import GENERATION_CONFIG, MANIFEST, verify_manifest
from ernie_train.io.safetensors import TensorFiles, from_bfloat16, to_bfloat16
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.configuration import read_config_json
from ernie_train.parallel import new_model
from ernie_train.weights.adapters import Part, find_base, is_partial, read_part
from ernie_train.weights.layout import (
    EMBED_TOKENS,
    LM_HEAD,
    Assembled,
    Layout,
    TensorMapping,
    describe_names,
    detect_layout,
    is_mtp_name,
    normalize_name,
    parameter_shapes,
    tensor_mappings,
    wrong_shapes,
)
from ernie_train.weights.quantize import open_tensors, split_config

# dtype of weights on disk -> its name in safetensors
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
COMPUTE_DTYPES = ("float32", "bfloat16")
_log = logging.getLogger(__name__)


def load_pretrained(
    path: str | Path, dtype: str = "float32", *, verified: bool = False
) -> Ernie4_5_MoeForCausalLM:
    """Load the model in the directory `path`.

    With expert parallelism the model holds this rank's experts only. Needs memory for the model
    and one more parameter.

    Args:
        path: a directory with `config.json` and `model*.safetensors`.
        dtype: "float32" or "bfloat16"; router and router bias stay float32.
        verified: the caller has compared the directory with its manifest, as `find_model` does. The
            base of a part of a model is compared all the same.

    Raises:
        ConfigError: `dtype` is unknown, or `config.json` describes a model that is not supported.
        WeightsError: files are missing, damaged or do not fit `config.json`, or a number in them
            is not finite.
    """
    check_dtype(dtype, COMPUTE_DTYPES)
    config = load_config(path)
    _open(Path(path), config, verify=False)  # report mismatches before a large model is built
    model = new_model(config, dtype, initialize=False)
    skipped = load_weights(model, path, verify=not verified or is_partial(Path(path)))
    model.generation = _read_generation(Path(path))
    if unknown := config.unknown_keys:
        _log.warning("%s: unknown keys in config.json change nothing: %s", path, ", ".join(unknown))
    if skipped:
        _log.warning("%s: not loaded: %s", path, ", ".join(skipped))
    return model


def load_config(path: str | Path) -> Ernie4_5_MoeConfig:
    """Read `config.json` of a model directory; Baidu's defaults apply if the layout is Baidu's.

    Raises:
        ConfigError: the file is missing, invalid or describes a model that is not supported.
        WeightsError: the layout had to be detected and the weights are missing or damaged.
    """
    file = Path(path) / "config.json"
    if not file.exists() and is_partial(Path(path)):  # an adapter alone
        return load_config(find_base(Path(path)))
    values, _ = split_config(read_config_json(file), str(file))
    if "tie_word_embeddings" not in values:
        # Hugging Face's default is true, that of Baidu's own configurations false.
        layout = detect_layout(TensorFiles(Path(path)))
        values["tie_word_embeddings"] = layout != "paddle"
    return Ernie4_5_MoeConfig.from_dict(values, source=str(file))


def _read_generation(path: Path) -> dict[str, Any]:
    """Return the content of generation_config.json; {} without one.

    A partial directory that has none takes its base's. Private keys are left out: one says that
    the file was made from config.json, by which transformers makes it anew.
    """
    file = path / GENERATION_CONFIG
    if not file.exists():
        return _read_generation(find_base(path)) if is_partial(path) else {}
    return {key: value for key, value in read_config_json(file).items() if key[:1] != "_"}


def load_weights(
    model: Ernie4_5_MoeForCausalLM, path: str | Path, *, verify: bool = True, merge: bool = True
) -> tuple[str, ...]:
    """Load the weights in the directory `path` into `model`; each parameter keeps its dtype.

    With `verify`, rank 0 compares files that this program wrote with the hashes in their manifest.
    An adapter is merged into its base; without `merge` the base is loaded.

    Returns:
        The tensors of multi-token prediction that are left behind, as they are in Baidu's layout;
        those in other layouts are in `model.carried`, which the next save writes again.

    Raises:
        WeightsError: files are missing or damaged, names or shapes do not fit (then the model is
            unchanged), or a number is not finite.
    """
    state = model.state_dict()
    experts = model.model.placement.experts
    expected = parameter_shapes(model.config, experts)
    if expected.keys() != state.keys():
        odd = ", ".join(sorted(expected.keys() ^ state.keys())[:20])
        raise WeightsError(f"the model's parameters are not those of its configuration: {odd}")
    source = _open(Path(path), model.config, experts, verify=verify and process_group.is_main())
    for name, array in source.parameters(merge=merge):
        target = state[name]
        # set_value copies a numpy array into the parameter without a temporary tensor.
        target.set_value(to_bfloat16(array) if target.dtype == paddle.bfloat16 else array)
        del array  # before the next one is read
    model.carried = source.carried() if process_group.is_main() else {}
    return source.skipped


def read_parameters(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name in memory, float32 array) of a model directory, one parameter at a time.

    Raises:
        WeightsError: files are missing or damaged, do not fit config.json, or a number is not
            finite.
    """
    yield from _open(Path(path), load_config(path), verify=False).parameters()


@dataclass(frozen=True)
class _Source:
    """Read parameters from a model directory whose names and shapes fit the configuration."""

    files: TensorFiles
    names: dict[str, str]  # name in released checkpoints -> name in the files
    layout: Layout
    wanted: list[TensorMapping]
    no_bias: frozenset[str]  # router biases that the directory lacks; loaded as zeros
    mtp: tuple[str, ...]  # names of tensors of multi-token prediction

    def read(self, name: str) -> np.ndarray:
        """Return a stored tensor as float32.

        Raises:
            WeightsError: a number in it is not finite, or the file is truncated.
        """
        array = self.files[self.names[name]]
        if array.dtype == np.uint16:  # Baidu's bfloat16
            array = from_bfloat16(array)
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            file = self.files.stored[self.names[name]].file
            raise WeightsError(f"{file}: {count} numbers of {name} are NaN or infinite")
        return array

    def parameters(self, *, merge: bool = True) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name in memory, array); `merge` is for directories with a part of a model."""
        if LM_HEAD in self.names and not any(p.stored == LM_HEAD for p in self.wanted):
            self._check_tied()
        present = [mapping for mapping in self.wanted if mapping.stored not in self.no_bias]
        yield from Assembled(present, self.read).items()
        for mapping in self.wanted:
            if mapping.stored in self.no_bias:
                yield mapping.parameter, np.zeros(mapping.shape, np.float32)

    def _check_tied(self) -> None:
        embedding = next(p.stored for p in self.wanted if p.parameter == EMBED_TOKENS)
        if not np.array_equal(self.read(LM_HEAD), self.read(embedding)):
            raise WeightsError(
                f"{self.files.directory}: config.json has tie_word_embeddings true, but "
                f"{LM_HEAD} differs from {embedding}: set it to false, or delete {LM_HEAD}"
            )

    def carried(self) -> dict[str, np.ndarray]:
        """Return the tensors of multi-token prediction as stored (uint16: bits of bfloat16).

        Baidu's own layout has other names and orientations, which a save would have to convert.
        """
        return {} if self.layout == "paddle" else {n: self.files.bits(n) for n in self.mtp}

    @property
    def skipped(self) -> tuple[str, ...]:
        """Return the names of tensors of multi-token prediction that are not carried."""
        return self.mtp if self.layout == "paddle" else ()


def _open(
    path: Path, config: Ernie4_5_MoeConfig, experts: range | None = None, *, verify: bool
) -> _Source | Part:
    if is_partial(path):
        base = _open(find_base(path, verify=verify), config, experts, verify=verify)
        return read_part(path, config, experts, base)
    if verify:
        _verify(path)
    files = open_tensors(path)
    mtp = tuple(sorted(name for name in files if is_mtp_name(name)))
    names = {normalize_name(name): name for name in files if not is_mtp_name(name)}
    layout = detect_layout(names)
    wanted = tensor_mappings(config, layout)
    no_bias = _absent_biases(path, wanted, names) if layout == "paddle" else frozenset()
    shapes = {p.stored: p.stored_shape for p in wanted if p.stored not in no_bias}
    missing = [name for name in shapes if name not in names]
    unknown = [name for name in names if name not in shapes]
    if config.tie_word_embeddings and LM_HEAD in unknown:
        unknown.remove(LM_HEAD)  # compared with the embedding when it is read
    tensors = {name: files.stored[stored] for name, stored in names.items()}
    wrong = wrong_shapes({name: tensor.shape for name, tensor in tensors.items()}, shapes)
    wrong += [
        f"{name} has dtype {tensor.dtype}"
        for name, tensor in tensors.items()
        if not _is_float(tensor.dtype, layout)
    ]
    if problems := describe_names(missing, unknown, wrong):
        raise WeightsError(f"{path}: the weights do not fit config.json: {'; '.join(problems)}")
    here = wanted if experts is None else tensor_mappings(config, layout, experts)
    return _Source(files, names, layout, here, no_bias, mtp)


def _is_float(dtype: str, layout: Layout) -> bool:
    return dtype in ("F64", "F32", "F16", "BF16") or (dtype == "U16" and layout == "paddle")


def _absent_biases(
    path: Path, wanted: list[TensorMapping], names: dict[str, str]
) -> frozenset[str]:
    """Return the router biases that are not stored, as in Baidu's checkpoints without aux-free.

    Training without the bias is Baidu's default; such checkpoints have none of them.
    """
    biases = frozenset(p.stored for p in wanted if p.stored.endswith("e_score_correction_bias"))
    trained_with = read_config_json(path / "config.json").get("moe_use_aux_free", False)
    return frozenset() if trained_with or any(b in names for b in biases) else biases


def _verify(path: Path) -> None:
    """Compare the files with their manifest, which directories of other programs have none of."""
    try:
        if (path / MANIFEST).exists():
            verify_manifest(path)
    except CheckpointError as error:
        raise WeightsError(
            f"{error} (if a file was changed on purpose, delete {path / MANIFEST})"
        ) from None


def check_dtype(dtype: str, known: Iterable[str] = DTYPES) -> None:
    """Raise `ConfigError` if `dtype` is none of those that are known, by default those on disk."""
    if dtype not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}: {dtype!r}")
