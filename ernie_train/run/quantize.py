"""Settings of a quantized export, and the rows that it is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, model_validator

from ernie_train.core.config import PositiveInt, StrictConfig, is_recorded
from ernie_train.core.errors import UserError
from ernie_train.data import DataSource, Tokenizer, load_sources
from ernie_train.data.packing import epoch_order
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.run.stages import AnyStageConfig
from ernie_train.train.supervised_data import SupervisedConfig
from ernie_train.weights.hf import DTYPES
from ernie_train.weights.layout import tensor_mappings
from ernie_train.weights.quantize import (
    Quantization,
    QuantizationScheme,
    choose_scheme,
    is_quantized,
    quantize_model,
)

LONGEST = 2048  # tokens of a document of the calibration


class QuantizeConfig(StrictConfig):
    """Weight-only quantization of an export, in compressed-tensors' format."""

    to: Literal["int8", "int4"]
    """`int8` has a scale for each row of a weight, `int4` one for each group of inputs."""
    method: Literal["gptq", "rtn"] = "gptq"
    """`gptq` rounds so that outputs on rows of the last `pretrain` or `sft` stage change least;
    `rtn` rounds each number by itself.
    """
    group_size: PositiveInt | None = None
    """Inputs that share a scale of `int4`; unless given 128, or 32 where a weight's inputs are no
    multiple of 128.
    """
    calibration_tokens: PositiveInt = 16384
    """Tokens that `gptq` draws from those rows; experts that fewer tokens reach than they have
    inputs are rounded by `rtn`, and named in the receipt.
    """

    @model_validator(mode="after")
    def _of_its_kind(self, info: ValidationInfo) -> QuantizeConfig:
        if is_recorded(info):
            return self
        if self.to == "int8" and self.group_size is not None:
            raise ValueError("group_size belongs to int4: int8 has one scale a row; leave it out")
        tokens = type(self).model_fields["calibration_tokens"].default
        if self.method == "rtn" and self.calibration_tokens != tokens:
            raise ValueError("calibration_tokens: rtn looks at no rows; leave it out, or take gptq")
        return self

    def scheme(self, model: Ernie4_5_MoeConfig) -> QuantizationScheme:
        """Return the scheme for the weights of a model; the errors are those of `choose_scheme`."""
        shapes = {
            mapping.stored: mapping.stored_shape
            for mapping in tensor_mappings(model)
            if is_quantized(mapping.stored)
        }
        return choose_scheme(self.to, shapes, self.group_size)


@dataclass(frozen=True)
class Quantizer:
    """Quantizes a model by `config`; `rows` are those of gptq, relative to `base_dir`.

    A source of which a larger share than `max_bad_fraction` (0..1) is bad is refused.
    """

    config: QuantizeConfig
    rows: Sequence[DataSource]
    base_dir: Path
    seed: int = 0
    max_bad_fraction: float = 0.01

    @classmethod
    def on_rows_of(
        cls, stages: Sequence[AnyStageConfig], config: QuantizeConfig, base_dir: Path, seed: int = 0
    ) -> Quantizer:
        """Return one that calibrates as the last stage that trains on rows reads its data."""
        if (stage := stage_with_rows(stages)) is None:
            return cls(config, [], base_dir, seed)
        return cls(config, stage.data, base_dir, seed, stage.max_bad_fraction)

    def run(self, model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, dtype: str) -> Quantization:
        """Quantize a float32 model in place; scales are stored as `dtype`."""
        scheme = self.config.scheme(model.config)
        documents = self._documents(model, tokenizer) if self.config.method == "gptq" else []
        return quantize_model(model, scheme, DTYPES[dtype], documents)

    def _documents(self, model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer) -> list[list[int]]:
        """Draw documents until they have `calibration_tokens`; the last one is cut there."""
        if not self.rows:
            raise UserError(
                "gptq needs rows to calibrate on, and there is no stage of pretrain or sft to take "
                "them from: give --calibration FILE, or the method rtn"
            )
        found, _ = load_sources(
            self.rows,
            tokenizer,
            kind="pretrain",  # conversations are read whole
            seq_len=min(LONGEST, model.config.max_position_embeddings),
            base_dir=self.base_dir,
            max_bad_fraction=self.max_bad_fraction,
        )
        drawn: list[list[int]] = []
        room = self.config.calibration_tokens
        weights = [source.weight for source in self.rows]
        order = epoch_order([len(part) for part in found], weights, self.seed, 0)
        for source, index in zip(*order, strict=True):
            drawn.append(found[int(source)][int(index)].ids[:room].tolist())
            room -= len(drawn[-1])
            if room == 0:
                break
        return drawn


def stage_with_rows(stages: Sequence[AnyStageConfig]) -> SupervisedConfig | None:
    """Return the last stage that trains on rows as they are; None without one."""
    return next((s for s in reversed(stages) if isinstance(s, SupervisedConfig)), None)


def describe(quantization: Quantization | None) -> dict[str, Any] | None:
    """Return what the receipt says of a quantization."""
    if quantization is None:
        return None
    return {
        "scheme": quantization.scheme.name,
        "method": "gptq" if quantization.tokens else "rtn",
        "calibration_tokens": quantization.tokens,
        "weights": len(quantization.tensors),
        "rounded_for_few_tokens": quantization.few_tokens,
    }
