"""Activation recomputation: layers, or parts of them, run again in the backward pass.

A recomputed part keeps its input (the residual stream) and no other activation. It costs the
operations of a second forward pass and, with experts on several ranks, the all-to-alls of one.

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
from ernie_train.core.autograd import once_differentiable
from ernie_train.core.config import PositiveInt, StrictConfig
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.attention import AttentionTables
from ernie_train.model.kv_cache import KVCache
from ernie_train.model.transformer import DecoderLayer, RouterOutput, run_layer
from ernie_train.parallel.collectives import get_collectives

Part = Literal["attention", "experts"]
PARTS: tuple[Part, ...] = get_args(Part)


class RecomputeConfig(StrictConfig):
    """Settings of recomputation; each part includes its norm."""

    parts: tuple[Part, ...] = PARTS
    """`attention`, `experts` (with router and shared experts; the MLP of a dense layer), or both,
    which are then recomputed as one.
    """
    layers: PositiveInt | None = None
    """Recomputes only this many first layers, whose activations are held longest; all unless given.
    """
    chunk_tokens: PositiveInt | None = None
    """Runs experts, or the MLP, on this many tokens of a micro-batch at a time, so that their
    activations do not grow with it; on all at once unless given.
    """

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
        """Return the parts of layer `layer` (from 0) that are recomputed."""
        within = self.layers is None or layer < self.layers
        return frozenset(self.parts if within else ())


# The setting of a recipe; true recomputes every layer as a whole.
Recompute = bool | RecomputeConfig


def recomputed_parts(recompute: Recompute, layer: int) -> frozenset[Part]:
    """Return the parts of layer `layer` (from 0) that are recomputed."""
    return frozenset() if recompute is False else _config(recompute).of_layer(layer)


def chunk_tokens(recompute: Recompute) -> int | None:
    """Return the tokens that recomputed experts take at a time; None: all."""
    return None if recompute is False else _config(recompute).chunk_tokens


def _config(recompute: Literal[True] | RecomputeConfig) -> RecomputeConfig:
    return RecomputeConfig() if recompute is True else recompute


def enable_recompute(model: Ernie4_5_MoeForCausalLM, recompute: Recompute = True) -> None:
    """Make the model recompute the parts that `recompute` names in its backward pass.

    Router logits and expert ids are outputs of the recomputed function, so gradients flow through
    them and statistics are taken once, from the first pass. All ranks repeat the all-to-alls of a
    layer at the same place of the backward pass.
    """
    model.model.run_layer = partial(_run_layer, recompute) if recompute else run_layer


def _run_layer(
    recompute: Recompute,
    layer: DecoderLayer,
    x: Tensor,
    tables: AttentionTables,
    cache: KVCache | None,
    replayed: Tensor | None = None,
) -> tuple[Tensor, RouterOutput]:
    parts = recomputed_parts(recompute, layer.layer_index)
    if not parts or not layer.training or cache is not None:
        return run_layer(layer, x, tables, cache, replayed)
    if x.stop_gradient:  # else nothing would reach parameters of the layer, where those below rest
        x = _leaf(x)

    def attn_block(x: Tensor) -> Tensor:
        return layer.attn_block(x, tables, None)

    if parts == {"attention"}:
        return layer.mlp_block(utils.recompute(attn_block, x), replayed)
    whole, size = len(parts) == len(PARTS), chunk_tokens(recompute)
    if not whole:
        x = attn_block(x)
    if size is not None:
        return _run_in_chunks(layer, size, x, attn_block if whole else None, replayed)

    def block(x: Tensor) -> tuple[Tensor, RouterOutput]:
        return layer.mlp_block(attn_block(x) if whole else x, replayed)

    return _recompute_moe(block, x)


def _recompute_moe(run: Any, x: Tensor) -> tuple[Tensor, RouterOutput]:
    """Recompute `run`: x [T,H] -> x [T,H] and the router's output.

    The number of dropped rows goes around Paddle's `recompute`, which passes tensors alone.
    """
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


def _run_in_chunks(
    layer: DecoderLayer,
    size: int,
    x: Tensor,
    before: Callable[[Tensor], Tensor] | None,
    replayed: Tensor | None,
) -> tuple[Tensor, RouterOutput]:
    """Run `mlp_block` on x [T,H], or on `before(x)`, `size` tokens at a time."""
    chunks = _chunks(x.shape[0], size, layer.is_moe and process_group.grid().expert > 1)

    def block(piece: Tensor, chunk: slice) -> tuple[Tensor, RouterOutput]:
        return layer.mlp_block(piece, None if replayed is None else _tokens(replayed, chunk))

    y, *routed = _ChunkedBlock.apply(x, block, before, chunks)
    # 0 dropped rows: a capacity would be counted per chunk, so recipes with both are refused.
    return y, (*routed, 0) if routed else None


def _chunks(tokens: int, size: int, together: bool) -> list[slice]:
    """Return slices of a micro-batch of `tokens` tokens, `size` each.

    With `together` every rank has as many, the last ones empty where its micro-batch is smaller,
    because all must run the all-to-alls of every chunk.
    """
    count = -(-tokens // size)
    if together:
        count = int(get_collectives().gather(paddle.full([1], count, "int64")).max())
    return [slice(min(i * size, tokens), min((i + 1) * size, tokens)) for i in range(count)]


class _ChunkedBlock(PyLayer):
    """x [T,H] -> x [T,H], and of an MoE layer the router's logits [T,E] and expert ids [T,K].

    Both passes take the chunks in the same order, so that the all-to-alls of all ranks match. For
    an empty chunk the first token runs, and its result is discarded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Callable[[Tensor, slice], tuple[Tensor, RouterOutput]],
        before: Callable[[Tensor], Tensor] | None,
        chunks: list[slice],
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.block, ctx.before, ctx.chunks = block, before, chunks
        ctx.set_materialize_grads(False)
        stream = x if before is None else before(x)
        outputs = []
        for chunk in chunks:
            y, routed = block(_tokens(stream, chunk), chunk)
            if not _is_empty(chunk):
                outputs.append((y, *(routed or ())[:2]))
        joined = tuple(map(paddle.concat, zip(*outputs, strict=True)))
        if len(joined) > 1:
            ctx.mark_non_differentiable(joined[2])
        return joined

    @staticmethod
    @once_differentiable
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
    """Return the gradient of the block's input, [T,H]; its parameters accumulate theirs."""
    pieces = []
    for chunk in ctx.chunks:
        piece = _leaf(_tokens(stream, chunk))
        y, routed = ctx.block(piece, chunk)
        outputs = [y, *(routed or ())[:1]]
        chunk_grads = [_gradient(g, o, chunk) for g, o in zip(grads, outputs, strict=False)]
        paddle.autograd.backward(outputs, chunk_grads)
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
    """Return the chunk of `grad` for `output`; zeros without gradient or for an empty chunk."""
    if grad is None or _is_empty(chunk):
        return paddle.zeros_like(output)
    return grad[chunk]
