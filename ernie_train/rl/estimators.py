"""Per-token estimates of an iteration: logprobs, values, KL penalties, advantages and returns.

Every function returns a list with one array [tokens of the completion] for each sequence. Tokens
are those that the policy sampled: tool outputs between them are context, which GAE goes across.
Shapes: N sampled tokens of a micro-batch, P prompts, G completions of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.losses import (
    AdvantageBaseline,
    AdvantageScale,
    gae,
    group_advantages,
    token_logprobs,
    whiten,
)
from ernie_train.model import Ernie4_5_MoeForCausalLM, RouterStats
from ernie_train.parallel import HasDecoder, Lockstep
from ernie_train.rl.batch import (
    MicroBatch,
    TokenizedCompletion,
    fill_micro_batches,
    length_order,
)
from ernie_train.rl.config import SamplerCorrectionConfig
from ernie_train.rl.critic import ScalarModel

T = TypeVar("T")
_NORMALIZE_EPSILON = 1e-4  # in rewards, as in group_advantages


# ---- forward passes ------------------------------------------------------------------------------


def policy_logprobs(
    model: Ernie4_5_MoeForCausalLM,
    batch: MicroBatch,
    *,
    temperature: float,
    with_entropy: bool = False,
    router_replay: bool = False,
) -> tuple[Tensor, Tensor | None, list[RouterStats]]:
    """Return logprobs [N] of sampled tokens at the sampling temperature, entropy, routing.

    router_replay: tokens take the experts that sampling chose for them, where they are known.
    """
    ids, documents = batch.inputs
    output = model.model(
        paddle.to_tensor(ids),
        document_ids=documents,
        replayed_experts=batch.routing if router_replay else None,
    )
    hidden = paddle.gather(output.hidden, paddle.to_tensor(batch.predictors))
    logprobs, entropy = token_logprobs(
        hidden,
        *model.head(),
        paddle.to_tensor(batch.targets),
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return logprobs, entropy, output.router_stats


def critic_values(critic: ScalarModel, batch: MicroBatch) -> tuple[Tensor, list[RouterStats]]:
    """Return values [N] of the states in which the sampled tokens are chosen."""
    ids, documents = batch.inputs
    values, output = critic(paddle.to_tensor(ids), documents)
    return paddle.gather(values, paddle.to_tensor(batch.predictors)), output.router_stats


def _evaluate(
    model: HasDecoder,
    sequences: Sequence[TokenizedCompletion],
    batch_size: int,
    compute: Callable[[MicroBatch], tuple[np.ndarray, T]],
    stop_requested: Callable[[], bool] = lambda: False,
    *,
    batch_tokens: int | None = None,
    share_prompts: bool = False,
) -> tuple[list[np.ndarray], list[T]]:
    """Run `compute` over all sequences, each rank for its share of the micro-batches.

    compute: a micro-batch -> an array [N], and what else is wanted of every micro-batch. Returns
    the array of each sequence, and the rest in order. Sequences of similar length go together, and
    those of one prompt if they share it. Every rank must call it. Raises `Interrupted` on all ranks
    when a stop is requested on one.
    """
    key = length_order(sequences, share_prompts=share_prompts)
    order = sorted(range(len(sequences)), key=key)
    units = [[index] for index in order]
    filled = fill_micro_batches(
        units, sequences, batch_size, batch_tokens, share_prompts=share_prompts
    )
    chunks = [[order[number] for number in numbers] for numbers in filled]
    own = []
    with Lockstep(model, stop_requested) as lockstep, paddle.no_grad():
        for chunk in lockstep.shard(chunks):
            batch = MicroBatch.without_arrays(
                [sequences[index] for index in chunk], share_prompts=share_prompts
            )
            own.append(compute(batch))
    found = process_group.gather_shards(own)
    arrays: dict[int, np.ndarray] = {}
    for chunk, (joined, _) in zip(chunks, found, strict=True):
        ends = np.cumsum([sequences[index].num_sampled for index in chunk])[:-1]
        arrays |= dict(zip(chunk, np.split(joined, ends), strict=True))
    return [arrays[index] for index in range(len(sequences))], [rest for _, rest in found]


class SequenceLogprobs(NamedTuple):
    """Logprobs of every sequence's completion, and means over the tokens of all.

    experts_changed is the share of tokens that the model sends to other experts than sampling did.
    """

    logprobs: list[np.ndarray]
    entropy: float | None
    experts_changed: float | None


def sequence_logprobs(
    model: Ernie4_5_MoeForCausalLM,
    sequences: Sequence[TokenizedCompletion],
    *,
    temperature: float,
    batch_size: int,
    batch_tokens: int | None = None,
    router_replay: bool = False,
    with_entropy: bool = False,
    share_prompts: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> SequenceLogprobs:
    """Return logprobs of every sequence's completion; every rank must call it.

    batch_size, batch_tokens: the most that go through the model together, as in `micro_batches`.
    router_replay: tokens take the experts that sampling chose for them. The share of changed ones
    leaves out sequences of which they are unknown. Raises `Interrupted` on all ranks when a stop
    is requested on one.
    """

    def compute(batch: MicroBatch) -> tuple[np.ndarray, _Seen]:
        logprobs, entropy, router_stats = policy_logprobs(
            model,
            batch,
            temperature=temperature,
            with_entropy=with_entropy,
            router_replay=router_replay,
        )
        changed = _changed_experts(batch, router_stats)
        return logprobs.numpy(), (None if entropy is None else entropy.numpy(), changed)

    training = model.training
    model.eval()
    arrays, seen = _evaluate(
        model,
        sequences,
        batch_size,
        compute,
        stop_requested,
        batch_tokens=batch_tokens,
        share_prompts=share_prompts,
    )
    if training:
        model.train()
    entropies, changed = ([found[at] for found in seen] for at in (0, 1))
    return SequenceLogprobs(arrays, _mean(entropies), _mean(changed))


_Seen = tuple[np.ndarray | None, np.ndarray | None]  # entropies [N] and changed experts


def _mean(arrays: list[np.ndarray | None]) -> float | None:
    known = [array for array in arrays if array is not None]
    return float(np.concatenate(known).mean(dtype=np.float64)) if known else None


def _changed_experts(batch: MicroBatch, router_stats: Sequence[RouterStats]) -> np.ndarray | None:
    """Return whether any layer routes a token to other experts now; of those whose are known."""
    before = [s.expert_ids[s.sampled_places] for s in batch.sequences if s.expert_ids is not None]
    if not router_stats or not before:
        return None
    known = np.repeat([s.expert_ids is not None for s in batch.sequences], batch.lengths)
    places = batch.predictors[known]
    now = paddle.stack([s.expert_ids for s in router_stats], 1).numpy()[places]
    changed: np.ndarray = np.sort(now, -1) != np.sort(np.concatenate(before), -1)
    return changed.any((1, 2))


def sequence_values(
    critic: ScalarModel,
    sequences: Sequence[TokenizedCompletion],
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    share_prompts: bool = False,
) -> list[np.ndarray]:
    """Return the critic's values of every sequence; every rank must call it.

    Raises `Interrupted` on all ranks when a stop is requested on one.
    """
    critic.eval()
    arrays, _ = _evaluate(
        critic,
        sequences,
        batch_size,
        lambda batch: (critic_values(critic, batch)[0].numpy(), 0),
        stop_requested,
        batch_tokens=batch_tokens,
        share_prompts=share_prompts,
    )
    critic.train()
    return arrays


# ---- off-policy samples --------------------------------------------------------------------------


def sampler_weights(
    logprobs: Sequence[np.ndarray],
    sampled_logprobs: Sequence[np.ndarray],
    correction: SamplerCorrectionConfig,
) -> tuple[list[np.ndarray], dict[str, float]]:
    """Return importance weights of sampled tokens, and metrics of them.

    logprobs: of each sequence under the policy before the update; sampled_logprobs: as its sampler
    had them. A weight is the ratio of the two probabilities, of a token or of its whole sequence,
    truncated (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training")
    or masked outside of the bounds. The metrics are the mean weight, after that, and the share of
    tokens whose weight was out of bounds.
    """
    low, high = correction.range
    weights, outside = [], []
    for new, old in zip(logprobs, sampled_logprobs, strict=True):
        gap = new.astype(np.float64) - old
        if correction.level == "sequence":
            gap = np.full_like(gap, gap.sum())
        weight = np.exp(np.minimum(gap, 50.0))  # far beyond any bound, and finite
        is_outside = (weight < low) | (weight > high)
        held = (
            np.clip(weight, low, high) if correction.kind == "truncated" else weight * ~is_outside
        )
        weights.append(held.astype(np.float32))
        outside.append(is_outside)
    metrics = {
        "sampler_weight/mean": float(np.concatenate(weights).mean(dtype=np.float64)),
        "sampler_weight/clipped": float(np.concatenate(outside).mean()),
    }
    return weights, metrics


# ---- rewards to advantages -----------------------------------------------------------------------


def normalize_by_domain(rewards: np.ndarray, valid: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """Centre and scale the rewards of each domain over its valid completions.

    rewards, valid, domains [P,G] -> [P,G]. A domain with a single valid completion keeps its own.
    """
    scaled = rewards.copy()
    for domain in np.unique(domains):
        here = (domains == domain) & valid
        if here.sum() > 1:
            centred = scaled[here] - scaled[here].mean()
            scaled[here] = centred / (scaled[here].std(ddof=1) + _NORMALIZE_EPSILON)
    return scaled


def group_relative_advantages(
    rewards: np.ndarray,
    valid: np.ndarray,
    lengths: Sequence[int],
    *,
    scale: AdvantageScale,
    baseline: AdvantageBaseline = "mean",
    verdicts: np.ndarray | None = None,
    verdict_span: float = 1.0,
    penalties: Sequence[np.ndarray] = (),
) -> list[np.ndarray]:
    """Give every token of a completion the same advantage: its reward against its group's.

    rewards, valid [P,G]; verdicts [P,G]: the verifier's share of the rewards, its weighted marks,
    which span `verdict_span` (None: all of them); lengths and penalties per sequence, group after
    group.

    "std" divides the verdicts by their deviation in the group, and what stands beside them (format,
    length, KL) by half their range in any group, as it is where half of a group is right: divided
    by its own deviation a small part would weigh as much as the verdict in a group that is all
    right but for it.
    """
    verdicts = rewards if verdicts is None else verdicts
    beside = rewards - verdicts
    if penalties:
        sums = [array.sum(dtype=np.float64) for array in penalties]
        beside -= np.array(sums).reshape(rewards.shape)
    if scale == "none":
        table = group_advantages(verdicts + beside, valid, scale="none", baseline=baseline)
    else:
        apart = group_advantages(beside, valid, scale="none", baseline=baseline)
        table = group_advantages(verdicts, valid, scale=scale, baseline=baseline)
        table = table + apart / (verdict_span / 2)
    return [
        np.full(length, advantage, np.float32)
        for length, advantage in zip(lengths, table.reshape(-1), strict=True)
    ]


def gae_advantages(
    rewards: np.ndarray,
    valid: np.ndarray,
    values: Sequence[np.ndarray],
    *,
    gamma: float,
    lam: float,
    policy_lam: float | None = None,
    penalties: Sequence[np.ndarray] = (),
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return advantages over the critic, whitened over all valid tokens, and its returns.

    Returns have the trace decay `lam`, advantages `policy_lam` or, unless given, the same.

    rewards, valid [P,G]; values and penalties per sequence, group after group. The reward stands
    at the last token; KL penalties, if any, at each.
    """
    lengths = [len(array) for array in values]
    shape = (len(values), max(lengths))
    reward_table, value_table, mask = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    flat_rewards, flat_valid = rewards.reshape(-1), valid.reshape(-1)
    for row, length in enumerate(lengths):
        if penalties:
            reward_table[row, :length] -= penalties[row]
        reward_table[row, length - 1] += flat_rewards[row]
        value_table[row, :length] = values[row]
        mask[row, :length] = flat_valid[row]
    advantages, returns = gae(reward_table, value_table, mask, gamma=gamma, lam=lam)
    if policy_lam is not None:
        advantages, _ = gae(reward_table, value_table, mask, gamma=gamma, lam=policy_lam)
    advantages = whiten(advantages, mask)

    def cut(table: np.ndarray) -> list[np.ndarray]:
        return [table[row, :length].astype(np.float32) for row, length in enumerate(lengths)]

    return cut(advantages), cut(returns)
