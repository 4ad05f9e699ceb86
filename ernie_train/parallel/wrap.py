"""Making a model for training: its experts' place, parameter dtypes and recomputation."""

from __future__ import annotations

from typing import Any

from paddle import Tensor
from paddle.distributed.fleet.utils import recompute

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.attention import AttentionTables
from ernie_train.model.autograd import default_dtype, dtype_name
from ernie_train.model.kv_cache import KVCache
from ernie_train.model.transformer import DecoderLayer, RouterOutput, run_layer
from ernie_train.parallel.expert import experts_placed


def new_model(config: Ernie4_5_MoeConfig, dtype: str) -> Ernie4_5_MoeForCausalLM:
    """A freshly initialized model with parameters of `dtype`; router and its bias stay float32.

    It holds the experts that the grid gives to this rank, with the numbers that they have on one.
    Raises `ConfigError` where the grid does not fit the experts.
    """
    with default_dtype(dtype):
        return Ernie4_5_MoeForCausalLM(config, experts_placed(config))


def clone_model(model: Ernie4_5_MoeForCausalLM) -> Ernie4_5_MoeForCausalLM:
    """A model of its own with the same weights, dtype and RoPE base, in eval mode, not trained."""
    with default_dtype(dtype_name(model.head()[0])):
        copy = Ernie4_5_MoeForCausalLM(model.config, model.model.placement)
    copy.set_state_dict(model.state_dict())
    copy.set_rope_theta(model.model.rope_theta)
    for parameter in copy.parameters():
        parameter.stop_gradient = True
    copy.eval()
    return copy


def enable_recompute(model: Ernie4_5_MoeForCausalLM) -> None:
    """Runs each layer again in the backward pass instead of keeping its activations.

    Router logits and expert ids are outputs of the layer, so gradients flow through them and
    statistics are taken once, from the first pass.
    """
    model.model.run_layer = _run_layer_recomputed


def _run_layer_recomputed(
    layer: DecoderLayer, x: Tensor, tables: AttentionTables, cache: KVCache | None
) -> tuple[Tensor, RouterOutput]:
    if not layer.training or cache is not None:
        return run_layer(layer, x, tables, cache)
    dropped: list[int] = []

    def tensors_only(x: Tensor) -> Any:
        y, routed = layer(x, tables, None)
        if routed is None:
            return y
        dropped.append(routed[2])
        return y, routed[0], routed[1]

    outputs = recompute(tensors_only, x)
    if not layer.is_moe:
        return outputs, None
    y, router_logits, expert_ids = outputs
    return y, (router_logits, expert_ids, dropped[0])
