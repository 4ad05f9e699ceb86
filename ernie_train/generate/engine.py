"""Batched sampling with a key/value cache; finished sequences leave the batch.

On a CPU, processes share the sequences: as many as matrix products have threads, which speed up
little else.

Shapes: B sequences still running, L MoE layers, K experts per token, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import Interrupted
from ernie_train.core.worker_pool import WorkerPool, can_limit_blas, one_blas_thread, shared_zeros
from ernie_train.generate.sampler import Sampler, SamplingConfig
from ernie_train.model import Ernie4_5_MoeForCausalLM, KVCache
from ernie_train.model.numpy_decoder import Decoder, Prediction, can_decode

_LEAVE_SHARE = 0.125  # the cache is repacked when this share of the batch has finished
# Of a process. Most of a step does not depend on them, so that with fewer a fork hardly pays.
_LEAST_SEQUENCES = 8


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
    batch. At most `batch_size` sequences are sampled at once, by all processes together; with
    another number of threads sums are rounded otherwise. `record_experts` fills
    `Completion.expert_ids`. `on_progress` is told how many prompts are done; `stop_requested` is
    asked before each forward pass, and while this process waits for others, and raises
    `Interrupted` when true. Raises `ValueError` on an empty prompt and on settings out of range,
    `ErnieTrainError` if one of the processes was killed.
    """
    config = SamplingConfig(max_new_tokens, temperature, top_p, top_k, seed)
    config.check()
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty")
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    known = range(len(prompts)) if numbers is None else numbers
    task = _Task(prompts, known, config, np.array(stops, np.int64))
    sampled = _Sampled(len(prompts), max_new_tokens, _choices(model) if record_experts else None)
    was_training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            engine: _Engine = Decoder(model) if can_decode(model) else _OwnForward(model)
            processes = _processes(engine, min(len(prompts), batch_size))
            shares = _shares(prompts, processes, batch_size)
            _run_shares(shares, engine, task, sampled, on_progress, stop_requested)
    finally:
        if was_training:
            model.train()
    return [sampled.completion(i) for i in range(len(prompts))]


@dataclass(frozen=True)
class _Task:
    """What is to be sampled; `numbers` choose the random numbers of the prompts."""

    prompts: Sequence[Sequence[int]]
    numbers: Sequence[int]
    config: SamplingConfig
    stops: np.ndarray


class _Sampled:
    """What was sampled so far after all N prompts, by whichever process."""

    def __init__(self, count: int, max_new_tokens: int, choices: tuple[int, int] | None) -> None:
        """`choices` are L and K if experts are to be recorded."""
        shape = (count, max_new_tokens)
        self.ids = shared_zeros(shape, np.int64)
        self.logprobs = shared_zeros(shape, np.float32)
        self.lengths = shared_zeros(count, np.int64)
        self.finished = shared_zeros(count, bool)
        self.experts = None if choices is None else shared_zeros((*shape, *choices), np.int16)

    def completion(self, i: int) -> Completion:
        """What was sampled after prompt `i`."""
        length = int(self.lengths[i])
        experts = None if self.experts is None else self.experts[i, :length].copy()
        return Completion(
            self.ids[i, :length].tolist(),
            self.logprobs[i, :length].tolist(),
            bool(self.finished[i]),
            experts,
        )


def _choices(model: Ernie4_5_MoeForCausalLM) -> tuple[int, int] | None:
    """MoE layers and experts per token; None for a dense model."""
    layers = sum(layer.is_moe for layer in model.model.layers)
    return (layers, model.config.moe_k) if layers else None


# ---- sharing out ---------------------------------------------------------------------------------


def _processes(engine: _Engine, sequences: int) -> int:
    """How many processes sample so many sequences at once."""
    if not (isinstance(engine, Decoder) and engine.without_paddle and can_limit_blas()):
        return 1
    return max(1, min(cpu_setup().threads, sequences // _LEAST_SEQUENCES))


def _shares(
    prompts: Sequence[Sequence[int]], processes: int, batch_size: int
) -> list[list[list[int]]]:
    """The batches of each process, by the prompts' numbers; `batch_size` is that of all together.

    Prompts of similar length share a batch, so that prefilling wastes little; equal ones too.
    """
    first: dict[tuple[int, ...], int] = {}
    leader = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), leader[i], i))
    groups = [list(group) for _, group in groupby(order, leader.__getitem__)]
    hands = [order] if processes == 1 else _hands(groups, list(map(len, prompts)), processes)
    size = batch_size // processes
    return [[hand[at : at + size] for at in range(0, len(hand), size)] for hand in hands]


