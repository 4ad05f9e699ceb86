"""Router, experts and the MoE layer; a `token_dispatcher` moves tokens to experts and back.

Shapes: T tokens, H hidden size, E experts, K experts per token (moe_k), I expert width, R routed
rows (T*K less what a capacity limit drops).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_train import kernels
from ernie_train.core.autograd import needs_grad, once_differentiable, select_grads
from ernie_train.model import batched_experts
from ernie_train.model.batched_experts import BatchedSwiGLU
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.dtypes import cast
from ernie_train.model.layers import ACTIVATIONS, MLP, RMSNorm, acting, is_ordinary, ordinary
from ernie_train.model.token_dispatcher import LocalDispatcher, Placement, make_routing

LOCAL_PLACEMENT = Placement(None, LocalDispatcher())


@dataclass(frozen=True)
class RouterStats:
    """Report of one MoE layer to the losses, over real tokens alone."""

    layer: int
    router_logits: Tensor  # [T,E] float32, with gradient
    router_probs: Tensor  # [T,E] float32, with gradient
    expert_ids: Tensor  # [T,K] experts taken: chosen with the selection bias, or replayed
    dropped: int  # routed rows that a capacity limit dropped


@ordinary
class Router(nn.Layer):
    """p = softmax(x W) in float32; experts are topk(p + bias), their weights come from p alone.

    The bias picks experts, raw probabilities weigh them (arXiv:2408.15664).
    """

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        self.top_k = config.moe_k
        self.norm_min = config.moe_norm_min
        self.weight = self.create_parameter(
            [config.hidden_size, config.moe_num_experts], dtype="float32"
        )

    def forward(
        self, x: Tensor, bias: Tensor, replayed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route x [T,H] under bias [1,E] -> logits [T,E], weights [T,K], expert ids [T,K].

        replayed [T,K]: experts to take instead of the router's own choice, -1 where it chooses;
        their weights come from its present probabilities, with gradient (arXiv:2510.11370).
        """
        x32 = cast(x, paddle.float32)
        logits = paddle.matmul(x32, self.weight)
        probs = F.softmax(logits)
        _, expert_ids = paddle.topk(probs.detach() + bias, self.top_k)
        if replayed is not None:
            expert_ids = paddle.where(replayed < 0, expert_ids, replayed)
        chosen = paddle.take_along_axis(probs, expert_ids, axis=1)
        weights = chosen / paddle.clip(chosen.sum(-1, keepdim=True), min=self.norm_min)
        return logits, weights, expert_ids


class MoEStatics(nn.Layer):
    """Holds the selection bias [1,E], updated from load statistics and never by a gradient."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", paddle.zeros([1, num_experts], "float32"))


class _GroupedSwiGLU(PyLayer):
    """y = weight * (silu(x Wg) * (x Wu)) Wd for the rows of each expert, expert after expert.

    The weight multiplies the inner activation, which has I columns instead of the output's H.
    Written by hand: autograd would keep more tensors per expert than the five saved here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        rows: list[int],
    ) -> Tensor:
        outputs, saved, start = [], [], 0
        for expert, count in enumerate(rows):
            if count == 0:
                continue
            x_e = x[start : start + count]
            g = paddle.matmul(x_e, gate[expert])
            u = paddle.matmul(x_e, up[expert])
            sigmoid = F.sigmoid(g)
            silu = g * sigmoid
            wide = paddle.expand(weights[start : start + count], g.shape)
            weighted = (silu * u).multiply_(wide)
            outputs.append(paddle.matmul(weighted, down[expert]))
            saved.append((u, sigmoid, silu, wide, weighted))
            start += count
        ctx.save_for_backward(x, gate, up, down)
        ctx.saved, ctx.rows = saved, rows
        ctx.needs_grad = needs_grad(x, weights, gate, up, down)
        return paddle.concat(outputs) if len(outputs) > 1 else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        x, gate, up, down = ctx.saved_tensor()
        _, _, trains_gate, trains_up, trains_down = ctx.needs_grad
        dx, dweights, start = [], [], 0
        dgate, dup, ddown = ([None] * len(ctx.rows) for _ in range(3))
        pieces = iter(ctx.saved)
        ones = paddle.ones([gate.shape[-1], 1], x.dtype)
        for expert, count in enumerate(ctx.rows):
            if count == 0:
                continue
            u, sigmoid, silu, wide, weighted = next(pieces)
            x_e, grad_e = x[start : start + count], grad[start : start + count]
            if trains_down:
                ddown[expert] = paddle.matmul(weighted, grad_e, transpose_x=True)
            d_weighted = paddle.matmul(grad_e, down[expert], transpose_y=True)
            # d(weight) = sum over I of d_weighted * silu * u: no division by a weight of 0.
            # A product with ones is Paddle's fastest sum of rows on a CPU.
            dweights.append(paddle.matmul(d_weighted * silu * u, ones))
            d_inner = d_weighted.multiply_(wide)
            d_up = d_inner * silu
            # silu'(g) = sigmoid + silu * (1 - sigmoid)
            d_gate = d_inner.multiply_(u).multiply_((silu - silu * sigmoid).add_(sigmoid))
            if trains_gate:
                dgate[expert] = paddle.matmul(x_e, d_gate, transpose_x=True)
            if trains_up:
                dup[expert] = paddle.matmul(x_e, d_up, transpose_x=True)
            d_x = paddle.matmul(d_gate, gate[expert], transpose_y=True)
            dx.append(d_x.add_(paddle.matmul(d_up, up[expert], transpose_y=True)))
            start += count
        ctx.saved = None
        made = zip((dgate, dup, ddown), (gate, up, down), ctx.needs_grad[2:], strict=True)
        stacks = (_stack(grads, stack) if trains else None for grads, stack, trains in made)
        return select_grads(ctx.needs_grad, (paddle.concat(dx), paddle.concat(dweights), *stacks))


