"""Balance experts: losses on the router, and the selection bias.

Shapes: T real tokens, E experts, K experts per token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

_MIN_NORM = 1e-12


def router_orthogonal_loss(weight: Tensor) -> Tensor:
    """Return mean((W^T W - I)^2) over the E*E entries, W the columns of `weight` at length 1.

    weight [H,E] float32 -> scalar with gradient to the weight alone. A column shorter than 1e-12
    is divided by that. Zero if all columns are orthogonal (ERNIE 4.5 technical report, router
    orthogonalization loss).
    """
    # F.normalize divides by max(norm, eps) as well, but takes 0.15 ms for 256 x 64, this 0.05.
    squares = paddle.diag(paddle.matmul(weight, weight, transpose_x=True))
    # Clipping the squares, not their roots, keeps the gradient of a zero column finite.
    columns = weight / paddle.sqrt(paddle.clip(squares, min=_MIN_NORM**2))
    gram = paddle.matmul(columns, columns, transpose_x=True)
    return paddle.square(gram - paddle.eye(gram.shape[0], dtype=gram.dtype)).mean()


def router_orthogonal_gradient(weight: Tensor) -> tuple[float, Tensor]:
    """Return `router_orthogonal_loss` and its gradient [H,E], for a step after the optimizer's."""
    alone = weight.detach()
    alone.stop_gradient = False
    loss = router_orthogonal_loss(alone)
    (gradient,) = paddle.grad(loss, [alone])
    return float(loss), gradient


def router_z_loss(router_logits: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2, which keeps router logits small.

    router_logits [T,E] -> scalar with gradient (ST-MoE, arXiv:2202.08906).
    """
    return paddle.square(paddle.logsumexp(router_logits, axis=-1)).mean()


def load_balance_loss(router_probs: Tensor, tokens_per_expert: Tensor, top_k: int) -> Tensor:
    """Return E * sum over experts e of mean_t(p_te) * f_e, f_e the share of tokens that chose e.

    router_probs [T,E] of real tokens -> scalar; the gradient flows through them alone.
    tokens_per_expert [E] counts the K largest of the *unbiased* probabilities, of these T tokens or
    of more. Equals K at perfect balance (Switch Transformer, arXiv:2101.03961, with top-k counts).
    """
    dtype, experts = router_probs.dtype, router_probs.shape[1]
    # In float64, in which the counts of any step are exact.
    scale = (experts * top_k / tokens_per_expert.sum().astype("float64")).astype(dtype)
    return (router_probs.mean(0) * (tokens_per_expert.astype(dtype) * scale)).sum()


def count_tokens_per_expert(expert_ids: Sequence[Tensor], num_experts: int) -> Tensor:
    """Return how many tokens chose each expert of each layer, int64 [L,E].

    expert_ids: [T,K] of each of L layers.
    """
    layers = len(expert_ids)
    ids = paddle.stack([of_layer.reshape([-1]) for of_layer in expert_ids])
    ids = ids + paddle.arange(layers).unsqueeze(1) * num_experts
    # One count for all layers: each waits twice for the device, for its smallest and largest id.
    chosen = paddle.bincount(ids.reshape([-1]), minlength=layers * num_experts)
    return chosen.reshape([layers, num_experts])


def unbiased_expert_ids(router_probs: Tensor, top_k: int) -> Tensor:
    """Return the experts [T,K] that are chosen without a selection bias; no gradient."""
    return paddle.topk(router_probs.detach(), top_k)[1]


def selection_bias_step(tokens_per_expert: np.ndarray, rate: float) -> np.ndarray:
    """Return the change of the selection bias in one optimizer step, rate * sign(mean(u) - u).

    tokens_per_expert [E] or [layers,E], counted over all ranks and micro-batches of the step,
    before any capacity limit -> same shape, float32 (auxiliary-loss-free balancing,
    arXiv:2408.15664).
    """
    load = np.asarray(tokens_per_expert, np.float64)
    return (rate * np.sign(load.mean(-1, keepdims=True) - load)).astype(np.float32)


def mean_absolute_cosine(weight: Tensor) -> float:
    """Return the mean |cosine| of two columns of `weight` [H,E]: 0 if all are orthogonal."""
    columns = F.normalize(weight.detach().astype("float32"), axis=0, epsilon=_MIN_NORM)
    experts = columns.shape[1]
    if experts < 2:
        return 0.0
    cosines = paddle.matmul(columns, columns, transpose_x=True).abs()
    return (float(cosines.sum()) - float(paddle.diag(cosines).sum())) / (experts * (experts - 1))
