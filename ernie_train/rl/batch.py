"""From scored rollouts to what an update learns from: logprobs, values, advantages, micro-batches.

Shapes: B samples of a micro-batch, S positions, N completion tokens of all its samples, P problems,
G completions of a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core import process_group
from ernie_train.losses import gae, group_advantages, kl_estimate, token_logprobs, whiten
from ernie_train.model import Ernie4_5_MoeForCausalLM, RouterStats
from ernie_train.parallel import HasDecoder, Lockstep
from ernie_train.rl.critic import Critic
from ernie_train.rl.rollout import Group, Sample

T = TypeVar("T")
_NORMALIZE_EPSILON = 1e-4  # in rewards, as in group_advantages


@dataclass(frozen=True)
class SampleBatch:
    """A micro-batch: samples, and pairs (chosen, rejected) of them by their place in it."""

    samples: tuple[Sample, ...]
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model: a completion's last one predicts nothing."""
        return sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in self.samples)

    @cached_property
    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and document_ids [B,S], padded on the right."""
        texts = [(s.prompt_ids + s.completion_ids)[:-1] for s in self.samples]
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        documents = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], documents[row, : len(text)] = text, 1
        return ids, documents

    @cached_property
    def rows(self) -> np.ndarray:
        """Where among the real tokens the predictor of each completion token stands, [N]."""
        found, start = [], 0
        for s in self.samples:
            prompt, completion = len(s.prompt_ids), len(s.completion_ids)
            found.append(start + prompt - 1 + np.arange(completion))
            start += prompt + completion - 1
        return np.concatenate(found)

    @cached_property
    def targets(self) -> np.ndarray:
        """The completion tokens [N], sample after sample."""
        return np.concatenate([np.array(s.completion_ids, np.int64) for s in self.samples])

    @cached_property
    def owners(self) -> np.ndarray:
        """The sample of each completion token [N]."""
        return np.repeat(np.arange(len(self.samples)), self._lengths)

    @cached_property
    def trained(self) -> np.ndarray:
        """1 for the tokens that the policy learns from, else 0, float32 [N]."""
        flags = [s.trained for s in self.samples]
        return np.repeat(np.array(flags, np.float32), self._lengths)

    @property
    def _lengths(self) -> list[int]:
        return [len(s.completion_ids) for s in self.samples]

    def gather(
        self, name: Literal["old_logprobs", "ref_logprobs", "values", "advantages", "returns"]
    ) -> Tensor:
        """One of the samples' arrays as a tensor [N]; 0 where a sample has none."""
        parts = []
        for s in self.samples:
            array = getattr(s, name)
            parts.append(np.zeros(len(s.completion_ids), np.float32) if array is None else array)
        return paddle.to_tensor(np.concatenate(parts).astype(np.float32))


