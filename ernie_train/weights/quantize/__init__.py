"""Weight-only quantization: int8 and int4, to nearest or by GPTQ, in compressed-tensors' format."""

from ernie_train.weights.quantize.calibration import (
    Quantization,
    is_quantized,
    quantize_model,
)
from ernie_train.weights.quantize.gptq import gptq, inverse_factor
from ernie_train.weights.quantize.scheme import (
    QuantizationScheme,
    choose_scheme,
    round_to_nearest,
)
from ernie_train.weights.quantize.stored import (
    QUANTIZATION_KEY,
    open_tensors,
    packed_entries,
    split_config,
)

__all__ = [
    "QUANTIZATION_KEY",
    "Quantization",
    "QuantizationScheme",
    "choose_scheme",
    "gptq",
    "inverse_factor",
    "is_quantized",
    "open_tensors",
    "packed_entries",
    "quantize_model",
    "round_to_nearest",
    "split_config",
]
