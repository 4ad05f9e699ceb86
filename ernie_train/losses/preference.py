"""Compute losses and implicit rewards of preferences, and choose pairs of completions.

A log-ratio is log policy(completion | prompt) - log reference(completion | prompt) in nats, a sum
or a mean over the tokens of the completion. Shapes: P pairs or prompts, G completions of a prompt,
T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

PreferenceKind = Literal["sigmoid", "ipo", "simpo", "orpo"]
REFERENCE_FREE: frozenset[PreferenceKind] = frozenset({"simpo", "orpo"})
_LEAST_NLL = 1e-6  # in nats: the odds of a completion that is certain have no bound
_REWARD_TOLERANCE = 1e-6  # rewards are sums of decimal fractions: 1.0 - 0.9 is a little under 0.1


def completion_logratios(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    completion_ids: Tensor,
    num_completions: int,
    *,
    length_normalize: bool = False,
) -> Tensor:
    """Return the log-ratio of each completion: the sum of logprobs - ref_logprobs over its tokens.

    logprobs, ref_logprobs, completion_ids [T] (the completions' tokens alone, each with the number
    of its completion, from 0) -> [num_completions]. `ref_logprobs` takes no gradient; without it
    the ratio is the log-probability itself. `length_normalize` divides by the number of tokens: the
    gradient of a sum beside a mean over tokens grows with their number.
    """
    difference = logprobs if ref_logprobs is None else logprobs - ref_logprobs.detach()
    zeros = paddle.zeros([num_completions], difference.dtype)
    sums = paddle.index_add(zeros, completion_ids, 0, difference)
    if not length_normalize:
        return sums
    lengths = paddle.index_add(zeros, completion_ids, 0, paddle.ones_like(difference))
    return sums / paddle.clip(lengths, min=1.0)


def dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    """Return -log sigmoid(beta (chosen - rejected)) in nats (arXiv:2305.18290, equation 7).

    chosen_logratio, rejected_logratio [P] -> [P]; ln 2 while the policy is the reference. Raises
    `ValueError` unless beta is positive.
    """
    _require_positive(beta)
    return -F.log_sigmoid(beta * (chosen_logratio - rejected_logratio))


def ipo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    """Return (chosen - rejected - 1 / (2 beta))^2 (arXiv:2310.12036, equation 17).

    chosen_logratio, rejected_logratio [P] -> [P]. The margin has a target, beyond which it is
    pulled back: a pair that is never contradicted does not drive the policy without end. Raises
    `ValueError` unless beta is positive.
    """
    _require_positive(beta)
    return (chosen_logratio - rejected_logratio - 1 / (2 * beta)).square()


def simpo_loss(
    chosen_logprob: Tensor, rejected_logprob: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """Return -log sigmoid(beta (chosen - rejected) - gamma) in nats (arXiv:2405.14734, equation 6).

    chosen_logprob, rejected_logprob [P], means over the completion's tokens -> [P]. There is no
    reference; gamma is the margin of implicit rewards that is aimed at. Raises `ValueError` unless
    beta is positive and gamma at least 0.
    """
    _require_positive(beta)
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma} must be at least 0")
    return -F.log_sigmoid(beta * (chosen_logprob - rejected_logprob) - gamma)


def orpo_loss(chosen_logprob: Tensor, rejected_logprob: Tensor, *, beta: float) -> Tensor:
    """Return -beta log sigmoid(log odds(chosen) - log odds(rejected)) (arXiv:2403.07691, eq. 7).

    chosen_logprob, rejected_logprob [P], means over the completion's tokens, below 0 -> [P];
    odds(p) = p / (1 - p). It stands beside the chosen completions' likelihood, of which beta, the
    paper's lambda, is the share. There is no reference. Raises `ValueError` unless beta is
    positive.
    """
    _require_positive(beta)
    log_odds_ratio = _log_odds(chosen_logprob) - _log_odds(rejected_logprob)
    return -beta * F.log_sigmoid(log_odds_ratio)


def _log_odds(logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p, which is precise near p = 0 and p = 1."""
    logprob = paddle.clip(logprob, max=-_LEAST_NLL)
    return logprob - paddle.log(-paddle.expm1(logprob))


