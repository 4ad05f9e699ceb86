"""Settings of a quantized export, and the rows that it is calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ernie_train.core.config import PositiveInt, StrictConfig
from ernie_train.core.errors import UserError
from ernie_train.data import DataSource, Tokenizer, load_sources
from ernie_train.data.packing import permutation
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.run.stages import AnyStageConfig
from ernie_train.train.supervised_data import SupervisedConfig
from ernie_train.weights.hf import DTYPES
from ernie_train.weights.layout import tensor_mappings
from ernie_train.weights.quantize import (
    Quantization,
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


@dataclass(frozen=True)
class Quantizer:
    """Quantizes a model by `config`; `rows` are those of gptq, relative to `base_dir`."""

    config: QuantizeConfig
    rows: Sequence[DataSource]
    base_dir: Path
    seed: int = 0

    def run(self, model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, dtype: str) -> Quantization:
        """Quantize a float32 model in place; scales are stored as `dtype`."""
        config = self.config
        shapes = {
            mapping.stored: mapping.stored_shape
            for mapping in tensor_mappings(model.config)
            if is_quantized(mapping.stored)
        }
        scheme = choose_scheme(config.to, shapes, config.group_size)
        documents = self._documents(model, tokenizer) if config.method == "gptq" else []
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
        )
        every = [document for part in found for document in part]
        drawn: list[list[int]] = []
        room = self.config.calibration_tokens
        for index in permutation(len(every), self.seed):
            drawn.append(every[int(index)].ids[:room].tolist())
            room -= len(drawn[-1])
            if room == 0:
                break
        return drawn


def stage_rows(stages: Sequence[AnyStageConfig]) -> list[DataSource]:
    """Return the data of the last stage that trains on rows as they are; none without one."""
    for stage in reversed(stages):
        if isinstance(stage, SupervisedConfig):
            return list(stage.data)
    return []


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
