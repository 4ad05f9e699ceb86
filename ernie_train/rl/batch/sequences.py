"""Sequences and preference pairs of an update, and micro-batches of them.

Shapes: M sequences of an iteration; B sequences of a micro-batch, S positions, N tokens of all its
completions that the policy sampled. Tool outputs between them are context: no array has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ernie_train.model.batch_layout import BatchLayout

# An array of [sampled tokens of the completion] for each sequence; None where a sequence has none.
TokenArrays = Sequence[np.ndarray | None]


@dataclass(frozen=True, eq=False)
class TokenizedCompletion:
    """A prompt and a completion of it, as token ids; they are never tokenized again.

    Two of the same tokens are two: sampling may well give them, and each has its reward.

    sampled_mask: which tokens of the completion the policy sampled, where others stand between
        them, such as tool outputs. Only those have logprobs, values and advantages, and are
        learnt from. None: all of them.
    expert_ids: the experts [completion tokens, MoE layers, K] of the positions before each of them,
        as sampling chose them, -1 where unknown; prompt_expert_ids: those of the prompt's positions
        but the last.

    Raises `ValueError` where the mask has another length than the completion, or no token.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    sampled_mask: list[bool] | None = field(default=None, kw_only=True)
    expert_ids: np.ndarray | None = field(default=None, kw_only=True, repr=False)
    prompt_expert_ids: np.ndarray | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        mask = self.sampled_mask
        if mask is not None and (len(mask) != len(self.completion_ids) or not any(mask)):
            raise ValueError(
                f"a sampled_mask of {len(mask)} tokens, {sum(mask)} of them sampled, does not fit "
                f"a completion of {len(self.completion_ids)}"
            )

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def sampled_places(self) -> np.ndarray:
        """Indices into `completion_ids` of the tokens that the policy sampled."""
        if self.sampled_mask is None:
            return np.arange(len(self.completion_ids))
        return np.flatnonzero(self.sampled_mask)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.completion_ids) if self.sampled_mask is None else sum(self.sampled_mask)

    @property
    def routing(self) -> np.ndarray | None:
        """Experts [length - 1, MoE layers, K] of all positions, -1 where unknown; None if all are.

        A completion's last token goes through no model.
        """
        if self.expert_ids is None:
            return None
        before = self.prompt_expert_ids
        if before is None:
            shape = (len(self.prompt_ids) - 1, *self.expert_ids.shape[1:])
            before = np.full(shape, -1, np.int16)
        return np.concatenate([before, self.expert_ids])


class PreferencePair(NamedTuple):
    """Two completions of a prompt, by their place among the sequences."""

    chosen: int
    rejected: int


