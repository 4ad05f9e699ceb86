"""Layers, or parts of them, that are run again in the backward pass instead of kept.

Memory is what it saves, operations what it costs, and with experts on several ranks their exchange:
a part keeps the stream that enters it and nothing else.

Shapes: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.distributed.fleet import utils
from pydantic import ValidationInfo, field_validator

from ernie_train.core import process_group
from ernie_train.core.config import PositiveInt, StrictConfig
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
    chunk_tokens: experts, or the MLP, take so many tokens of a micro-batch at a time, so that
        their own activations do not grow with it; all at once where it is absent.
    """

    parts: tuple[Part, ...] = PARTS
    layers: PositiveInt | None = None
    chunk_tokens: PositiveInt | None = None

    @field_validator("parts")
    @classmethod
    def _some_and_each_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if not parts:
            raise ValueError(f"name one of {', '.join(PARTS)}, or say `recompute: false`")
        if doubled := [part for part in PARTS if parts.count(part) > 1]:
            raise ValueError(f"{doubled[0]} stands there twice")
        return tuple(part for part in PARTS if part in parts)

    @field_validator("chunk_tokens")
    @classmethod
    def _of_experts(cls, chunk_tokens: int | None, known: ValidationInfo) -> int | None:
        if chunk_tokens is not None and "experts" not in known.data.get("parts", PARTS):
            raise ValueError("has no effect without experts among the parts")
        return chunk_tokens

    def of_layer(self, layer: int) -> frozenset[Part]:
        """What is run again of layer `layer` (from 0)."""
        within = self.layers is None or layer < self.layers
        return frozenset(self.parts if within else ())


# As a recipe says it: true is every layer as a whole.
Recompute = bool | RecomputeConfig


def recomputed_parts(recompute: Recompute, layer: int) -> frozenset[Part]:
    """What is run again of layer `layer` (from 0)."""
    return frozenset() if recompute is False else _config(recompute).of_layer(layer)


def chunk_tokens(recompute: Recompute) -> int | None:
    """Tokens that experts take at a time where they are run again; None: all."""
    return None if recompute is False else _config(recompute).chunk_tokens


def _config(recompute: Literal[True] | RecomputeConfig) -> RecomputeConfig:
    return RecomputeConfig() if recompute is True else recompute


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

    def add_attention(x: Tensor) -> Tensor:
        return layer.add_attention(x, tables, None)

    if parts == {"attention"}:
        return layer.add_experts(utils.recompute(add_attention, x))
    whole, size = len(parts) == len(PARTS), chunk_tokens(recompute)
    if not whole:
        x = add_attention(x)
    if size is not None:
        return _in_chunks(layer, size, x, add_attention if whole else None)
    return _experts_again(lambda x: layer(x, tables, None) if whole else layer.add_experts(x), x)


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


# ---- experts in chunks ---------------------------------------------------------------------------


def _in_chunks(
    layer: DecoderLayer, size: int, x: Tensor, before: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, RouterOutput]:
    """`add_experts` of x [T,H], of `before(x)` if there is one, `size` tokens at a time."""
    chunks = _chunks(x.shape[0], size, layer.is_moe and process_group.grid().expert > 1)
    y, *routed = _InChunks.apply(x, layer, before, chunks)
    # None are dropped: with a capacity a chunk would count for itself, so both are refused.
    return y, (*routed, 0) if routed else None


def _chunks(tokens: int, size: int, together: bool) -> list[slice]:
    """Slices of a micro-batch; `together` as many on each rank, empty ones where it has no more.

    Micro-batches differ in tokens, and every exchange must meet those of the other ranks.
    """
    own = -(-tokens // size)
    count = int(process_group.all_gather_ints([own]).max()) if together else own
    return [slice(min(i * size, tokens), min((i + 1) * size, tokens)) for i in range(count)]


class _InChunks(PyLayer):
    """x [T,H] -> x [T,H], and of an MoE layer the router's logits [T,E] and expert ids [T,K].

    Both passes go through the chunks in one order, so exchanges meet on all ranks. For an empty
    chunk the first token runs, and what comes of it is thrown away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: DecoderLayer,
        before: Callable[[Tensor], Tensor] | None,
        chunks: list[slice],
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.layer, ctx.before, ctx.chunks = layer, before, chunks
        ctx.set_materialize_grads(False)
        stream = x if before is None else before(x)
        outputs = []
        for chunk in chunks:
            y, routed = layer.add_experts(_tokens(stream, chunk))
            if not _is_empty(chunk):
                outputs.append((y, *(routed or ())[:2]))
        joined = tuple(map(paddle.concat, zip(*outputs, strict=True)))
        if len(joined) > 1:
            ctx.mark_non_differentiable(joined[2])
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor:
        (x,) = ctx.saved_tensor()
        with paddle.enable_grad():
            if ctx.before is None:
                return _back_through_chunks(ctx, x, grads)
            x = _leaf(x)
            stream = ctx.before(x)
            paddle.autograd.backward([stream], [_back_through_chunks(ctx, stream, grads)])
            return x.grad


def _back_through_chunks(ctx: Any, stream: Tensor, grads: tuple[Tensor | None, ...]) -> Tensor:
    """Gradient of what goes into the experts, [T,H]; their own parameters get theirs."""
    pieces = []
    for chunk in ctx.chunks:
        piece = _leaf(_tokens(stream, chunk))
        y, routed = ctx.layer.add_experts(piece)
        outputs = [y, *(routed or ())[:1]]
        told = [_gradient(g, o, chunk) for g, o in zip(grads, outputs, strict=False)]
        paddle.autograd.backward(outputs, told)
        if not _is_empty(chunk):
            pieces.append(piece.grad)
    return paddle.concat(pieces)


def _is_empty(chunk: slice) -> bool:
    return bool(chunk.start == chunk.stop)


def _tokens(x: Tensor, chunk: slice) -> Tensor:
    return x[:1] if _is_empty(chunk) else x[chunk]


def _leaf(x: Tensor) -> Tensor:
    x = x.detach()
    x.stop_gradient = False
    return x


def _gradient(grad: Tensor | None, output: Tensor, chunk: slice) -> Tensor:
    """The part of `grad` for `output`: zeros where nothing depends on it, or it was no token's."""
    if grad is None or _is_empty(chunk):
        return paddle.zeros_like(output)
    return grad[chunk]
