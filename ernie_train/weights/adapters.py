"""Directories that hold a part of a model: trained parameters, LoRA pairs, and where the rest is.

    adapter_model.safetensors, adapter_config.json     LoRA pairs, in PEFT's layout and names
    model.safetensors                                  parameters that trained whole
    base.json                                          path of the base, hash of its weights

Checkpoints of stages that train a part are such directories, and so is an adapter of PEFT, which
names its base in adapter_config.json. Reading one as a model gives the base with the pairs merged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import WeightsError
from ernie_train.io.files import MANIFEST, FileDigest, digest_file, read_manifest, write_json
from ernie_train.io.safetensors import TensorFiles, array_entries, write_tensor_files
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.lora import (
    EMBEDDING,
    HEAD,
    MAGNITUDE,
    magnitude_name,
    merge_pair,
    pair_names,
    pair_shapes,
)
from ernie_train.model.partial import adapter_of
from ernie_train.parallel import HasDecoder, owned_names
from ernie_train.weights.layout import (
    TensorMapping,
    describe_names,
    from_hf,
    from_stored,
    tensor_mappings,
    to_stored,
    wrong_shapes,
)
from ernie_train.weights.peft_config import (
    ADAPTER_CONFIG,
    AdapterSettings,
    describe_adapter,
    read_json_object,
    read_settings,
)

BASE, ADAPTER = "base.json", "adapter_model"
_PREFIX = "base_model.model."
_HASHED = ("model*.safetensors", f"{ADAPTER}*.safetensors", ADAPTER_CONFIG)


# ---- bases ---------------------------------------------------------------------------------------


def is_partial(directory: Path) -> bool:
    """Return whether a directory holds a part of a model only."""
    return (directory / BASE).exists() or (directory / ADAPTER_CONFIG).exists()


def describe_base(weights: Path) -> dict[str, str]:
    """Return the record of a base: its absolute path, and a hash of its weights."""
    return {"path": str(weights.resolve()), "sha256": hash_weights(weights)}


def hash_weights(directory: Path) -> str:
    """Return a hash of a model directory's weights, with those of its base if it is a part.

    It takes the files' hashes from the manifest, if there is one; `CheckpointError` for a damaged
    one.
    """
    files = sorted(path for pattern in _HASHED for path in directory.glob(pattern))
    known = read_manifest(directory)["files"] if (directory / MANIFEST).exists() else {}
    hashes = {
        path.name: known[path.name]["sha256"] if path.name in known else digest_file(path).sha256
        for path in files
    }
    if (directory / BASE).exists():
        hashes[BASE] = str(read_json_object(directory / BASE).get("sha256"))
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def find_base(directory: Path, *, verify: bool = False) -> Path:
    """Return the directory of the base that a partial directory names.

    Raises:
        WeightsError: it names none, there is nothing, or with `verify` the weights there are not
            those that the part was trained on.
    """
    file, key, record = directory / BASE, "path", {}
    if file.exists():
        record = read_json_object(file)
        base = Path(str(record.get("path")))
        if not os.path.isdir(base) and "relative" in record:  # the run directory was moved
            base = Path(os.path.normpath(directory / str(record["relative"])))
    else:
        file, key = directory / ADAPTER_CONFIG, "base_model_name_or_path"
        base = Path(str(read_json_object(file).get(key)))
    where = f"{file}: {key}"
    # Path.is_dir fails at a name of a megabyte.
    if not os.path.isdir(base) or base.samefile(directory):
        raise WeightsError(
            f"{where} names the base {base}, which is not another directory here: set it to the "
            "base's place"
        )
    if verify and record.get("sha256") not in (None, hash_weights(base)):
        raise WeightsError(
            f"{where}: the weights in {base} are not those that {directory} was trained on"
        )
    return base


# ---- names ---------------------------------------------------------------------------------------


def pair_mappings(
    config: Ernie4_5_MoeConfig,
    adapted: tuple[str, ...],
    rank: int,
    experts: range | None = None,
    *,
    dora: bool,
) -> list[TensorMapping]:
    """Return the mappings of the pairs of `adapted` parameters to PEFT's tensors.

    Matrices are [out,in] there, magnitudes [out]. Experts have tensors each, as in the model's own
    layout.
    """
    wanted, result = set(adapted), []
    for mapping in tensor_mappings(config, experts=experts):
        if mapping.parameter not in wanted:
            continue
        module = _PREFIX + mapping.stored.removesuffix(".weight")
        shapes = pair_shapes(mapping.parameter, mapping.shape, rank, dora=dora)
        for name, shape in shapes.items():
            stored = f"{module}.{name.rpartition('.')[2]}"
            if name.endswith(MAGNITUDE):
                result.append(TensorMapping(name, shape, stored, shape[-1:], at=mapping.at))
                continue
            stored += "" if "lora_embedding" in name else ".weight"
            stored_shape = (shape[-1], shape[-2])
            result.append(TensorMapping(name, shape, stored, stored_shape, True, mapping.at))
    return result


# Converts names and layouts of parameters, or of their moments, to those on disk or back.
Rename = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def to_disk(
    model: HasDecoder, named: Mapping[str, np.ndarray], head: Sequence[TensorMapping] = ()
) -> Mapping[str, np.ndarray]:
    """Return trained parameters of a model, or their Adam moments, by their names on disk.

    head: mappings of what the model has beside its decoder.
    """
    here = [*_trained_mappings(model, model.model.placement.experts), *head]
    return dict(to_stored(here, named))


def from_disk(
    model: HasDecoder, named: Mapping[str, np.ndarray], head: Sequence[TensorMapping] = ()
) -> Mapping[str, np.ndarray]:
    """Return the parameters, or Adam moments, that this rank holds, by their names in memory.

    `named` holds those of all ranks by their names on disk. Each is read on access.
    """
    here = [*_trained_mappings(model, model.model.placement.experts), *head]
    return from_stored([*_trained_mappings(model, None), *head], named, here)


def _trained_mappings(model: HasDecoder, experts: range | None) -> list[TensorMapping]:
    """Return the mappings of a model's parameters, and of its pairs if it has some."""
    config, adapter = model.model.config, adapter_of(model)
    result = tensor_mappings(config, experts=experts)
    if adapter is not None:
        adapted, lora = tuple(adapter.pairs), adapter.config
        result += pair_mappings(config, adapted, lora.rank, experts, dora=lora.dora)
    return result


