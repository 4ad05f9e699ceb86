"""Layers, or parts of them, that are run again in the backward pass instead of kept.

Memory is what it saves, operations what it costs, and with experts on several ranks their exchange:
a part keeps the stream that enters it and nothing else.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

from paddle import Tensor
from paddle.distributed.fleet import utils
from pydantic import field_validator

from ernie_train.config import PositiveInt, StrictConfig
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.attention import AttentionTables
from ernie_train.model.kv_cache import KVCache
from ernie_train.model.transformer import DecoderLayer, RouterOutput, run_layer

Part = Literal["attention", "experts"]
PARTS: tuple[Part, ...] = get_args(Part)


class RecomputeConfig(StrictConfig):
    """What is run again; each part takes its norm with it.

    parts: attention, experts (router and shared experts included; the MLP of a dense layer), or
        both, which then are one: the layer.
    layers: the first so many layers, all where it is absent. The first ones, because theirs are
        the activations that stand longest.
    """

    parts: tuple[Part, ...] = PARTS
    layers: PositiveInt | None = None

    @field_validator("parts")
    @classmethod
    def _some_and_each_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if not parts:
            raise ValueError(f"name one of {', '.join(PARTS)}, or say `recompute: false`")
        if doubled := [part for part in PARTS if parts.count(part) > 1]:
            raise ValueError(f"{doubled[0]} stands there twice")
        return tuple(part for part in PARTS if part in parts)

    def of_layer(self, layer: int) -> frozenset[Part]:
        """What is run again of layer `layer` (from 0)."""
        within = self.layers is None or layer < self.layers
        return frozenset(self.parts if within else ())


# As a recipe says it: true is every layer as a whole.
Recompute = bool | RecomputeConfig


def recomputed_parts(recompute: Recompute, layer: int) -> frozenset[Part]:
    """What is run again of layer `layer` (from 0)."""
    if recompute is False:
        return frozenset()
    return (RecomputeConfig() if recompute is True else recompute).of_layer(layer)


def enable_recompute(model: Ernie4_5_MoeForCausalLM, recompute: Recompute = True) -> None:
    """Runs what `recompute` names again in the backward pass instead of keeping its activations.

    Router logits and expert ids are outputs of what is run, so gradients flow through them and
    statistics are taken once, from the first pass. A rank repeats its exchanges where it meets
    them on the way back, as all ranks do.
    """
    model.model.run_layer = partial(_run_layer, recompute) if recompute else run_layer


def _run_layer(
    recompute: Recompute,
    layer: DecoderLayer,
    x: Tensor,
    tables: AttentionTables,
    cache: KVCache | None,
) -> tuple[Tensor, RouterOutput]:
    parts = recomputed_parts(recompute, layer.number)
    if not parts or not layer.training or cache is not None:
        return run_layer(layer, x, tables, cache)
    if len(parts) == len(PARTS):
        return _experts_again(lambda x: layer(x, tables, None), x)
    if "experts" in parts:
        return _experts_again(layer.add_experts, layer.add_attention(x, tables, None))
    x = utils.recompute(lambda x: layer.add_attention(x, tables, None), x)
    return layer.add_experts(x)


def _experts_again(run: Any, x: Tensor) -> tuple[Tensor, RouterOutput]:
    """`run`: x [T,H] -> x [T,H] and what the router did, of which Paddle takes tensors alone."""
    dropped: list[int] = []

    def tensors_only(x: Tensor) -> Any:
        y, routed = run(x)
        if routed is None:
            return y
        dropped.append(routed[2])
        return y, routed[0], routed[1]

    outputs = utils.recompute(tensors_only, x)
    if not dropped:  # a dense layer
        return outputs, None
    y, router_logits, expert_ids = outputs
    return y, (router_logits, expert_ids, dropped[0])
