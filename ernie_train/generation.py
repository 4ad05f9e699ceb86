"""Batched sampling with a key/value cache; finished sequences leave the batch.

Shapes: B sequences still running, L MoE layers, K experts per token, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.errors import Interrupted
from ernie_train.model import Ernie4_5_MoeForCausalLM, KVCache
from ernie_train.model.decode import Decoder, Prediction, can_decode
from ernie_train.sampling import Sampler, SamplingConfig

_LEAVE_SHARE = 0.125  # the cache is repacked when this share of the batch has finished


class _Cache(Protocol):
    """Keys and values of the sequences still running."""

    def select(self, keep: np.ndarray) -> None: ...


class _Engine(Protocol):
    """What predicts: `Decoder`, or the model's own forward pass."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Prediction, Any]: ...

    def __call__(self, tokens: np.ndarray, cache: Any) -> Prediction: ...


@dataclass
class Completion:
    """What was sampled after a prompt; a stop token, if one was reached, is the last of `ids`.

    `logprobs` are those of the distribution at the sampling temperature (greedy: at 1), before
    top-p and top-k cut it: what a policy update at this temperature computes again.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nats
    finished: bool = False  # a stop token was reached; False: cut at max_new_tokens
    # [T,L,K] int16, if asked for: the experts at the position that predicted each token.
    expert_ids: np.ndarray | None = field(default=None, compare=False)


def generate(
    model: Ernie4_5_MoeForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    eos_token_id: int | Iterable[int] = (),
    batch_size: int = 256,
    record_experts: bool = False,
    numbers: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Continues every prompt until a stop token or `max_new_tokens`; completions in prompt order.

    The random numbers of a sequence depend on `seed` and its number alone, not on its neighbours in
    the batch; `numbers` are the prompts' indices unless given. Equal prompts are computed once a
    batch. `record_experts` fills `Completion.expert_ids`. `on_progress` is told how many prompts
    are done; `stop_requested` is asked once before each forward pass and raises `Interrupted` when
    true. Raises `ValueError` on an empty prompt and on settings out of range.
    """
    config = SamplingConfig(max_new_tokens, temperature, top_p, top_k, seed)
    config.check()
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty")
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    completions = [Completion() for _ in prompts]
    order = _by_length_and_prompt(prompts)
    was_training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            engine: _Engine = Decoder(model) if can_decode(model) else _OwnForward(model)
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                known = batch if numbers is None else [numbers[i] for i in batch]
                rollout = _Rollout(engine, config, known, stops, record_experts)
                rollout.run([prompts[i] for i in batch], stop_requested)
                for row, i in enumerate(batch):
                    completions[i] = rollout.completion(row)
                on_progress(start + len(batch))
    finally:
        if was_training:
            model.train()
    return completions