def _hands(groups: list[list[int]], lengths: list[int], processes: int) -> list[list[int]]:
    """Sequences of `lengths` dealt out evenly, whole groups where that is possible.

    How long completions become is not known, so numbers of sequences are evened out first, then
    tokens of prompts. Within a hand groups keep their order.
    """
    most = -(-sum(map(len, groups)) // processes)
    loads = [(0, 0, hand) for hand in range(processes)]  # sequences, tokens, whose
    pieces: list[list[list[int]]] = [[] for _ in loads]
    for group in reversed(groups):  # the longest first
        whole = min(loads)[0] + len(group) <= most
        for piece in [group] if whole else [[i] for i in group]:
            sequences, tokens, hand = min(loads)
            loads[hand] = (sequences + len(piece), tokens + sum(lengths[i] for i in piece), hand)
            pieces[hand].append(piece)
    place = {i: at for at, i in enumerate(i for group in groups for i in group)}
    return [sorted((i for piece in hand for i in piece), key=place.__getitem__) for hand in pieces]


def _run_shares(
    shares: list[list[list[int]]],
    engine: _Engine,
    task: _Task,
    sampled: _Sampled,
    on_progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> None:
    """This process takes the first share, forked ones the others; raises `Interrupted`."""
    done, told = shared_zeros(len(shares), np.int64), 0

    def work(number: int, ask: Callable[[], None], tell: Callable[[], None]) -> None:
        for batch in shares[number]:
            _Rollout(engine, task, sampled, batch).run(ask)
            done[number] += len(batch)
            tell()

    def ask() -> None:
        if stop_requested():
            raise Interrupted("stopped on a signal while generating")

    def tell() -> None:
        nonlocal told
        if done.sum() > told:
            told = int(done.sum())
            on_progress(told)

    def watch() -> None:
        ask()
        tell()
        pool.poll()

    def nothing() -> None: ...

    if len(shares) == 1:
        work(0, ask, tell)
        return
    with one_blas_thread(), WorkerPool() as pool:
        for number in range(1, len(shares)):
            pool.start(partial(work, number, nothing, nothing))
        work(0, watch, nothing)
        pool.wait(watch)
    tell()


# ---- a batch -------------------------------------------------------------------------------------


class _Rollout:
    """The sequences of one batch, numbered 0..S-1; what is sampled for them goes to `sampled`."""

    def __init__(self, engine: _Engine, task: _Task, sampled: _Sampled, batch: list[int]) -> None:
        """`batch` [S] are numbers of prompts."""
        self.engine, self.config, self.stops = engine, task.config, task.stops
        self.prompts = [task.prompts[i] for i in batch]
        self.sampler = Sampler(task.config, [task.numbers[i] for i in batch])
        self.sampled, self.places = sampled, np.array(batch)

    def run(self, ask: Callable[[], None]) -> None:
        """Samples until every sequence has ended; `ask` is called before each forward pass."""
        ask()
        prediction, cache = _prefill(self.engine, self.prompts)
        rows = np.arange(len(self.prompts))
        for number in range(self.config.max_new_tokens):
            tokens = self._sample(prediction, rows, number)
            running = ~self.sampled.finished[self.places[rows]]
            if not running.any() or number + 1 == self.config.max_new_tokens:
                return
            if running.mean() <= 1 - _LEAVE_SHARE:
                keep = _survivors(running)
                cache.select(keep)
                rows, tokens = rows[keep], tokens[keep]
            ask()
            prediction = self.engine(tokens, cache)

    def _sample(self, prediction: Prediction, rows: np.ndarray, number: int) -> np.ndarray:
        logits, experts = prediction
        sampled, places = self.sampled, self.places[rows]
        tokens, logprobs = self.sampler(logits, rows, number)
        sampled.ids[places, number] = tokens
        sampled.logprobs[places, number] = logprobs
        if sampled.experts is not None:
            sampled.experts[places, number] = np.stack(experts, 1)  # [B,L,K]
        # Those that have finished before stay as they are until they leave the batch.
        running = places[~sampled.finished[places]]
        sampled.lengths[running] = number + 1
        sampled.finished[running] = np.isin(sampled.ids[running, number], self.stops)
        return tokens


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
