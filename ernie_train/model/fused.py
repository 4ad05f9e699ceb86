"""Blocks of a decoder layer by native kernels, under one node of autograd each.

The plain twin is `DecoderLayer` itself: a block is fused where its modules are ordinary ones, which
nobody watches, and tensors are float32 on a processor.

Shapes: T tokens, H hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import needs_grad, once_differentiable
from ernie_train.kernels import AttentionShape, MoEShape, Routed
from ernie_train.model.attention import Attention, AttentionTables
from ernie_train.model.layers import MLP, RMSNorm
from ernie_train.model.moe import Experts, MoE, Router
from ernie_train.model.token_dispatcher import LocalDispatcher

_ORDINARY = (nn.Linear, RMSNorm, Attention, MLP, MoE, Router, Experts)


def _is_ordinary(*modules: nn.Layer) -> bool:
    """Return whether modules are the model's own, without bias, and without hooks."""
    return all(
        type(m) in _ORDINARY
        and not m._forward_pre_hooks
        and not m._forward_post_hooks
        and (type(m) is not nn.Linear or m.bias is None)
        for m in modules
    )


def attention_block(
    norm: RMSNorm, attention: Attention, x: Tensor, tables: AttentionTables
) -> Tensor | None:
    """Return x + attention(norm(x)) for x [T,H]; None where it is not computed here."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    if not (_is_ordinary(norm, attention, *projections) and kernels.usable(x, norm.weight)):
        return None
    layout = tables.layout
    shape = AttentionShape(
        layout.document_table,
        (layout.num_heads, layout.num_key_value_heads),
        attention.head_dim,
        norm.eps,
    )
    weights = (p.weight for p in projections)
    rope = tables.rope
    return _AttentionBlock.apply(x, rope.cos, rope.sin, shape, norm.weight, *weights)


class _AttentionBlock(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, shape: AttentionShape, *parameters: Tensor
    ) -> Tensor:
        out, saved = kernels.attention_block(x, parameters, (cos, sin), shape)
        ctx.save_for_backward(x, *parameters, cos, sin, *saved)
        ctx.shape, ctx.needs_grad = shape, needs_grad(x, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensor()
        needs_x, *trains = ctx.needs_grad
        dx, made = kernels.attention_block_backward(
            x, rest[:5], (rest[5], rest[6]), ctx.shape, rest[7:], grads[0], trains
        )
        return dx if needs_x else None, None, None, *made


def mlp_block(norm: RMSNorm, mlp: MLP, x: Tensor) -> Tensor | None:
    """Return x + mlp(norm(x)) for x [T,H]; None where it is not computed here."""
    projections = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not (
        _is_ordinary(norm, mlp, *projections)
        and mlp.act is F.silu
        and kernels.usable(x, norm.weight)
    ):
        return None
    return _MLPBlock.apply(x, norm.weight, *(p.weight for p in projections), norm.eps)


class _MLPBlock(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        parameters = (norm, gate, up, down)
        out, saved = kernels.mlp_block(x, parameters, eps)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.eps, ctx.needs_grad = eps, needs_grad(x, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensor()
        needs_x, *trains = ctx.needs_grad
        dx, made = kernels.mlp_block_backward(x, rest[:4], ctx.eps, rest[4:], grads[0], trains)
        return dx if needs_x else None, *made


def moe_block(norm: RMSNorm, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return x + moe(norm(x)), router logits [T,E] and expert ids [T,K]; None: not computed here.

    Nothing is dropped: a layer with a capacity is not computed here, nor one whose experts lie on
    several ranks.
    """
    shared = moe.shared_experts
    modules: list[nn.Layer] = [norm, moe, moe.gate, moe.experts]
    if shared is not None:
        modules += [shared, shared.gate_proj, shared.up_proj, shared.down_proj]
    if not (
        _is_ordinary(*modules)
        and type(moe.dispatcher) is LocalDispatcher
        and moe.config.moe_capacity_factor is None
        and moe.experts.hidden_act in ("silu", "swish")
        and kernels.usable(x, norm.weight)
    ):
        return None
    stacks = (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj)
    of_shared = [] if shared is None else [m.weight for m in modules[5:]]
    bias = moe.moe_statics.e_score_correction_bias
    shape = MoEShape(moe.gate.top_k, moe.gate.norm_min, norm.eps)
    parameters = (norm.weight, moe.gate.weight, *stacks, *of_shared)
    return _MoEBlock.apply(x, bias, shape, *parameters)


class _MoEBlock(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, shape: MoEShape, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, logits, routed, saved = kernels.moe_block(x, bias, parameters, shape)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.shape, ctx.routed, ctx.count = shape, routed, len(parameters)
        ctx.needs_grad = needs_grad(x, *parameters)
        ctx.set_materialize_grads(False)  # a gradient of None: no loss reads the logits
        ctx.mark_non_differentiable(routed.ids)
        return out, logits, routed.ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensor()
        needs_x, *trains = ctx.needs_grad
        grad = paddle.zeros_like(x) if grads[0] is None else grads[0]
        routed: Routed = ctx.routed
        dx, made = kernels.moe_block_backward(
            x, rest[: ctx.count], ctx.shape, routed, rest[ctx.count :], (grad, grads[1]), trains
        )
        return dx if needs_x else None, None, *made