def saved_parameters(model: Ernie4_5_MoeForCausalLM) -> set[str] | None:
    """Return the parameters that a checkpoint holds whole: what trains, and what moves with it.

    The selection bias moves with its router. None: all.
    """
    if model.partial is None:
        return None
    names = set(model.partial.selection.whole)
    if model.partial.selection.trains_routers:
        known = (mapping.parameter for mapping in tensor_mappings(model.config))
        names |= {name for name in known if name.endswith("e_score_correction_bias")}
    return names


# ---- writing -------------------------------------------------------------------------------------


def write_part(model: Ernie4_5_MoeForCausalLM, directory: Path) -> dict[str, FileDigest]:
    """Write base.json and the pairs of a model that trains in part; else nothing.

    Every rank must call it, and writes the pairs that it owns.

    Returns:
        The digests of this rank's files of tensors, by file name.
    """
    if model.partial is None:
        return {}
    digests: dict[str, FileDigest] = {}
    adapter, base = adapter_of(model), model.partial.base
    if adapter is not None:
        held = adapter.parameters()
        arrays = to_disk(model, {name: held[name].numpy() for name in owned_names(held)})
        digests = write_tensor_files(directory, ADAPTER, array_entries(arrays))
    with consensus.fail_together():
        if process_group.is_main():
            relative = os.path.relpath(base["path"], directory)
            write_json(directory / BASE, {**base, "relative": relative})
            if adapter is not None:
                adapted = tuple(adapter.pairs)
                described = describe_adapter(model.config, adapter.config, adapted, base["path"])
                write_json(directory / ADAPTER_CONFIG, described)
    return digests


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The content of a partial directory, as arrays in memory's layout, and the base.

    base: reads the base's parameters, as `_Source` of hf.py does; None to look at the part alone.
    """

    directory: Path
    base: Any
    whole: dict[str, np.ndarray]
    pairs: Mapping[str, np.ndarray]  # names of A, B and magnitudes -> arrays
    scale: float

    @property
    def skipped(self) -> Any:
        """Return the names of the base's tensors that are not loaded."""
        return self.base.skipped

    def carried(self) -> Any:
        """Return the base's tensors that mean nothing here, by name."""
        return self.base.carried()

    def parameters(self, *, merge: bool = True) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the base's parameters with trained ones replaced and, with `merge`, pairs added.

        Raises:
            WeightsError: no pair adds anything: the merge would equal the base.
        """
        if merge:
            self._refuse_untrained()
        for name, array in self.base.parameters():
            whole = self.whole.get(name, array)
            yield name, self._merged(name, whole) if merge else whole

    def _merged(self, name: str, array: np.ndarray) -> np.ndarray:
        a, b = pair_names(name)
        if a not in self.pairs:
            return array
        magnitude = self.pairs.get(magnitude_name(name))
        return merge_pair(name, array, self.pairs[a], self.pairs[b], magnitude, self.scale)

    def _refuse_untrained(self) -> None:
        factors = {n: a for n, a in self.pairs.items() if n.endswith(("lora_B", "embedding_A"))}
        if not factors or any(array.any() for array in factors.values()):
            return
        if any(name.endswith(MAGNITUDE) for name in self.pairs):  # they may have trained alone
            for name, array in self.base.parameters():
                if not np.allclose(self._merged(name, array), array, rtol=1e-5, atol=0):
                    return
        raise WeightsError(
            f"{self.directory}: the adapter changes nothing, so that merged it equals its base: "
            "nothing was trained"
        )


def read_part(
    directory: Path, config: Ernie4_5_MoeConfig, experts: range | None = None, base: Any = None
) -> Part:
    """Read a partial directory for a model of `config`, and of its experts those of a rank.

    Raises:
        WeightsError: it is damaged, of another base or rank, or holds what is not read here.
    """
    stored: dict[str, np.ndarray] = {}
    if list(directory.glob("model*.safetensors*")):
        stored = dict(TensorFiles(directory))
    pairs: dict[str, np.ndarray] = {}
    scale = 0.0
    if (directory / ADAPTER_CONFIG).exists():
        settings = read_settings(directory / ADAPTER_CONFIG)
        scale = settings.scale
        files = TensorFiles(directory, ADAPTER)
        # PEFT saves an embedding or a head that has a pair with it, under its wrapper's name.
        stored |= {
            name.removeprefix(_PREFIX).replace(".base_layer.", "."): files[name]
            for name in files
            if ".lora_" not in name
        }
        adaptable, rank, dora = tuple(_adaptable(config)), settings.rank, settings.dora
        every = pair_mappings(config, adaptable, rank, dora=dora)
        here = pair_mappings(config, adaptable, rank, experts, dora=dora)
        found = {name: files[name] for name in files if ".lora_" in name}
        _check_pairs(directory, found, every, settings)
        pairs = dict(from_stored(every, found, here))
        if config.tie_word_embeddings and pair_names(EMBEDDING)[0] in pairs:
            raise WeightsError(
                f"{directory}: has a pair beside the embedding, which is the head too in this "
                "model (tie_word_embeddings); PEFT leaves the head as it was, which the merged "
                "model cannot: train the embedding whole (modules_to_save), or untie the base"
            )
    try:
        whole = dict(from_hf(config, stored, experts))
    except WeightsError as error:
        raise WeightsError(f"{directory}: {error}") from None
    return Part(directory, base, whole, pairs, scale)


def load_pairs(model: Ernie4_5_MoeForCausalLM, directory: Path) -> None:
    """Set the pairs of a model that trains in part; does nothing for one that has none."""
    adapter = adapter_of(model)
    if adapter is not None:
        found = read_part(directory, model.config, model.model.placement.experts).pairs
        for name, matrix in adapter.parameters().items():
            matrix.set_value(paddle.to_tensor(found[name]).astype(matrix.dtype))


def _adaptable(config: Ernie4_5_MoeConfig) -> list[str]:
    names = dict.fromkeys(mapping.parameter for mapping in tensor_mappings(config))
    return [n for n in names if ("_proj" in n and not n.endswith("bias")) or n in (EMBEDDING, HEAD)]


def _check_pairs(
    directory: Path,
    found: Mapping[str, np.ndarray],
    every: list[TensorMapping],
    settings: AdapterSettings,
) -> None:
    expected = {mapping.stored: mapping.stored_shape for mapping in every}
    matrices = {name: array for name, array in found.items() if not name.endswith(MAGNITUDE)}
    if len(matrices) < len(found) and not settings.dora:
        raise WeightsError(
            f"{directory}: holds magnitudes of DoRA, but {ADAPTER_CONFIG} says use_dora: false"
        )
    ranks = {array.shape[0 if "_A" in name else -1] for name, array in matrices.items()}
    if ranks - {settings.rank}:
        raise WeightsError(
            f"{directory}: the matrices have rank {', '.join(map(str, sorted(ranks)))}, "
            f"{ADAPTER_CONFIG} says r: {settings.rank}"
        )
    wrong = wrong_shapes({name: array.shape for name, array in found.items()}, expected)
    unknown = [name for name in found if name not in expected]
    missing = sorted(_wanted(found, dora=settings.dora) - found.keys())
    if any(".experts.lora_" in name or ".experts.base_layer." in name for name in unknown):
        raise WeightsError(
            f"{directory}: its pairs are of fused experts, as peft saves them on transformers 5; "
            "only one pair an expert is read, as saved on transformers 4.57"
        )
    if problems := describe_names(missing, unknown, wrong):
        raise WeightsError(f"{directory}: an adapter of another base: {'; '.join(problems)}")


def _wanted(names: Iterable[str], *, dora: bool) -> set[str]:
    """Return the names of all tensors of the pairs of which `names` are some."""
    wanted: set[str] = set()
    for name in names:
        module, _, tensor = name.rpartition(".lora_")
        ends = [re.sub("[AB]", letter, tensor) for letter in "AB" if "magnitude" not in tensor]
        wanted |= {f"{module}.lora_{end}" for end in ends}
        wanted |= {f"{module}.{MAGNITUDE}"} if dora else set()
    return wanted
