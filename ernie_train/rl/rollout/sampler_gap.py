"""Logprobs of sampling against those of the update: their distance, and what is done about it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ernie_train.core.errors import ErnieTrainError
from ernie_train.losses import logprob_gap
from ernie_train.rl.config import SamplerCorrectionConfig, UpoConfig

# With a correction the gap of logprobs may be so many times `max_logprob_mismatch`.
_CORRECTED_MISMATCH = 20
# A replayed rollout with a gap above this one was sampled by another policy.
_OTHER_POLICY = 0.05
_REMEDY_OF_MISMATCH = (
    "both must compute with one dtype and the same weights; policy.sampler_correction corrects "
    "small gaps, such as those of bfloat16"
)


def logprob_mismatch(
    recomputed: Sequence[np.ndarray | None], sampled: Sequence[np.ndarray | None]
) -> float:
    """Return the `logprob_gap` of the tokens of which both are known."""
    pairs = zip(recomputed, sampled, strict=True)
    gaps = [new - old for new, old in pairs if new is not None and old is not None]
    return logprob_gap(np.concatenate(gaps)) if gaps else 0.0


def largest_mismatch(config: UpoConfig) -> float:
    """Return the bound of `logprob_mismatch`, which a correction widens."""
    corrected = config.policy.sampler_correction is not None
    return config.rollout.max_logprob_mismatch * (_CORRECTED_MISMATCH if corrected else 1)


def correction_of(config: UpoConfig, mismatch: float) -> SamplerCorrectionConfig | None:
    """Return how tokens are weighed; None: all alike, as samples of the policy itself.

    A replayed rollout of another policy is corrected, whether the recipe says so or not.
    Raises `ErnieTrainError` where sampling and update differ by more than they may.
    """
    rollout, correction = config.rollout, config.policy.sampler_correction
    bound, remedy = largest_mismatch(config), _REMEDY_OF_MISMATCH
    if rollout.replay is not None:
        bound = math.inf
        if correction is None and mismatch > _OTHER_POLICY:
            correction = SamplerCorrectionConfig(kind="truncated")
    elif correction is not None:
        remedy = "no correction bridges that: the sampler's weights or settings are not these"
    if not (mismatch <= bound and math.isfinite(mismatch)):
        raise ErnieTrainError(
            f"the logprobs of sampling and of the update differ by {mismatch:.2e}, more than "
            f"{bound:g}, of rollout.max_logprob_mismatch="
            f"{rollout.max_logprob_mismatch:g}; nothing was updated: {remedy}"
        )
    return correction
