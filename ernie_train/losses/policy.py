"""Compute the losses of PPO and its kin: clipped surrogates, value loss, KL to the reference.

Tensors have one shape, [B,S] with a mask or [T] for the kept tokens alone. Losses are sums, which
the trainer divides. Values where the mask is 0 have no influence, not even NaN.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import paddle
from paddle import Tensor

ArrayT = TypeVar("ArrayT")  # np.ndarray or Tensor

PolicyObjective = Literal["ppo", "cispo"]
KlKind = Literal["k1", "k2", "k3"]
KlInLossKind = Literal["k2", "k3"]
KL_IN_LOSS_KINDS: tuple[str, ...] = get_args(KlInLossKind)

# The exponential of a larger one overflows, and an infinite ratio times an advantage of 0 is NaN.
_MAX_LOGRATIO = 20.0
# Most that a ratio counts in the KL. One token that a router sent elsewhere may have a logprob 15
# below its reference's: exp(15) of gradient, which clipping would take from all other tokens. The
# mean square of a ratio truncated at R is at most R.
MAX_KL_RATIO = 20.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float | tuple[float, float],
    dual_clip: float | None = None,
    objective: PolicyObjective = "ppo",
    sequence_ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the negative clipped objective of PPO or CISPO, summed over tokens.

    logprobs, old_logprobs, advantages, mask of one shape -> (loss, number of clipped tokens). With
    ratio = exp(logprobs - old_logprobs) and range = [1 - low, 1 + high]:
        ppo (arXiv:1707.06347): -sum of min(ratio A, clip(ratio, range) A). A token is clipped when
            its ratio has left the range in the direction of its advantage: it then has no gradient.
        cispo (arXiv:2506.13585): -sum of clip(ratio, range) A logprobs, the ratio without gradient.
            A token is clipped when its ratio is outside the range: it keeps a gradient.
    clip_ratio: one number for both sides or (low, high); a high above low leaves rare tokens room
        to grow (arXiv:2503.14476).
    dual_clip: with ppo, the ratio above which a token of a negative advantage has no gradient
        either: max(the minimum, dual_clip A) there (arXiv:1912.09729). None: no such ratio.
    sequence_ids: the sequence of each token, counted from 0, of one-dimensional tensors: the ratio
        is then that of the sequence (`sequence_logratios`).
    weights: factors of the tokens' terms, not negative, of the same shape.
    `old_logprobs`, `advantages` and `weights` take no gradient. Raises `ValueError` unless both
    bounds are positive and `dual_clip` is above 1.
    """
    low, high = (clip_ratio,) * 2 if isinstance(clip_ratio, int | float) else clip_ratio
    if not (low > 0 and high > 0):
        raise ValueError(f"clip_ratio={clip_ratio} must be positive")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1")
    logratios = _masked(logprobs - old_logprobs.detach(), mask)
    if sequence_ids is not None:
        logratios = sequence_logratios(logratios, mask, sequence_ids)
    ratio = _ratio(logratios)
    gain = _masked(advantages.detach(), mask)
    if weights is not None:
        gain = gain * weights.detach()
    if objective == "cispo":
        ratio = ratio.detach()
        held = paddle.clip(ratio, 1 - low, 1 + high)
        return -(held * gain * _masked(logprobs, mask)).sum(), (held != ratio).sum()
    plain = ratio * gain
    clipped = paddle.clip(ratio, 1 - low, 1 + high) * gain
    objective_terms, flat = paddle.minimum(plain, clipped), clipped < plain
    if dual_clip is not None:
        bounded = paddle.maximum(objective_terms, dual_clip * gain)
        objective_terms = paddle.where(gain < 0, bounded, objective_terms)
        flat = flat | ((gain < 0) & (ratio > dual_clip))
    return -objective_terms.sum(), flat.sum()


def sequence_logratios(logratios: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Return log-ratios of sequences at their tokens (GSPO-token, arXiv:2507.18071, equation 14).

    logratios, mask, sequence_ids [T] -> [T]: the mean of `logratios` over the kept tokens of the
    sequence, with the gradient of the token's own; 0 where the mask is 0. With one advantage for
    all its tokens a sequence has the value and the gradient of GSPO, times its number of tokens.
    """
    kept = mask.astype(logratios.dtype)
    zeros = paddle.zeros([int(sequence_ids.max()) + 1], logratios.dtype)
    total = paddle.index_add(zeros, sequence_ids, 0, (logratios * kept).detach())
    count = paddle.index_add(zeros, sequence_ids, 0, kept)
    means = paddle.gather(total / paddle.clip(count, min=1.0), sequence_ids)
    return _masked(means + (logratios - logratios.detach()), mask)


def logprob_gap(differences: np.ndarray) -> float:
    """Return mean min(exp|d|, 20) - 1 of differences of logprobs of the same tokens; 0 of none.

    As in the KL, one token that a router sent elsewhere does not outweigh a million others. It is
    infinite where a difference is not finite.
    """
    sizes = np.abs(differences.astype(np.float64))
    if not np.isfinite(sizes).all():
        return math.inf
    return float(np.expm1(np.minimum(sizes, math.log(MAX_KL_RATIO))).mean()) if len(sizes) else 0.0


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
    Where exp(-d) is above `MAX_KL_RATIO` k3 goes on as a line: its slope, the weight of the
    reference's samples less 1, is truncated there, and not 0. Raises `ValueError` for another kind.
    """
    d: Any = logprobs - ref_logprobs  # type: ignore[operator]  # both kinds of arrays subtract
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d * d
    if kind == "k3":
        return _k3(d)
    raise ValueError(f"kind={kind!r} must be one of {', '.join(get_args(KlKind))}")


def _k3(d: Any) -> Any:
    lowest, slope = -math.log(MAX_KL_RATIO), MAX_KL_RATIO - 1
    # expm1: exp(-d) - 1 would lose the digits of a policy near its reference.
    if isinstance(d, Tensor):
        near, beyond = paddle.clip(d, min=lowest), paddle.clip(lowest - d, min=0.0)
        return paddle.expm1(-near) + near + slope * beyond
    near, beyond = np.maximum(d, lowest), np.maximum(lowest - d, 0.0)
    return np.expm1(-near) + near + slope * beyond


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kind: KlInLossKind,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of `kl_estimate` where the mask is set, as a term of the loss.

    logprobs, old_logprobs, ref_logprobs, mask of one shape -> (loss, number of tokens of which a
    ratio was truncated); `weights` of the same shape are factors of the tokens' estimates. An
    estimate is about samples of the policy: those of `old_logprobs`, an earlier one, weigh
    exp(logprobs - old_logprobs), without gradient and at most `MAX_KL_RATIO`. `old_logprobs` and
    `ref_logprobs` take no gradient. On average the gradient of k2, d grad(logprob), is then that of
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
    ratio = _ratio(_masked(logprobs - old_logprobs, mask).detach())
    truncated = ratio > MAX_KL_RATIO
    if kind == "k3":
        truncated = truncated | (difference < -math.log(MAX_KL_RATIO))
    estimates = kl_estimate(difference, paddle.zeros_like(difference), kind)
    estimates = estimates * paddle.clip(ratio, max=MAX_KL_RATIO)
    total = (estimates if weights is None else estimates * weights).sum()
    return total, truncated.sum()


def _ratio(logratios: Tensor) -> Tensor:
    return paddle.exp(paddle.clip(logratios, -_MAX_LOGRATIO, _MAX_LOGRATIO))


def _masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return `tensor` with 0 where the mask is 0; a product would keep NaN and infinities."""
    return paddle.where(mask.astype("bool"), tensor, paddle.zeros_like(tensor))
