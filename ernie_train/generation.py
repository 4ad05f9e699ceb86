"""Batched sampling with a key/value cache; finished sequences leave the batch.

Shapes: B sequences still running, L MoE layers, K experts per token, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.errors import Interrupted
from ernie_train.model import Ernie4_5_MoeForCausalLM, KVCache
from ernie_train.model.decode import Decoder, can_decode
from ernie_train.sampling import Sampler, SamplingConfig

_LEAVE_SHARE = 0.125  # the cache is repacked when this share of the batch has finished

# (tokens [B], cache) -> hidden [B,H] and the experts of each MoE layer [B,K]
Step = Callable[[np.ndarray, KVCache], tuple[Tensor, list[np.ndarray]]]


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
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                known = batch if numbers is None else [numbers[i] for i in batch]
                rollout = _Rollout(model, config, known, stops, record_experts)
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
        model: Ernie4_5_MoeForCausalLM,
        config: SamplingConfig,
        indices: list[int],
        stops: list[int],
        record_experts: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.stops = np.array(stops, np.int64)
        self.sampler = Sampler(config, indices)
        shape = (len(indices), config.max_new_tokens)
        self.ids = np.zeros(shape, np.int64)
        self.logprobs = np.zeros(shape, np.float32)
        self.lengths = np.zeros(len(indices), np.int64)
        self.finished = np.zeros(len(indices), bool)
        # A list of what [B,L,K] the rows [B] chose, step after step.
        self.experts: list[tuple[np.ndarray, np.ndarray]] | None = [] if record_experts else None

    def run(self, prompts: list[Sequence[int]], stop_requested: Callable[[], bool]) -> None:
        """Samples until every sequence has ended; raises `Interrupted`."""
        step: Step = Decoder(self.model) if can_decode(self.model) else partial(_step, self.model)
        _ask(stop_requested)
        hidden, experts, cache = _prefill(self.model, prompts)
        rows = np.arange(len(prompts))
        for number in range(self.config.max_new_tokens):
            tokens = self._sample(hidden, experts, rows, number)
            running = ~self.finished[rows]
            if not running.any() or number + 1 == self.config.max_new_tokens:
                return
            if running.mean() <= 1 - _LEAVE_SHARE:
                keep = np.flatnonzero(running)
                cache.select(keep)
                rows, tokens = rows[keep], tokens[keep]
            _ask(stop_requested)
            hidden, experts = step(tokens, cache)

    def _sample(
        self, hidden: Tensor, experts: list[np.ndarray], rows: np.ndarray, number: int
    ) -> np.ndarray:
        tokens, logprobs = self.sampler(self.model.logits(hidden), rows, number)
        self.ids[rows, number] = tokens
        self.logprobs[rows, number] = logprobs
        if self.experts is not None:
            self.experts.append((rows, np.stack(experts, 1).astype(np.int16)))
        # Those that have finished before stay as they are until they leave the batch.
        running = rows[~self.finished[rows]]
        self.lengths[running] = number + 1
        self.finished[running] = np.isin(self.ids[running, number], self.stops)
        return tokens

    def completion(self, row: int) -> Completion:
        """What was sampled for the sequence `row`."""
        length = int(self.lengths[row])
        experts = None
        if self.experts is not None:
            steps = self.experts[:length]
            experts = np.stack([ids[np.searchsorted(rows, row)] for rows, ids in steps])
        return Completion(
            self.ids[row, :length].tolist(),
            self.logprobs[row, :length].tolist(),
            bool(self.finished[row]),
            experts,
        )


def _ask(stop_requested: Callable[[], bool]) -> None:
    if stop_requested():
        raise Interrupted("stopped on a signal while generating")


def _prefill(
    model: Ernie4_5_MoeForCausalLM, prompts: list[Sequence[int]]
) -> tuple[Tensor, list[np.ndarray], KVCache]:
    """The hidden state [B,H] and experts at the last token of every prompt, and the filled cache.

    A prompt that occurs several times is computed once.
    """
    number: dict[tuple[int, ...], int] = {}
    owner = np.array([number.setdefault(tuple(prompt), len(number)) for prompt in prompts])
    cache = model.new_cache(len(number))
    input_ids, document_ids = _right_padded(list(number))
    output = model.model(input_ids, document_ids=document_ids, kv_cache=cache)
    last = paddle.to_tensor((np.cumsum(output.layout.row_counts) - 1)[owner])
    if len(number) < len(prompts):
        cache.select(owner)
    experts = [paddle.gather(stats.expert_ids, last).numpy() for stats in output.router_stats]
    return paddle.gather(output.hidden, last), experts, cache


def _step(
    model: Ernie4_5_MoeForCausalLM, tokens: np.ndarray, cache: KVCache
) -> tuple[Tensor, list[np.ndarray]]:
    """A step of the model's own forward pass, for what `Decoder` does not do."""
    output = model.model(paddle.to_tensor(tokens[:, None]), kv_cache=cache)
    return output.hidden, [stats.expert_ids.numpy() for stats in output.router_stats]


def _right_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), np.int64)
    real = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        real[row, : len(prompt)] = 1
    return paddle.to_tensor(ids), paddle.to_tensor(real)