@dataclass(frozen=True)
class RolloutBatch:
    """The sequences, pairs and arrays of an iteration's update.

    The completions of the groups come first, group after group, then those of offline pairs.
    `old_logprobs`, `sampler_weights`, `advantages`, `values` and `returns` belong to the groups,
    `ref_logprobs` to all sequences; so do `pair_ref_logprobs`, where pairs have a reference of
    their own. What the objective does not need is empty. With `share_prompts` a prompt is computed
    once for all of its completions in a micro-batch.
    """

    sequences: Sequence[TokenizedCompletion]
    pairs: Sequence[PreferencePair] = ()
    num_groups: int = 0
    group_size: int = 1
    policy_mask: np.ndarray | None = None  # bool [num_groups * group_size]; None: all are trained
    old_logprobs: TokenArrays = ()
    ref_logprobs: TokenArrays = ()
    advantages: TokenArrays = ()
    values: TokenArrays = ()
    returns: TokenArrays = ()
    sampler_weights: TokenArrays = ()  # of the tokens' policy terms; empty: all 1
    share_prompts: bool = False
    pair_ref_logprobs: TokenArrays = ()

    @property
    def num_in_groups(self) -> int:
        return self.num_groups * self.group_size

    def is_trained(self, index: int) -> bool:
        """Return whether the policy and value terms take the tokens of a sequence."""
        if index >= self.num_in_groups:
            return False  # of an offline pair: compared only
        return self.policy_mask is None or bool(self.policy_mask[index])


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, and pairs of them by their place in it.

    `trained` [B] says which sequences the policy learns from; the others are only compared.
    `share_prompts`: equal prompts go through once, in a row with all that continues them.
    """

    sequences: tuple[TokenizedCompletion, ...]
    trained: tuple[bool, ...]
    pairs: tuple[PreferencePair, ...] = ()
    old_logprobs: np.ndarray | None = None  # this and the following float32 [N]
    ref_logprobs: np.ndarray | None = None
    advantages: np.ndarray | None = None
    values: np.ndarray | None = None
    returns: np.ndarray | None = None
    sampler_weights: np.ndarray | None = None
    share_prompts: bool = False
    pair_ref_logprobs: np.ndarray | None = None  # None: ref_logprobs

    @classmethod
    def without_arrays(
        cls, sequences: Sequence[TokenizedCompletion], *, share_prompts: bool = False
    ) -> MicroBatch:
        return cls(tuple(sequences), (True,) * len(sequences), share_prompts=share_prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model: a completion's last one predicts nothing."""
        prompts = sum(len(self.sequences[members[0]].prompt_ids) for members in self._sharing)
        return prompts + sum(len(s.completion_ids) - 1 for s in self.sequences)

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        """Starts of the prompt and of the completion of each sequence among the real tokens."""
        found: dict[int, tuple[int, int]] = {}
        start = 0
        for members in self._sharing:
            first, start = start, start + len(self.sequences[members[0]].prompt_ids)
            for index in members:
                found[index] = (first, start)
                start += len(self.sequences[index].completion_ids) - 1
        return [found[index] for index in range(len(self.sequences))]

    @cached_property
    def _sharing(self) -> list[list[int]]:
        """The sequences that share each prompt, in the order of the real tokens."""
        members: dict[object, list[int]] = {}
        for index, s in enumerate(self.sequences):
            key = tuple(s.prompt_ids) if self.share_prompts else index
            members.setdefault(key, []).append(index)
        return list(members.values())

    @cached_property
    def inputs(self) -> tuple[np.ndarray, np.ndarray | BatchLayout]:
        """input_ids and document_ids [B,S], padded on the right.

        With shared prompts input_ids [1,T], and a layout in the place of document_ids.
        """
        if self.share_prompts:
            return self._shared_inputs()
        texts = [(s.prompt_ids + s.completion_ids)[:-1] for s in self.sequences]
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        documents = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], documents[row, : len(text)] = text, 1
        return ids, documents

    def _shared_inputs(self) -> tuple[np.ndarray, BatchLayout]:
        ids: list[int] = []
        groups = []
        for members in self._sharing:
            ids += self.sequences[members[0]].prompt_ids
            completions = [self.sequences[index].completion_ids[:-1] for index in members]
            ids += chain.from_iterable(completions)
            prompt = len(self.sequences[members[0]].prompt_ids)
            groups.append((prompt, [len(completion) for completion in completions]))
        return np.array([ids], np.int64), BatchLayout.shared_prompts(groups)

    @property
    def routing(self) -> np.ndarray | None:
        """Experts [T,L,K] that sampling chose at all real tokens, -1 where unknown; None if all."""
        known = [s.routing for s in self.sequences]
        shape = next((found.shape[1:] for found in known if found is not None), None)
        if shape is None:
            return None
        table = np.full((self.num_tokens, *shape), -1, np.int16)
        for s, found, (prompt, completion) in zip(self.sequences, known, self._starts, strict=True):
            if found is not None:
                size, rest = len(s.prompt_ids), len(s.completion_ids) - 1
                table[prompt : prompt + size] = found[:size]
                table[completion : completion + rest] = found[size:]
        return table

    @cached_property
    def predictors(self) -> np.ndarray:
        """The index among the real tokens of what predicts each sampled token, [N]."""
        found = []
        for s, (prompt, completion) in zip(self.sequences, self._starts, strict=True):
            places, last = s.sampled_places, prompt + len(s.prompt_ids) - 1
            found.append(np.where(places == 0, last, completion + places - 1))
        return np.concatenate(found)

    @cached_property
    def targets(self) -> np.ndarray:
        """The sampled tokens [N], sequence after sequence."""
        return np.concatenate(
            [np.array(s.completion_ids, np.int64)[s.sampled_places] for s in self.sequences]
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Sampled tokens of each sequence [B]."""
        return [s.num_sampled for s in self.sequences]

    @cached_property
    def sequence_ids(self) -> np.ndarray:
        """The sequence of each sampled token [N]."""
        return np.repeat(np.arange(len(self.sequences)), self.lengths)

    @cached_property
    def loss_mask(self) -> np.ndarray:
        """1 for the tokens that the policy learns from, else 0, float32 [N]."""
        return np.repeat(np.array(self.trained, np.float32), self.lengths)

    @cached_property
    def trained_tokens(self) -> np.ndarray:
        """Tokens of each sequence that the policy learns from, [B]."""
        count = len(self.sequences)
        return np.bincount(self.sequence_ids, self.loss_mask, minlength=count)


def length_order(
    sequences: Sequence[TokenizedCompletion], *, share_prompts: bool
) -> Callable[[int], tuple[Any, ...]]:
    """Return a sort key of indices: similar lengths go together, equal prompts if they share."""
    if not share_prompts:
        return lambda index: (sequences[index].length,)
    longest: dict[tuple[int, ...], int] = {}
    for s in sequences:
        prompt = tuple(s.prompt_ids)
        longest[prompt] = max(s.length, longest.get(prompt, 0))

    def key(index: int) -> tuple[Any, ...]:
        prompt = tuple(sequences[index].prompt_ids)
        return (longest[prompt], prompt, sequences[index].length)

    return key
