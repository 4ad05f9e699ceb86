"""Sample the next token of every sequence from its logits.

Shapes: B sequences whose next token is sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# For 64 x 4096 numbers numpy's cumulative sum takes 0.93 ms, sums of 64 neighbours take 0.12. So
# blocks of this many tokens are summed, and sums are accumulated over the blocks and within the one
# block that is hit.
_BLOCK = 64
# top_p looks at so many likeliest tokens first: sorting all of a vocabulary of 100,000 takes 30 ms
# a sequence, finding these 3.
_FIRST = 1024


@dataclass(frozen=True)
class SamplingConfig:
    """`temperature` 0 is greedy; `top_p` 1 and `top_k` 0 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raises `ValueError` that names the setting out of range."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative")


class Sampler:
    """Samples with one uniform random number per token and sequence; greedy decoding uses none."""

    def __init__(self, config: SamplingConfig, lanes: int) -> None:
        """`lanes`: the sequences that are sampled side by side; `seat` says which they are."""
        self.config = config
        size = (lanes, config.max_new_tokens) if config.temperature > 0 else (lanes, 0)
        self.uniform = np.zeros(size)  # [lanes, max_new_tokens]

    def seat(self, lanes: np.ndarray, sequence_ids: Sequence[int]) -> None:
        """Draw for the sequences that take `lanes`: from the seed and their ids alone."""
        if self.config.temperature == 0:
            return
        for lane, i in zip(lanes.tolist(), sequence_ids, strict=True):
            generator = np.random.Generator(np.random.Philox(key=[self.config.seed, i]))
            self.uniform[lane] = generator.random(self.uniform.shape[1])

    def select(self, keep: np.ndarray) -> None:
        """Keep the lanes `keep`, in that order."""
        self.uniform = self.uniform[keep]

    def __call__(
        self, logits: np.ndarray, lanes: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Sample token number `steps` [B] of the sequences in `lanes` [B].

        logits [B,V] float32 -> tokens [B] and their logprobs [B] float32, at the temperature but
        before top-k and top-p truncate the distribution; greedy: at temperature 1.
        """
        if self.config.temperature not in (0.0, 1.0):
            logits = logits / self.config.temperature
        shifted = logits - logits.max(-1, keepdims=True)
        mass = np.exp(shifted)
        total = mass.sum(-1)
        if self.config.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = sample(self._truncate(mass, total), self.uniform[lanes, steps])
        return tokens, shifted[np.arange(len(tokens)), tokens] - np.log(total)

    def _truncate(self, mass: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Return `mass` [B,V], of sum `total` [B], with the tail beyond top-k and top-p at zero."""
        if self.config.top_p == 1 and not self.config.top_k:
            return mass
        top_p, top_k = self.config.top_p, self.config.top_k
        probs = mass / total[:, None]
        kept = np.zeros_like(probs)
        for row, own in enumerate(probs):
            count = top_k or _FIRST
            order, mass_up_to = likeliest(own, count)
            while mass_up_to[-1] < top_p and count < len(own) and not top_k:
                count *= 8  # a flat distribution: others count too
                order, mass_up_to = likeliest(own, count)
            # A token stays while the mass before it is below top_p, so the first always stays.
            order = order[mass_up_to - own[order] < top_p][: top_k or None]
            kept[row, order] = own[order]
        return kept


def likeliest(probs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a row [V] that are as likely as its `count`-th, and sums up to each.

    They are in falling order, equal ones as in the row; the sums in float64.
    """
    tokens = np.arange(len(probs))
    if count < len(probs):
        tokens = np.flatnonzero(probs >= np.partition(probs, -count)[-count])
    tokens = tokens[np.argsort(-probs[tokens], kind="stable")]
    return tokens, np.cumsum(probs[tokens], dtype=np.float64)


def sample(probs: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return a token per row by inverting its cumulative distribution.

    probs [B,V] need not sum to 1; uniform [B] in [0, 1) -> tokens [B], none of probability zero.
    """
    batch, size = probs.shape
    if size % _BLOCK:
        probs = np.pad(probs, ((0, 0), (0, -size % _BLOCK)))
    blocks = probs.reshape(batch, -1, _BLOCK)
    every = np.arange(batch)
    mass = np.cumsum(blocks.sum(-1), -1, dtype=np.float64)  # [B,blocks]
    threshold = uniform * mass[:, -1]
    block = _first_above(mass, threshold)
    inside = np.cumsum(blocks[every, block], -1, dtype=np.float64)  # [B,_BLOCK]
    before = np.where(block > 0, mass[every, block - 1], 0.0)
    return block * _BLOCK + _first_above(inside, threshold - before)


def _first_above(cumulative: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Return the first index of each row whose value exceeds `threshold`.

    The threshold is kept below the row's total, to which rounding may lift it.
    """
    below_total = np.nextafter(cumulative[:, -1], 0.0)
    return (cumulative <= np.minimum(threshold, below_total)[:, None]).sum(-1)