def _by_length_and_prompt(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Prompts of similar length share a batch, so that prefilling wastes little; equal ones too."""
    first: dict[tuple[int, ...], int] = {}
    leader = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), leader[i], i))


class _Rollout:
    """The sequences of one batch, numbered 0..S-1, and what was sampled for them so far."""

    def __init__(
        self,
        engine: _Engine,
        config: SamplingConfig,
        indices: list[int],
        stops: list[int],
        record_experts: bool,
    ) -> None:
        self.engine = engine
        self.config = config
        self.stops = np.array(stops, np.int64)
        self.sampler = Sampler(config, indices)
        shape = (len(indices), config.max_new_tokens)
        self.ids = np.zeros(shape, np.int64)
        self.logprobs = np.zeros(shape, np.float32)
        self.lengths = np.zeros(len(indices), np.int64)
        self.finished = np.zeros(len(indices), bool)
        self.record_experts = record_experts
        self.experts: np.ndarray | None = None  # [S,max_new_tokens,L,K] once the first are known

    def run(self, prompts: list[Sequence[int]], stop_requested: Callable[[], bool]) -> None:
        """Samples until every sequence has ended; raises `Interrupted`."""
        _ask(stop_requested)
        prediction, cache = _prefill(self.engine, prompts)
        rows = np.arange(len(prompts))
        for number in range(self.config.max_new_tokens):
            tokens = self._sample(prediction, rows, number)
            running = ~self.finished[rows]
            if not running.any() or number + 1 == self.config.max_new_tokens:
                return
            if running.mean() <= 1 - _LEAVE_SHARE:
                keep = _survivors(running)
                cache.select(keep)
                rows, tokens = rows[keep], tokens[keep]
            _ask(stop_requested)
            prediction = self.engine(tokens, cache)

    def _sample(self, prediction: Prediction, rows: np.ndarray, number: int) -> np.ndarray:
        logits, experts = prediction
        tokens, logprobs = self.sampler(logits, rows, number)
        self.ids[rows, number] = tokens
        self.logprobs[rows, number] = logprobs
        if self.record_experts and experts:  # a dense model has none
            chosen = np.stack(experts, 1)  # [B,L,K]
            if self.experts is None:
                self.experts = np.zeros((*self.ids.shape, *chosen.shape[1:]), np.int16)
            self.experts[rows, number] = chosen
        # Those that have finished before stay as they are until they leave the batch.
        running = rows[~self.finished[rows]]
        self.lengths[running] = number + 1
        self.finished[running] = np.isin(self.ids[running, number], self.stops)
        return tokens

    def completion(self, row: int) -> Completion:
        """What was sampled for the sequence `row`."""
        length = int(self.lengths[row])
        experts = None if self.experts is None else self.experts[row, :length].copy()
        return Completion(
            self.ids[row, :length].tolist(),
            self.logprobs[row, :length].tolist(),
            bool(self.finished[row]),
            experts,
        )


def _ask(stop_requested: Callable[[], bool]) -> None:
    if stop_requested():
        raise Interrupted("stopped on a signal while generating")


def _survivors(running: np.ndarray) -> np.ndarray:
    """Numbers of the running of a batch [B]: the last ones fill the holes, so that few move."""
    left = np.flatnonzero(running)
    keep = np.arange(len(left))
    keep[~running[: len(left)]] = left[left >= len(left)]
    return keep


def _prefill(engine: _Engine, prompts: list[Sequence[int]]) -> tuple[Prediction, _Cache]:
    """What follows every prompt, and the filled cache; equal prompts are computed once."""
    number: dict[tuple[int, ...], int] = {}
    owner = np.array([number.setdefault(tuple(prompt), len(number)) for prompt in prompts])
    (logits, experts), cache = engine.prefill(list(number))
    if len(number) < len(prompts):
        cache.select(owner)
        logits, experts = logits[owner], [chosen[owner] for chosen in experts]
    return (logits, experts), cache


class _OwnForward:
    """The model's own forward pass, for what `Decoder` does not do."""

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        self.model = model

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Prediction, KVCache]:
        """What follows each prompt, and the cache to go on with."""
        cache = self.model.new_cache(len(prompts))
        input_ids, document_ids = _right_padded(prompts)
        output = self.model.model(input_ids, document_ids=document_ids, kv_cache=cache)
        last = paddle.to_tensor(np.cumsum(output.layout.row_counts) - 1)
        experts = [paddle.gather(stats.expert_ids, last) for stats in output.router_stats]
        return self._prediction(paddle.gather(output.hidden, last), experts), cache

    def __call__(self, tokens: np.ndarray, cache: KVCache) -> Prediction:
        """Appends `tokens` [B] to the sequences of `cache`."""
        output = self.model.model(paddle.to_tensor(tokens[:, None]), kv_cache=cache)
        return self._prediction(output.hidden, [stats.expert_ids for stats in output.router_stats])

    def _prediction(self, hidden: Tensor, experts: list[Tensor]) -> Prediction:
        logits = self.model.logits(hidden).astype("float32").numpy()
        return logits, [chosen.numpy() for chosen in experts]


def _right_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), np.int64)
    real = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        real[row, : len(prompt)] = 1
    return paddle.to_tensor(ids), paddle.to_tensor(real)