def _require_positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive")


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) in nats: a reward model's loss of each pair.

    chosen, rejected (scores), margins [P] -> [P]; arXiv:2203.02155, equation 1, with the margin of
    arXiv:2307.09288, equation 2.
    """
    gap = chosen - rejected
    return -F.log_sigmoid(gap if margins is None else gap - margins)


class ImplicitRewards(NamedTuple):
    """Hold rewards under which a policy trained by DPO is optimal, each [P], without gradient."""

    chosen: Tensor
    rejected: Tensor
    margins: Tensor  # chosen - rejected
    accuracies: Tensor  # 1 where the chosen one has the larger reward, else 0


def implicit_rewards(
    chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float
) -> ImplicitRewards:
    """Return beta times the log-ratios [P] (arXiv:2305.18290, equation 5).

    They are the rewards up to a constant per prompt.
    """
    chosen, rejected = beta * chosen_logratio.detach(), beta * rejected_logratio.detach()
    accuracies = (chosen > rejected).astype(chosen.dtype)
    return ImplicitRewards(chosen, rejected, chosen - rejected, accuracies)


class Pair(NamedTuple):
    """Name two completions of a prompt by their indices."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PairCounts:
    """Count prompts that gave a pair, had too few valid completions, or too small a margin."""

    pairs: int = 0
    too_few_valid: int = 0  # prompts with fewer than 2 valid completions
    below_margin: int = 0  # prompts whose best and worst rewards are too close
    tied: int = 0  # pairs chosen from several with the same best and worst rewards
    chosen_longer: int = 0  # pairs whose chosen completion is the longer one


def choose_pairs(
    rewards: Any, valid: Any, lengths: Any, *, margin: float
) -> tuple[list[Pair], PairCounts]:
    """Pair the best with the worst valid completion of every prompt whose rewards differ enough.

    rewards, valid, lengths [P,G] (arrays, lengths in tokens) -> pairs in the order of the prompts,
    at most one per prompt, and counts. Enough: best - worst >= `margin`, to within 1e-6. Of equal
    rewards the two completions nearest in length are taken, then the shorter chosen one, then the
    first ones: a log-ratio is a sum over tokens, so pairs of unlike length would teach length.
    Raises `ValueError` when shapes differ, margin is not positive or a valid reward not finite.
    """
    rewards, lengths = np.asarray(rewards, np.float64), np.asarray(lengths)
    valid = np.asarray(valid).astype(bool)
    if not (rewards.shape == valid.shape == lengths.shape and rewards.ndim == 2):
        shapes = f"{list(rewards.shape)}, {list(valid.shape)} and {list(lengths.shape)}"
        raise ValueError(f"rewards, valid and lengths must share one shape [P,G], not {shapes}")
    if not margin > 0:
        raise ValueError(f"margin={margin} must be positive")
    if not np.isfinite(rewards[valid]).all():
        raise ValueError("the reward of a valid completion is not finite")
    pairs: list[Pair] = []
    too_few = below = tied = longer = 0
    for prompt, keep in enumerate(valid):
        if keep.sum() < 2:
            too_few += 1
            continue
        best, worst = rewards[prompt][keep].max(), rewards[prompt][keep].min()
        if best - worst < margin - _REWARD_TOLERANCE:
            below += 1
            continue
        candidates = _candidates(prompt, rewards[prompt], keep, best, worst)
        tied += len(candidates) > 1
        pair = min(candidates, key=lambda c: _length_order(c, lengths))
        longer += int(lengths[prompt, pair.chosen] > lengths[prompt, pair.rejected])
        pairs.append(pair)
    return pairs, PairCounts(len(pairs), too_few, below, tied, longer)


def _candidates(
    prompt: int, rewards: np.ndarray, keep: np.ndarray, best: float, worst: float
) -> list[Pair]:
    chosen = np.flatnonzero(keep & (rewards == best))
    rejected = np.flatnonzero(keep & (rewards == worst))
    return [Pair(prompt, int(c), int(r)) for c in chosen for r in rejected]


def _length_order(pair: Pair, lengths: np.ndarray) -> tuple[int, int, int, int]:
    chosen, rejected = lengths[pair.prompt, pair.chosen], lengths[pair.prompt, pair.rejected]
    return abs(int(chosen) - int(rejected)), int(chosen), pair.chosen, pair.rejected
