"""Quantize the Linear weights of a model: each by itself, or by GPTQ on what enters its layer.

Shapes: T tokens, H hidden size, R rows routed to experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core.errors import DataError, WeightsError
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.layers import ACTIVATIONS
from ernie_train.weights.layout import TensorMapping, tensor_mappings
from ernie_train.weights.quantize.gptq import gptq, inverse_factor
from ernie_train.weights.quantize.scheme import (
    QuantizationScheme,
    QuantizedTensor,
    round_to_nearest,
)

_log = logging.getLogger(__name__)

# What reads the same input: its Hessian is that of the projection named here.
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_Input = tuple[str, int | None]  # a projection of the layer, and the expert if it is one's


@dataclass
class Quantization:
    """The quantized weights of a model by stored name, and how they came about.

    few_tokens: experts' weights that were rounded to nearest, since fewer calibration tokens
        reached them than they have inputs.
    """

    scheme: QuantizationScheme
    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    few_tokens: list[str] = field(default_factory=list)
    tokens: int = 0  # of the calibration; 0: each weight was rounded to nearest


def is_quantized(stored: str) -> bool:
    """Return whether a stored tensor is a weight that is quantized.

    These are the Linear weights of attention, MLPs and experts. Router, norms, embeddings, head and
    biases stay as they are.
    """
    return stored.endswith("_proj.weight")


def quantize_model(
    model: Ernie4_5_MoeForCausalLM,
    scheme: QuantizationScheme,
    dtype: str,
    calibration: Sequence[Sequence[int]] = (),
) -> Quantization:
    """Quantize a model in place: it then computes with the dequantized weights.

    With `calibration`, token ids of documents, each layer is quantized by GPTQ on what it receives
    from the layers before it, which are quantized by then; else every weight is rounded to nearest.
    The model must be whole, on one rank.

    Args:
        model: the model, with float32 weights.
        scheme: bits and groups.
        dtype: the stored dtype of the scales, "F32", "BF16" or "F16".
        calibration: documents of one token or more.

    Raises:
        WeightsError: names a weight with a scale or inputs that are NaN or infinite.
    """
    result = Quantization(scheme, tokens=sum(map(len, calibration)))
    mappings = [m for m in tensor_mappings(model.config) if is_quantized(m.stored)]
    if not calibration:
        _replace(model, mappings, result, lambda m, w: round_to_nearest(w, scheme, dtype))
        return result

    def run_layer(layer: Any, x: Tensor, *rest: Any) -> Any:
        inputs = _LayerInputs(layer)
        with inputs:
            layer(x, *rest)
        here = f"model.layers.{layer.layer_index}."

        def quantize(mapping: TensorMapping, weight: np.ndarray) -> QuantizedTensor:
            key = _input_of(mapping, here)
            if inputs.tokens[key] < weight.shape[1] and ".experts." in mapping.stored:
                result.few_tokens.append(mapping.stored)
                return round_to_nearest(weight, scheme, dtype)
            return gptq(weight, inputs.factor(key), scheme, dtype)

        _replace(model, [m for m in mappings if m.stored.startswith(here)], result, quantize)
        return layer(x, *rest)

    _run_through(model, calibration, run_layer)
    return result


def _run_through(
    model: Ernie4_5_MoeForCausalLM,
    documents: Sequence[Sequence[int]],
    run_layer: Callable[..., Any],
) -> None:
    """Run all documents through the model at once, each layer by `run_layer`."""
    if max(map(len, documents)) > model.config.max_position_embeddings:
        raise DataError("a document of the calibration is longer than max_position_embeddings")
    ids = np.concatenate([np.asarray(document, np.int64) for document in documents])
    numbers = np.repeat(np.arange(1, len(documents) + 1), list(map(len, documents)))
    inner = model.model
    before, inner.run_layer = inner.run_layer, run_layer
    model.eval()
    try:
        with paddle.no_grad():
            inner(paddle.to_tensor(ids[None]), document_ids=paddle.to_tensor(numbers[None]))
    finally:
        inner.run_layer = before


def _replace(
    model: Ernie4_5_MoeForCausalLM,
    mappings: Sequence[TensorMapping],
    result: Quantization,
    quantize: Callable[[TensorMapping, np.ndarray], QuantizedTensor],
) -> None:
    """Quantize the stored weights of `mappings`, and put what they dequantize to into the model."""
    state = model.state_dict()
    for name in dict.fromkeys(mapping.parameter for mapping in mappings):
        array = state[name].astype("float32").numpy()
        for mapping in (m for m in mappings if m.parameter == name):
            weight = np.ascontiguousarray(mapping.to_stored(array))
            try:
                quantized = quantize(mapping, weight)
            except WeightsError as error:
                raise WeightsError(f"{mapping.stored} cannot be quantized: {error}") from None
            if quantized.is_coarse():
                _log.warning(
                    "%s: scales below the normal numbers of %s lose digits; export as bfloat16",
                    mapping.stored, quantized.dtype,
                )  # fmt: skip
            result.tensors[mapping.stored] = quantized
            mapping.copy_from_stored(array, quantized.dequantize())
        state[name].set_value(array)


def _input_of(mapping: TensorMapping, layer: str) -> _Input:
    """Return the input that a stored weight of `layer` ("model.layers.3.") multiplies."""
    module = mapping.parameter.removeprefix(layer).removesuffix(".weight")
    place, _, last = module.rpartition(".")
    expert = next((at for at in mapping.at if isinstance(at, int)), None)
    return f"{place}.{_SHARED.get(last, last)}", expert


class _LayerInputs:
    """Sum x x^T over the inputs of the Linears of a decoder layer, while it runs in this context.

    An expert's row is the token as it arrives; before its last projection, the inner activation
    times the router's weight, since that is what the model multiplies.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.tokens: dict[_Input, int] = {}
        self._hessians: dict[_Input, np.ndarray] = {}
        self._factors: dict[_Input, np.ndarray] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.layer.named_sublayers():
            if isinstance(module, paddle.nn.Linear) and name.split(".")[-1] not in _SHARED:
                self._hooks.append(module.register_forward_pre_hook(self._linear(name)))
            elif name == "mlp.experts":
                self._hooks.append(module.register_forward_pre_hook(self._experts(name)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def factor(self, key: _Input) -> np.ndarray:
        """Return the `inverse_factor` of an input's sum, which several weights may share."""
        if key not in self._factors:
            hessian = self._hessians.pop(key)
            if not np.isfinite(hessian).all():
                raise WeightsError("on rows of the calibration its inputs are NaN or infinite")
            self._factors[key] = inverse_factor(hessian)
        return self._factors[key]

    def _add(self, key: _Input, x: Tensor) -> None:
        x = x.astype("float32")
        self._hessians[key] = paddle.matmul(x, x, transpose_x=True).numpy()
        self.tokens[key] = int(x.shape[0])

    def _linear(self, name: str) -> Callable[..., None]:
        return lambda _, inputs: self._add((name, None), inputs[0])

    def _experts(self, name: str) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[Tensor, Tensor, list[int]]) -> None:
            rows, weights, counts = inputs
            act, start = ACTIVATIONS[module.hidden_act], 0
            for expert, count in enumerate(counts):
                x, weight = rows[start : start + count], weights[start : start + count]
                start += count
                gate = paddle.matmul(x, module.gate_proj[expert])
                inner = act(gate) * paddle.matmul(x, module.up_proj[expert])
                self._add((f"{name}.gate_proj", expert), x)
                self._add((f"{name}.down_proj", expert), inner * weight.astype(inner.dtype))

        return add