def policy_logprobs(
    model: Ernie4_5_MoeForCausalLM,
    batch: SampleBatch,
    *,
    temperature: float,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, list[RouterStats]]:
    """Logprobs [N] of the completion tokens under the sampling temperature, entropies, routing."""
    ids, documents = batch.inputs
    output = model.model(paddle.to_tensor(ids), document_ids=documents)
    hidden = paddle.gather(output.hidden, paddle.to_tensor(batch.rows))
    logprobs, entropy = token_logprobs(
        hidden,
        *model.head(),
        paddle.to_tensor(batch.targets),
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return logprobs, entropy, output.router_stats


def critic_values(critic: Critic, batch: SampleBatch) -> tuple[Tensor, list[RouterStats]]:
    """Values [N] of the states in which the completion tokens are chosen."""
    ids, documents = batch.inputs
    values, output = critic(paddle.to_tensor(ids), documents)
    return paddle.gather(values, paddle.to_tensor(batch.rows)), output.router_stats


def _in_batches(samples: Sequence[Sample], size: int) -> list[SampleBatch]:
    """Samples of similar length together; the order of `samples` is theirs to keep."""
    ordered = sorted(samples, key=lambda s: len(s.prompt_ids) + len(s.completion_ids))
    starts = range(0, len(ordered), size)
    return [SampleBatch(tuple(ordered[start : start + size])) for start in starts]


def _fill_in(
    name: str,
    model: HasDecoder,
    batches: list[SampleBatch],
    compute: Callable[[SampleBatch], tuple[np.ndarray, T]],
) -> list[T]:
    """Gives every sample of all batches its part of `compute`, run on each rank for its share.

    compute: batch -> numbers of its completion tokens [N], and what else was seen, which is
    returned for all batches.
    """
    own = []
    with Lockstep(model) as lockstep, paddle.no_grad():
        for batch in process_group.shard(batches):
            lockstep.next_pass()
            own.append(compute(batch))
    found = process_group.gather_shards(own)
    for batch, (numbers, _) in zip(batches, found, strict=True):
        ends = np.cumsum([len(s.completion_ids) for s in batch.samples])[:-1]
        for s, part in zip(batch.samples, np.split(numbers, ends), strict=True):
            setattr(s, name, part)
    return [seen for _, seen in found]


def add_logprobs(
    model: Ernie4_5_MoeForCausalLM,
    samples: Sequence[Sample],
    name: Literal["old_logprobs", "ref_logprobs"],
    *,
    temperature: float,
    batch_size: int,
) -> float | None:
    """Fills in `name` of every sample; every rank must call it.

    Returns the share of tokens that the model sends to other experts than `Sample.expert_ids` says,
    None where that is not recorded.
    """

    def compute(batch: SampleBatch) -> tuple[np.ndarray, list[np.ndarray]]:
        logprobs, _, router_stats = policy_logprobs(model, batch, temperature=temperature)
        return logprobs.numpy(), _changed_experts(batch, router_stats)

    training = model.training
    model.eval()
    seen = _fill_in(name, model, _in_batches(samples, batch_size), compute)
    if training:
        model.train()
    changed = [array for arrays in seen for array in arrays]
    return float(np.concatenate(changed).mean()) if changed else None


def _changed_experts(batch: SampleBatch, router_stats: list[RouterStats]) -> list[np.ndarray]:
    sampled = [s.expert_ids for s in batch.samples]
    if not router_stats or any(experts is None for experts in sampled):
        return []
    now = np.stack([stats.expert_ids.numpy()[batch.rows] for stats in router_stats], axis=1)
    before = np.concatenate([experts for experts in sampled if experts is not None])
    return [(np.sort(now, -1) != np.sort(before, -1)).any((1, 2))]


def add_values(critic: Critic, samples: Sequence[Sample], *, batch_size: int) -> None:
    """Fills in the values of every sample; every rank must call it."""

    def compute(batch: SampleBatch) -> tuple[np.ndarray, None]:
        return critic_values(critic, batch)[0].numpy(), None

    critic.eval()
    _fill_in("values", critic, _in_batches(samples, batch_size), compute)
    critic.train()


# ---- rewards to advantages -----------------------------------------------------------------------


def reward_table(groups: Sequence[Group], *, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """rewards [P,G] and which of them are valid; `normalize` centres and scales each domain.

    A completion without a verdict, or masked, is not valid and enters no mean.
    """
    rewards = np.array([[s.reward for s in group] for group in groups], np.float64)
    valid = np.array([[s.score.trains and s.trained for s in group] for group in groups], bool)
    if normalize:
        domains = np.array([[s.domain for s in group] for group in groups])
        for domain in np.unique(domains):
            here = (domains == domain) & valid
            if here.sum() > 1:
                centred = rewards[here] - rewards[here].mean()
                rewards[here] = centred / (rewards[here].std(ddof=1) + _NORMALIZE_EPSILON)
    return rewards, valid


@dataclass(frozen=True)
class KlInReward:
    """Subtracts coef * KL estimate from the reward of each token."""

    coef: float
    kind: Literal["k1", "k2", "k3"]

    def penalties(self, sample: Sample) -> np.ndarray:
        if sample.old_logprobs is None or sample.ref_logprobs is None:
            raise ValueError("the penalty needs old_logprobs and ref_logprobs")
        estimate: np.ndarray = kl_estimate(sample.old_logprobs, sample.ref_logprobs, self.kind)
        return self.coef * estimate


def add_group_advantages(
    groups: Sequence[Group],
    rewards: np.ndarray,
    valid: np.ndarray,
    *,
    scale: Literal["std", "none"],
    kl: KlInReward | None,
) -> None:
    """The same advantage for every token of a completion: its reward against its group's."""
    if kl is not None:
        rewards = rewards - np.array([[kl.penalties(s).sum() for s in group] for group in groups])
    advantages = group_advantages(rewards, valid, scale=scale)
    for group, row in zip(groups, advantages, strict=True):
        for s, advantage in zip(group, row, strict=True):
            s.advantages = np.full(len(s.completion_ids), advantage, np.float32)


def add_gae(
    groups: Sequence[Group],
    rewards: np.ndarray,
    valid: np.ndarray,
    *,
    gamma: float,
    lam: float,
    kl: KlInReward | None,
) -> None:
    """Advantages over the critic, whitened over all valid tokens, and the critic's returns.

    The reward stands at the last token; KL penalties, if any, at each.
    """
    samples = [s for group in groups for s in group]
    width = max(len(s.completion_ids) for s in samples)
    table = {name: np.zeros((len(samples), width)) for name in ("reward", "value", "mask")}
    flat_rewards, flat_valid = rewards.reshape(-1), valid.reshape(-1)
    for row, s in enumerate(samples):
        length = len(s.completion_ids)
        if s.values is None:
            raise ValueError("generalized advantages need the critic's values")
        if kl is not None:
            table["reward"][row, :length] -= kl.penalties(s)
        table["reward"][row, length - 1] += flat_rewards[row]
        table["value"][row, :length] = s.values
        table["mask"][row, :length] = flat_valid[row]
    advantages, returns = gae(table["reward"], table["value"], table["mask"], gamma=gamma, lam=lam)
    advantages = whiten(advantages, table["mask"])
    for row, s in enumerate(samples):
        length = len(s.completion_ids)
        s.advantages = advantages[row, :length].astype(np.float32)
        s.returns = returns[row, :length].astype(np.float32)


# ---- micro-batches -------------------------------------------------------------------------------

Pairing = tuple[Sample, Sample]  # chosen, rejected


def micro_batches(
    samples: Sequence[Sample], pairs: Sequence[Pairing], size: int
) -> list[SampleBatch]:
    """`samples` in micro-batches of at most `size`, with the two of every pair in the same one.

    Partners may be among the samples or not; each sample goes through the model once, unless it is
    in several pairs: then it comes again, to be compared only. Similar lengths stand together.
    """
    placed: set[int] = set()
    units: list[tuple[list[Sample], list[tuple[int, int]]]] = []
    for chosen, rejected in pairs:
        unit = [s if id(s) not in placed else _compared_only(s) for s in (chosen, rejected)]
        placed |= {id(chosen), id(rejected)}
        units.append((unit, [(0, 1)]))
    units += [([s], []) for s in samples if id(s) not in placed]
    units.sort(key=lambda u: max(len(s.prompt_ids) + len(s.completion_ids) for s in u[0]))
    batches: list[SampleBatch] = []
    held: list[Sample] = []
    held_pairs: list[tuple[int, int]] = []
    for unit, unit_pairs in units:
        if held and len(held) + len(unit) > size:
            batches.append(SampleBatch(tuple(held), tuple(held_pairs)))
            held, held_pairs = [], []
        held_pairs += [(a + len(held), b + len(held)) for a, b in unit_pairs]
        held += unit
    if held:
        batches.append(SampleBatch(tuple(held), tuple(held_pairs)))
    return batches


def _compared_only(sample: Sample) -> Sample:
    return Sample(
        sample.problem,
        sample.prompt_ids,
        sample.completion_ids,
        ref_logprobs=sample.ref_logprobs,
        trained=False,
    )
