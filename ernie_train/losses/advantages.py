"""Compute advantages from rewards: GAE with a critic, group-relative without one, whitening.

Advantages take no gradient, so all of this is numpy in float64.
Shapes: B completions, S positions, P prompts, G completions of a prompt.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

AdvantageScale = Literal["std", "none"]
AdvantageBaseline = Literal["mean", "leave_one_out"]
_SCALE_EPSILON = 1e-4  # in rewards; keeps a group of nearly equal rewards from exploding
_WHITEN_EPSILON = 1e-8  # a variance


def gae(
    rewards: ArrayLike, values: ArrayLike, mask: ArrayLike, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return generalized advantage estimates and the returns that a critic learns.

    rewards, values, mask [B,S] -> (advantages, returns) [B,S], both 0 where the mask is 0. With t'
    the next position of t that the mask keeps (arXiv:1506.02438):
        delta_t = r_t + gamma V_t' - V_t,  A_t = delta_t + gamma lam A_t',  return_t = A_t + V_t.
    A completion ends where its last kept position does: V and A beyond it are 0. Gaps in the mask
    (such as tool output) are skipped: they add no reward, no value and no discount.
    Raises `ValueError` when shapes differ, or gamma or lam is outside [0, 1].
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]")
    r, v = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    keep = np.asarray(mask) != 0
    _require_same_shape(r, values=v, mask=keep)
    advantages = np.zeros_like(r)
    next_value, next_advantage = np.zeros(len(r)), np.zeros(len(r))
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        next_advantage = np.where(keep[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = np.where(keep[:, t], v[:, t], next_value)
        advantages[keep[:, t], t] = next_advantage[keep[:, t]]
    return advantages, np.where(keep, advantages + v, 0.0)


def varied_groups(rewards: ArrayLike, valid: ArrayLike) -> np.ndarray:
    """Return True for prompts with two or more valid completions that differ in reward.

    rewards, valid [P,G] -> bool [P]. For all other prompts `group_advantages` is 0. Raises
    `ValueError` when shapes differ.
    """
    r, keep = np.asarray(rewards, np.float64), np.asarray(valid) != 0
    _require_same_shape(r, valid=keep)
    best = np.where(keep, r, -np.inf).max(-1, initial=-np.inf)
    worst = np.where(keep, r, np.inf).min(-1, initial=np.inf)
    # Fewer than two valid ones: -inf > inf, or a reward above itself.
    return np.asarray(best > worst)


def group_advantages(
    rewards: ArrayLike,
    valid: ArrayLike,
    *,
    scale: AdvantageScale = "std",
    baseline: AdvantageBaseline = "mean",
) -> np.ndarray:
    """Return rewards relative to the other completions of a prompt (GRPO, arXiv:2402.03300).

    rewards, valid [P,G] -> [P,G]: reward - baseline, over the prompt's valid completions; the
    baseline is their "mean" or, "leave_one_out", the mean of the others (RLOO, arXiv:2402.14740),
    which is n / (n - 1) times as far from the reward. "std" divides
    it by their standard deviation + 1e-4 (the sample's, with n - 1, as TRL's GRPO does), "none"
    leaves it in rewards (arXiv:2503.20783). Exactly 0 where a completion is not valid, and for
    prompts with fewer than 2 valid completions or with equal rewards. Raises `ValueError`
    when shapes differ, or `scale` or `baseline` is none of these.
    """
    if scale not in ("std", "none"):
        raise ValueError(f'scale={scale!r} must be "std" or "none"')
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f'baseline={baseline!r} must be "mean" or "leave_one_out"')
    r, keep = np.asarray(rewards, np.float64), np.asarray(valid) != 0
    keep = keep & varied_groups(r, keep)[:, None]
    count = keep.sum(-1, keepdims=True)
    total = np.where(keep, r, 0.0).sum(-1, keepdims=True)
    relative = np.where(keep, r - total / np.maximum(count, 1), 0.0)
    others = np.maximum(count - 1, 1)
    std = np.sqrt((relative**2).sum(-1, keepdims=True) / others)
    if baseline == "leave_one_out":
        relative *= count / others
    if scale == "std":
        relative /= std + _SCALE_EPSILON
    return relative


def whiten(advantages: ArrayLike, mask: ArrayLike) -> np.ndarray:
    """Return advantages with mean 0 and variance 1 where the mask is set, 0 elsewhere.

    advantages, mask of one shape. The variance is the sample's, plus 1e-8 (as verl's and TRL's
    masked_whiten); fewer than 2 kept values, or equal ones, give 0. Raises `ValueError` when
    shapes differ.
    """
    a, keep = np.asarray(advantages, np.float64), np.asarray(mask) != 0
    _require_same_shape(a, mask=keep)
    kept, white = a[keep], np.zeros_like(a)
    if kept.size > 1 and kept.max() > kept.min():
        white[keep] = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + _WHITEN_EPSILON)
    return white


def explained_variance(values: ArrayLike, returns: ArrayLike, mask: ArrayLike) -> float | None:
    """Return 1 - Var(returns - values) / Var(returns) where the mask is set.

    values, returns, mask of one shape. 1: the critic predicts every return; 0: no better than
    their mean; below 0: worse. None where the returns do not vary, or fewer than 2 are kept.
    Raises `ValueError` when shapes differ.
    """
    v, r = np.asarray(values, np.float64), np.asarray(returns, np.float64)
    keep = np.asarray(mask) != 0
    _require_same_shape(v, returns=r, mask=keep)
    kept = r[keep]
    if kept.size < 2 or kept.max() == kept.min():
        return None
    return float(1 - np.var(kept - v[keep]) / np.var(kept))


def _require_same_shape(first: np.ndarray, **others: np.ndarray) -> None:
    for name, other in others.items():
        if other.shape != first.shape:
            raise ValueError(f"{name} {list(other.shape)} must have the shape {list(first.shape)}")
