"""Quantized weights on disk: `weight_packed`, `weight_scale` and `weight_shape` for a `weight`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import WeightsError
from ernie_train.io.safetensors import TensorEntry, TensorFiles
from ernie_train.model.configuration import read_config_json
from ernie_train.weights.quantize.scheme import QuantizationScheme, QuantizedTensor

QUANTIZATION_KEY = "quantization_config"
_PARTS = ("_packed", "_scale", "_shape")


def packed_entries(
    entries: Sequence[TensorEntry], tensors: Mapping[str, QuantizedTensor]
) -> Iterator[TensorEntry]:
    """Yield entries with those of quantized weights replaced by their three parts."""
    for entry in entries:
        if entry.name not in tensors:
            yield entry
            continue
        tensor = tensors[entry.name]
        arrays = (tensor.words, tensor.scales, np.array(tensor.shape, np.int64))
        for part, dtype, array in zip(_PARTS, ("I32", tensor.dtype, "I64"), arrays, strict=True):
            yield TensorEntry(entry.name + part, array.shape, dtype, partial(np.asarray, array))


def split_config(
    values: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], QuantizationScheme | None]:
    """Return config.json without its `quantization_config`, and the scheme that this names.

    Raises:
        ConfigError: it names another format than the one that is written here.
    """
    rest = dict(values)
    quantization = rest.pop(QUANTIZATION_KEY, None)
    if quantization is None:
        return rest, None
    return rest, QuantizationScheme.from_config(quantization, source)


def open_tensors(directory: Path) -> TensorFiles:
    """Return the tensors of a model directory; quantized weights appear as numbers."""
    config = directory / "config.json"
    scheme = split_config(read_config_json(config), str(config))[1] if config.exists() else None
    return TensorFiles(directory) if scheme is None else QuantizedFiles(directory, scheme)


class QuantizedFiles(TensorFiles):
    """Read a directory with quantized weights: each appears as one tensor, dequantized on access.

    Raises:
        WeightsError: as of `TensorFiles`; a weight lacks a part, or its parts do not fit.
    """

    def __init__(self, directory: Path, scheme: QuantizationScheme) -> None:
        super().__init__(directory)
        self._scheme, self._parts = scheme, TensorFiles(directory)
        for packed in [name for name in self.stored if name.endswith(".weight_packed")]:
            name = packed.removesuffix("_packed")
            if missing := [name + part for part in _PARTS if name + part not in self._parts]:
                raise WeightsError(f"{directory}: {packed} lacks {', '.join(missing)} beside it")
            for part in _PARTS:
                del self.stored[name + part]
            shape, scale = self._parts[f"{name}_shape"], self._parts.stored[f"{name}_scale"]
            self.stored[name] = replace(scale, shape=tuple(shape.reshape(-1).tolist()))

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._parts:
            return super().__getitem__(name)
        words, scales, shape = (self._parts[name + part] for part in _PARTS)
        scheme, dtype = self._scheme, self.stored[name].dtype
        if problem := scheme.misfit(words, scales, shape):
            raise WeightsError(f"{self.stored[name].file}: {name}_packed: {problem}")
        scales = scales.astype(np.float32)
        return QuantizedTensor(words, scales, int(shape[1]), dtype, scheme).dequantize()
