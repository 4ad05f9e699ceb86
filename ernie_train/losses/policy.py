"""Compute the losses of PPO: clipped surrogate, value loss, KL to the reference.

Tensors have one shape, [B,S] with a mask or [T] for the kept tokens alone. Losses are sums, which
the trainer divides. Values where the mask is 0 have no influence, not even NaN.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import numpy as np
import paddle
from paddle import Tensor

ArrayT = TypeVar("ArrayT")  # np.ndarray or Tensor

KlKind = Literal["k1", "k2", "k3"]
KlInLossKind = Literal["k2", "k3"]
KL_IN_LOSS_KINDS: tuple[str, ...] = get_args(KlInLossKind)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float | tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Return the negative clipped objective of PPO, per token (arXiv:1707.06347).

    logprobs, old_logprobs, advantages, mask of one shape ->
    (-sum of min(ratio A, clip(ratio, 1 - low, 1 + high) A), number of clipped tokens), with
    ratio = exp(logprobs - old_logprobs). `clip_ratio` is one number for both sides or (low, high);
    a high above low leaves rare tokens room to grow (arXiv:2503.14476). A token is clipped when
    its ratio has left the range in the direction of its advantage: it then has no gradient.
    `old_logprobs` and `advantages` take no gradient. Raises `ValueError` unless both are positive.
    """
    low, high = (clip_ratio,) * 2 if isinstance(clip_ratio, int | float) else clip_ratio
    if not (low > 0 and high > 0):
        raise ValueError(f"clip_ratio={clip_ratio} must be positive")
    ratio = paddle.exp(_masked(logprobs - old_logprobs.detach(), mask))
    gain = _masked(advantages.detach(), mask)
    plain = ratio * gain
    clipped = paddle.clip(ratio, 1 - low, 1 + high) * gain
    return -paddle.minimum(plain, clipped).sum(), (clipped < plain).sum()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float | None
) -> Tensor:
    """Return the critic's error: sum of 0.5 max((V - R)^2, (clip(V, V_old +- clip_range) - R)^2).

    values, old_values, returns, mask of one shape -> scalar. The larger error counts, so that a
    value which moved too far towards its return gets no gradient, and one which moved away gets
    all of it (arXiv:2005.12729). None does not clip. `old_values` and `returns` take no gradient.
    Raises `ValueError` unless `clip_range` is positive.
    """
    values, returns = _masked(values, mask), _masked(returns.detach(), mask)
    errors = (values - returns).square()
    if clip_range is not None:
        if not clip_range > 0:
            raise ValueError(f"clip_range={clip_range} must be positive")
        old = _masked(old_values.detach(), mask)
        near = old + paddle.clip(values - old, -clip_range, clip_range)
        errors = paddle.maximum((near - returns).square(), errors)
    return 0.5 * errors.sum()


def kl_estimate(logprobs: ArrayT, ref_logprobs: ArrayT, kind: KlKind = "k3") -> ArrayT:
    """Estimate KL(policy | reference) in nats per token, from tokens that the policy sampled.

    logprobs, ref_logprobs of one shape, tensors or numpy arrays -> the same shape. With
    d = logprobs - ref_logprobs: k1 = d (unbiased, any sign), k2 = d^2 / 2 (biased, small
    variance), k3 = exp(-d) - 1 + d (unbiased, never negative); http://joschu.net/blog/kl-approx.
    Raises `ValueError` for another kind.
    """
    d: Any = logprobs - ref_logprobs  # type: ignore[operator]  # both kinds of arrays subtract
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        # expm1: exp(-d) - 1 would lose the digits of a policy near its reference.
        return (paddle.expm1(-d) if isinstance(d, Tensor) else np.expm1(-d)) + d
    raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(KlKind))}")


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kind: KlInLossKind) -> Tensor:
    """Return the sum of `kl_estimate` where the mask is set, as a term of the loss.

    logprobs, ref_logprobs, mask of one shape -> scalar; `ref_logprobs` takes no gradient. On the
    policy's own samples the gradient of k2, d grad(logprob), is on average that of
    KL(policy | reference); that of k3, (1 - exp(-d)) grad(logprob), is that of
    KL(reference | policy). Raises `ValueError` for k1: the gradient of d is grad(logprob), which is
    0 on average whatever the reference says.
    """
    if kind not in KL_IN_LOSS_KINDS:
        raise ValueError(
            f"kind={kind!r} cannot stand in the loss, where k1 has no useful gradient; "
            f"use {' or '.join(KL_IN_LOSS_KINDS)}, or put it in the reward"
        )
    difference = _masked(logprobs - ref_logprobs.detach(), mask)
    return kl_estimate(difference, paddle.zeros_like(difference), kind).sum()


def _masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return `tensor` with 0 where the mask is 0; a product would keep NaN and infinities."""
    return paddle.where(mask.astype("bool"), tensor, paddle.zeros_like(tensor))