class _NativeExperts(PyLayer):
    """The same; saves x Wg and x Wu besides its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        rows: list[int],
    ) -> Tensor:
        y, *inner = kernels.experts(x, weights, (gate, up, down), rows)
        ctx.save_for_backward(x, weights, gate, up, down, *inner)
        ctx.rows, ctx.needs_grad = rows, needs_grad(x, weights, gate, up, down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate, up, down, *inner = ctx.saved_tensor()
        made = kernels.experts_backward(
            x, weights, (gate, up, down), ctx.rows, tuple(inner), grads[0], ctx.needs_grad[2:]
        )
        return select_grads(ctx.needs_grad, made)


def _stack(grads: list[Any], parameter: Tensor) -> Tensor:
    """Stack the gradients of the experts into [E,..]; one without rows has a gradient of zero."""
    shape = parameter.shape[1:]
    return paddle.stack([paddle.zeros(shape, parameter.dtype) if g is None else g for g in grads])


def experts_by_autograd(
    x: Tensor,
    weights: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    rows: list[int],
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run experts of any activation in plain operations: x [R,H], weights [R,1] -> [R,H]."""
    gate, up, down = (paddle.unbind(p, 0) for p in parameters)
    outputs, start = [], 0
    for expert, count in enumerate(rows):
        if count:
            x_e = x[start : start + count]
            inner = act(paddle.matmul(x_e, gate[expert])) * paddle.matmul(x_e, up[expert])
            weighted = inner * weights[start : start + count]
            outputs.append(paddle.matmul(weighted, down[expert]))
            start += count
    return paddle.concat(outputs)


@ordinary
class Experts(nn.Layer):
    """Gated MLPs of `local_experts`, stacked: gate and up [E,H,I], down [E,I,H]."""

    def __init__(self, config: Ernie4_5_MoeConfig, local_experts: range) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        inward = [config.hidden_size, config.moe_intermediate_size]
        outward = [config.moe_intermediate_size, config.hidden_size]
        self.gate_proj = self._create_stack(config.moe_num_experts, local_experts, inward)
        self.up_proj = self._create_stack(config.moe_num_experts, local_experts, inward)
        self.down_proj = self._create_stack(config.moe_num_experts, local_experts, outward)

    def _create_stack(self, num_experts: int, local_experts: range, shape: list[int]) -> Tensor:
        full = self.create_parameter([num_experts, *shape])
        if len(local_experts) == num_experts:
            return full
        # The initializer of the full stack has drawn its random numbers, so that all parameters
        # created later are the same whatever number of experts this rank holds.
        zero = nn.initializer.Constant(0.0)
        return self.create_parameter([len(local_experts), *shape], default_initializer=zero)

    def forward(self, rows: Tensor, weights: Tensor, tokens_per_expert: list[int]) -> Tensor:
        """Compute rows [R,H] sorted by expert, weights [R,1] -> weighted outputs [R,H]."""
        parameters = (self.gate_proj, self.up_proj, self.down_proj)
        weights = cast(weights, rows.dtype)
        if self.hidden_act in ("silu", "swish"):
            if rows.place.is_gpu_place() and batched_experts.pays(tokens_per_expert):
                return BatchedSwiGLU.apply(rows, weights, *parameters, tokens_per_expert)
            native = kernels.usable(rows, weights, *parameters)
            function = _NativeExperts if native else _GroupedSwiGLU
            return function.apply(rows, weights, *parameters, tokens_per_expert)
        act = ACTIVATIONS[self.hidden_act]
        return experts_by_autograd(rows, weights, parameters, tokens_per_expert, act)


