"""Weight-only quantization: its scheme, rounding to nearest, and its entry in config.json.

The scheme is symmetric: weight = code * scale, one scale for a row of a Linear weight [out,in] or
for each group of its inputs. Scales are those of compressed-tensors' `calculate_qparams`, packed
codes those of its `pack-quantized` (compressors/pack_quantized/helpers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_train.core.errors import ConfigError, UserError, WeightsError
from ernie_train.io.safetensors import convert, from_bfloat16

GROUP_SIZES = (128, 32)  # those of int4, the first that divides the inputs of every weight
FORMAT = "pack-quantized"
# Modules that stay as they are: compressed-tensors targets every other Linear.
IGNORED = ("lm_head", r"re:.*\.mlp\.gate$")
# So do those of multi-token prediction, which a model may carry (`is_mtp_name`).
IGNORED_MTP = r"re:(?:.*\.)?mtp.*"
_SMALLEST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}


@dataclass(frozen=True)
class QuantizationScheme:
    """Bits of a code, and the number of inputs that share a scale (None: a whole row does)."""

    bits: int
    group_size: int | None = None

    @property
    def name(self) -> str:
        """Return "int8" or "int4 in groups of 32"."""
        return f"int{self.bits}" + (f" in groups of {self.group_size}" if self.group_size else "")

    @property
    def largest(self) -> int:
        """Return the largest code; the smallest is one further from zero."""
        return int(2 ** (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Return the number of scales of a row with so many inputs."""
        return columns // (self.group_size or columns)

    def scales(self, weight: np.ndarray, dtype: str) -> np.ndarray:
        """Return the scales [out,groups] of a weight [out,in], rounded to a stored dtype.

        Raises:
            WeightsError: the weight holds NaN or infinity, or a scale is too large for the dtype.
        """
        grouped = weight.reshape(len(weight), self.groups(weight.shape[1]), -1)
        # From -2^(B-1) to 2^(B-1)-1 are 2^B - 1 steps: half of them on each side of zero.
        found = np.abs(grouped).max(-1) / ((2**self.bits - 1) / 2)
        found = rounded(found.astype(np.float32), dtype)
        if not np.isfinite(found).all():
            raise WeightsError("a number of it is NaN or infinite")
        return np.where(found == 0, np.finfo(np.float32).eps, found).astype(np.float32)

    def encode(self, weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Return the codes of weights [out,in], to nearest, for scales that broadcast to them."""
        return np.clip(np.rint(weight / scales), -self.largest - 1, self.largest).astype(np.int8)

    def misfit(self, words: np.ndarray, scales: np.ndarray, shape: np.ndarray) -> str | None:
        """Return how the stored parts of a weight do not fit each other; None if they do."""
        if shape.shape == (2,) and words.dtype == np.int32:
            rows, columns = (int(size) for size in shape)
            fit = (rows, -(-columns * self.bits // 32)) == words.shape
            if fit and columns and scales.shape == (rows, self.groups(columns)):
                return None if np.isfinite(scales).all() else "a scale is NaN or infinite"
        return (
            f"{words.dtype} {list(words.shape)}, scales {list(scales.shape)} and the shape "
            f"{shape.tolist()} do not fit {self.name}"
        )

    def to_config(self) -> dict[str, Any]:
        """Return `quantization_config` of config.json."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "group" if self.group_size else "channel", "group_size": self.group_size,
            "actorder": None, "block_structure": None, "observer": "minmax",
        }  # fmt: skip
        group = {
            "targets": ["Linear"], "weights": weights, "format": FORMAT,
            "input_activations": None, "output_activations": None,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": FORMAT,
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": [*IGNORED, IGNORED_MTP], "kv_cache_scheme": None,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> QuantizationScheme:
        """Read `quantization_config` of config.json; `source` names the file.

        Raises:
            ConfigError: it is not one of those that `to_config` makes.
        """
        try:
            (group,) = config["config_groups"].values()
            size = group["weights"].get("group_size")
            found = cls(int(group["weights"]["num_bits"]), size)
            known = found.bits in (4, 8) and _essence(config) == _essence(found.to_config())
            known &= size is None or (type(size) is int and size > 0)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
            known = False
        if not known:
            raise ConfigError(
                "quantization_config: quantized weights can be read in compressed-tensors' format "
                f"{FORMAT} alone, symmetric int4 or int8 of every Linear but router and head",
                source=source,
            )
        return found


def _essence(config: Mapping[str, Any]) -> list[Any]:
    """Return what numbers depend on: names of observers and the like do not matter."""
    (group,) = config["config_groups"].values()
    weights = group["weights"]
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")
    return [
        config["quant_method"], config["format"], group["targets"],
        sorted({*config["ignore"]} - {IGNORED_MTP}),  # versions before wrote it not
        group.get("input_activations"), *(weights.get(key) for key in keys),
    ]  # fmt: skip


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [out,in] as packed codes and float32 scales [out,groups] of a stored `dtype`."""

    words: np.ndarray
    scales: np.ndarray
    columns: int
    dtype: str
    scheme: QuantizationScheme

    @classmethod
    def of(
        cls, codes: np.ndarray, scales: np.ndarray, dtype: str, scheme: QuantizationScheme
    ) -> QuantizedTensor:
        """Pack codes [out,in]."""
        return cls(pack(codes, scheme.bits), scales, codes.shape[1], dtype, scheme)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.words), self.columns

    def is_coarse(self) -> bool:
        """Return whether a scale is so small that its dtype keeps few of its digits.

        A group of zeros has no use for its scale and does not count.
        """
        small = self.scales < _SMALLEST_NORMAL[self.dtype]
        if not small.any():
            return False
        codes = unpack(self.words, self.scheme.bits, self.columns)
        return bool(codes.reshape(*self.scales.shape, -1).any(-1)[small].any())

    def dequantize(self) -> np.ndarray:
        """Return the float32 weight [out,in], rounded to `dtype` as loaders do."""
        codes = unpack(self.words, self.scheme.bits, self.columns)
        wide = np.repeat(self.scales, self.columns // self.scales.shape[1], axis=1)
        return rounded(codes * wide, self.dtype)


def round_to_nearest(weight: np.ndarray, scheme: QuantizationScheme, dtype: str) -> QuantizedTensor:
    """Quantize a float32 weight [out,in], each number by itself; scales are stored as `dtype`."""
    scales = scheme.scales(weight, dtype)
    wide = np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
    return QuantizedTensor.of(scheme.encode(weight, wide), scales, dtype, scheme)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 numbers to a stored dtype ("F32", "BF16", "F16"); return them as float32."""
    found = convert(array, dtype)
    return from_bfloat16(found) if dtype == "BF16" else found.astype(np.float32, copy=False)


def choose_scheme(
    name: str, shapes: Mapping[str, tuple[int, ...]], group_size: int | None = None
) -> QuantizationScheme:
    """Return the scheme of a name, "int8" or "int4", for weights of these shapes [out,in].

    Raises:
        UserError: int4 has no group size that divides the inputs of every weight.
        ConfigError: the name is unknown, or int8 is given a group size.
    """
    if name not in ("int8", "int4"):
        raise ConfigError(f"quantize must be int8 or int4, not {name!r}")
    if name == "int8":
        if group_size is not None:
            raise ConfigError("group_size belongs to int4: int8 has one scale a row")
        return QuantizationScheme(8)
    sizes = GROUP_SIZES if group_size is None else (group_size,)
    for size in sizes:
        odd = [stored for stored, shape in shapes.items() if shape[1] % size]
        if not odd:
            return QuantizationScheme(4, size)
    raise UserError(
        f"int4: groups of {' or '.join(map(str, sizes))} do not divide the {shapes[odd[0]][1]} "
        f"inputs of {odd[0]}: choose int8, or another group size"
    )


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes [out,in] -> int32 words [out, ceil(in * bits / 32)].

    Value v of B bits is stored as v + 2^(B-1); value i of a row lies in word i // (32/B), from bit
    B * (i mod (32/B)) on; the last word of a row is filled up with zeros.
    """
    rows, columns = codes.shape
    per_word = 32 // bits
    words = np.zeros((rows, -(-columns // per_word)), np.uint32)
    unsigned = (codes.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint32)
    for place in range(per_word):
        part = unsigned[:, place::per_word]
        words[:, : part.shape[1]] |= part << np.uint32(bits * place)
    return words.view(np.int32)


def unpack(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unpack words [out, ...] -> codes [out, columns] int8: undo `pack`."""
    per_word = 32 // bits
    shifts = (bits * np.arange(per_word)).astype(np.uint32)
    unsigned = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    flat = unsigned.reshape(len(words), -1)[:, :columns].astype(np.int16)
    return (flat - 2 ** (bits - 1)).astype(np.int8)
