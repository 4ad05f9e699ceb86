"""Continuous batching: sequences run side by side in lanes, and waiting ones take those that end.

A lane is a row of the batch and of the key/value cache. Equal prompts wait next to each other: the
first of them is prefilled, the others copy its keys and values, also when they start later.

Shapes: B lanes, V vocabulary, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ernie_train.core.worker_pool import shared_zeros
from ernie_train.generate.device_sampler import DeviceSampler
from ernie_train.generate.paddle_decoder import PaddleDecoder
from ernie_train.generate.prompt_experts import PromptExperts
from ernie_train.generate.sampler import Sampler, SamplingConfig
from ernie_train.model.numpy_decoder import Prediction

# Lanes are taken anew, or dropped, once they have idled for as long as so many passes of all lanes
# take: where a prefill of a few prompts takes as long as a decoding step, this is the least that
# both cost together, whatever the length of completions. With `tiny` on a CPU, 8 to 64 lanes, 0.25
# gives 0.96 to 1.05 times as many tokens per processor second, 3 gives 0.89 to 0.97 times.
_IDLE_PASSES = 1.0


class Cache(Protocol):
    """Keys and values of the sequences in the lanes."""

    def select(self, keep: np.ndarray) -> None: ...

    def copy(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None: ...

    def rewind(self, sequences: np.ndarray) -> None: ...


class Decoder(Protocol):
    """Computes the logits of next tokens: `NumpyDecoder` or `PaddleDecoder`."""

    def new_cache(self, batch: int, slots: int) -> Any: ...

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Any,
        sequences: np.ndarray,
        recorded: list[np.ndarray] | None = None,
    ) -> Prediction: ...

    def __call__(self, tokens: np.ndarray, cache: Any) -> Prediction: ...


@dataclass(frozen=True)
class Request:
    """Prompts and settings of one `generate` call; a prompt is named by its index."""

    prompts: Sequence[Sequence[int]]
    leaders: Sequence[int]  # of each prompt, the first that equals it
    sequence_ids: Sequence[int]  # with the seed, they determine the random numbers
    config: SamplingConfig
    stop_tokens: np.ndarray
    limits: np.ndarray  # [prompts] the most tokens of each
    on_token: Callable[[int, int], None] | None = None


class Outputs:
    """Sampled tokens of all prompts, in memory that the processes share."""

    def __init__(self, count: int, max_new_tokens: int) -> None:
        shape = (count, max_new_tokens)
        self.ids = shared_zeros(shape, np.int64)
        self.logprobs = shared_zeros(shape, np.float32)
        self.lengths = shared_zeros(count, np.int64)
        self.finished = shared_zeros(count, bool)
        self.ended = shared_zeros(count, bool)  # finished or at its limit
        self.recorded = np.zeros(count, bool)  # the completions whose experts are
        self.experts: np.ndarray | None = None
        self.prompts: PromptExperts | None = None  # if those of prompts are recorded too

    def record_experts(
        self, recorded: np.ndarray, shape: tuple[int, int], dtype: type[np.integer]
    ) -> None:
        """Make room for experts of the `recorded` completions, bool [prompts]; `shape`: (L, K).

        Memory is taken where it is written, so the others take none.
        """
        self.recorded, self.experts = recorded, shared_zeros((*self.ids.shape, *shape), dtype)


class _Prefilled(NamedTuple):
    """The prompt that was prefilled last, for equal ones that still wait."""

    leader: int
    lane: int  # holds it until an equal one or none is left
    prediction: Prediction  # after it, of one row


class LaneSampler:
    """Samples a queue of prompts into `outputs`, some at once, in the order of the queue."""

    def __init__(
        self, decoder: Decoder, request: Request, outputs: Outputs, queue: list[int], lanes: int
    ) -> None:
        """`queue`: prompt indices, equal prompts next to each other; `lanes`: the most at once."""
        self.decoder, self.request, self.outputs = decoder, request, outputs
        self.waiting = deque(queue)
        count = min(lanes, len(queue))
        on_gpu = isinstance(decoder, PaddleDecoder) and decoder.on_gpu
        self.sampler = (DeviceSampler if on_gpu else Sampler)(request.config, count)
        slots = max(len(request.prompts[i]) + int(request.limits[i]) for i in queue)
        self.cache: Cache = decoder.new_cache(count, slots)
        self.prompts = np.zeros(count, np.int64)  # [B] the prompt in each lane
        self.tokens = np.zeros(count, np.int64)  # [B] the last token of each
        self.idle = np.ones(count, bool)  # [B] its sequence has ended
        self.idled = 0  # lanes that idled, summed over passes since any were last taken or dropped
        self.prefilled: _Prefilled | None = None

    def run(self, before_pass: Callable[[], None]) -> None:
        """Sample until every sequence has ended; call `before_pass` before each forward pass."""
        while self._settle(before_pass):
            before_pass()
            prediction = self.decoder(self.tokens, self.cache)
            # The passes between its end and the next prompt write a lane's same slot again.
            idle = np.flatnonzero(self.idle)
            self.cache.rewind(idle)
            self.idled += len(idle)
            self._sample(prediction, np.arange(len(self.tokens)))

    def _settle(self, before_pass: Callable[[], None]) -> bool:
        """Let waiting prompts take idle lanes where that pays; return whether any lane is left."""
        while self.idle.any() and (self.idle.all() or self.idled >= _IDLE_PASSES * len(self.idle)):
            self.idled = 0
            if self.waiting:
                self._admit(np.flatnonzero(self.idle)[: len(self.waiting)], before_pass)
            if not self.waiting:
                self._drop_idle()
        return len(self.idle) > 0

    def _drop_idle(self) -> None:
        keep = _compaction(~self.idle)
        self.cache.select(keep)
        self.sampler.select(keep)
        self.prompts, self.tokens = self.prompts[keep], self.tokens[keep]
        self.idle = self.idle[keep]

    def _admit(self, lanes: np.ndarray, before_pass: Callable[[], None]) -> None:
        """Let the next prompts start in `lanes`, and sample their first tokens."""
        taken = [self.waiting.popleft() for _ in lanes]
        self.prompts[lanes], self.idle[lanes] = taken, False
        self.sampler.seat(lanes, [self.request.sequence_ids[i] for i in taken])
        leaders = np.array([self.request.leaders[i] for i in taken])
        known = self.prefilled
        joining = leaders == known.leader if known is not None else np.zeros(len(lanes), bool)
        # First those, since a new prompt may take the lane that they copy.
        if known is not None and joining.any():
            again = _rows(known.prediction, np.zeros(joining.sum(), np.int64))
            self._start(lanes[joining], again, np.full(joining.sum(), known.lane))
        if not joining.all():
            before_pass()
            self._prefill(lanes[~joining], leaders[~joining])

    def _prefill(self, lanes: np.ndarray, leaders: np.ndarray) -> None:
        """Compute each different prompt once, for all `lanes` [n] that it goes to."""
        opens = np.append(True, leaders[1:] != leaders[:-1])
        owner = np.cumsum(opens) - 1  # [n]
        firsts = lanes[opens]
        indices = self.prompts[firsts].tolist()
        kept = self.outputs.prompts
        recorded: list[np.ndarray] | None = None if kept is None else []
        prompts = [self.request.prompts[i] for i in indices]
        prediction = self.decoder.prefill(prompts, self.cache, firsts, recorded)
        if kept is not None and recorded is not None:
            kept.record(indices, recorded)
        last = _rows(prediction, np.array([len(firsts) - 1]))
        self.prefilled = _Prefilled(int(leaders[-1]), int(firsts[-1]), last)
        self._start(lanes, _rows(prediction, owner), firsts[owner])

    def _start(self, lanes: np.ndarray, prediction: Prediction, sources: np.ndarray) -> None:
        """Give `lanes` the prompts of `sources`, both [n], and sample what follows them."""
        lengths = np.array([len(self.request.prompts[i]) for i in self.prompts[lanes]])
        self.cache.copy(sources, lanes, lengths)
        self._sample(prediction, lanes)

    def _sample(self, prediction: Prediction, lanes: np.ndarray) -> None:
        """Sample and record the next token of the sequences in `lanes` [n]; idle ones stay."""
        logits, experts = prediction
        outputs, idle = self.outputs, self.idle[lanes]
        steps = outputs.lengths[self.prompts[lanes]]
        tokens, logprobs = self.sampler(logits, lanes, steps - idle)
        self.tokens[lanes] = tokens
        runs = ~idle
        prompts, steps, tokens = self.prompts[lanes][runs], steps[runs], tokens[runs]
        outputs.ids[prompts, steps] = tokens
        outputs.logprobs[prompts, steps] = logprobs[runs]
        if outputs.experts is not None:
            kept = outputs.recorded[prompts]
            chosen = np.stack(experts, 1)[runs]  # [n,L,K]
            outputs.experts[prompts[kept], steps[kept]] = chosen[kept]
        outputs.lengths[prompts] = steps + 1
        if self.request.on_token is not None:
            for prompt, token in zip(prompts.tolist(), tokens.tolist(), strict=True):
                self.request.on_token(prompt, token)
        stopped = np.isin(tokens, self.request.stop_tokens)
        outputs.finished[prompts] = stopped
        outputs.ended[prompts] = stopped | (steps + 1 == self.request.limits[prompts])
        self.idle[lanes[runs]] = outputs.ended[prompts]


def _rows(prediction: Prediction, rows: np.ndarray) -> Prediction:
    logits, experts = prediction
    return logits[rows], [chosen[rows] for chosen in experts]


def _compaction(running: np.ndarray) -> np.ndarray:
    """Return the indices of the running sequences of a batch [B].

    The last ones fill the gaps of the finished ones, so that the cache moves few sequences.
    """
    left = np.flatnonzero(running)
    keep = np.arange(len(left))
    keep[~running[: len(left)]] = left[left >= len(left)]
    return keep