@ordinary
class MoE(nn.Layer):
    """Routed experts plus shared experts, which see every token."""

    def __init__(self, config: Ernie4_5_MoeConfig, placement: Placement = LOCAL_PLACEMENT) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.moe_statics = MoEStatics(config.moe_num_experts)
        self.experts = Experts(config, placement.local_experts(config.moe_num_experts))
        self.shared_experts = None
        if config.moe_num_shared_experts:
            width = config.moe_num_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config, width)
        self.dispatcher = placement.dispatcher

    def forward(
        self, x: Tensor, replayed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Compute x [T,H] -> output [T,H], router logits [T,E], expert ids [T,K], dropped rows.

        replayed [T,K]: as in `Router.forward`.
        """
        bias = self.moe_statics.e_score_correction_bias
        logits, weights, expert_ids = self.gate(x, bias, replayed)
        routing = make_routing(expert_ids, self.config.moe_num_experts, self._capacity(x.shape[0]))
        # Shared experts need no exchange, so they run while rows travel to the routed ones.
        in_flight = self.dispatcher.dispatch_start(x, weights, routing)
        shared = None if self.shared_experts is None else self.shared_experts(in_flight.x)
        arrived = self.dispatcher.dispatch_wait(in_flight, shared)
        routed = self.experts(arrived.rows, arrived.weights, arrived.tokens_per_expert)
        output = self.dispatcher.combine(routed, arrived)
        if arrived.overlapped is not None:
            output = output + arrived.overlapped
        return output, logits, expert_ids, routing.dropped

    def _capacity(self, tokens: int) -> int | None:
        """Return the most rows an expert takes, None without a limit.

        Only training drops rows: what is sampled, validated or exported must not depend on the
        other tokens of a batch, and other loaders know no limit.
        """
        factor = self.config.moe_capacity_factor
        if factor is None or not self.training:
            return None
        return max(1, math.ceil(factor * tokens * self.config.moe_k / self.config.moe_num_experts))


def moe_block(norm: RMSNorm, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return x + moe(norm(x)), router logits [T,E] and expert ids [T,K]; None: not computed here.

    Nothing is dropped: a layer that trains with a capacity is not computed here, nor one whose
    experts lie on several ranks.
    """
    shared, experts = moe.shared_experts, acting(moe.experts)
    modules: list[nn.Layer] = [norm, moe, moe.gate, experts]
    if shared is not None:
        projections = (shared.gate_proj, shared.up_proj, shared.down_proj)
        modules += [shared, *(acting(m) for m in projections)]
    if not (
        is_ordinary(*modules)
        and type(moe.dispatcher) is LocalDispatcher
        and moe._capacity(x.shape[0]) is None
        and experts.hidden_act in ("silu", "swish")
        and kernels.usable(x, norm.weight)
    ):
        return None
    stacks = (experts.gate_proj, experts.up_proj, experts.down_proj)
    of_shared = [] if shared is None else [m.weight for m in modules[5:]]
    bias = moe.moe_statics.e_score_correction_bias
    shape = kernels.MoEShape(moe.gate.top_k, moe.gate.norm_min, norm.eps)
    parameters = (norm.weight, moe.gate.weight, *stacks, *of_shared)
    return _MoEBlock.apply(x, bias, shape, *parameters)


class _MoEBlock(PyLayer):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, shape: kernels.MoEShape, *parameters: Tensor
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
        routed: kernels.Routed = ctx.routed
        dx, made = kernels.moe_block_backward(
            x, rest[: ctx.count], ctx.shape, routed, rest[ctx.count :], (grad, grads[1]), trains
        )
        return dx if needs_x else None, None, *made
