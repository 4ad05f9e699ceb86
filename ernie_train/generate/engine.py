"""Batched sampling with a key/value cache; finished sequences leave the batch.

On a CPU the sequences are divided among forked processes, one per BLAS thread. A decoding step is
many small operations, which a second thread hardly speeds up; two processes sample 1.4 to 1.6 times
as many tokens per second as one.

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

from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import Interrupted
from ernie_train.core.worker_pool import WorkerPool, can_limit_blas, one_blas_thread, shared_zeros
from ernie_train.generate.device_sampler import DeviceSampler
from ernie_train.generate.paddle_decoder import PaddleDecoder
from ernie_train.generate.prompt_experts import PromptExperts
from ernie_train.generate.sampler import Sampler, SamplingConfig
from ernie_train.kernels.packed import one_mkl_thread
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.numpy_decoder import NumpyDecoder, Prediction, can_decode

_COMPACT_SHARE = 0.125  # the cache is compacted once this share of the batch has finished
# Most of the time of a step does not depend on the number of sequences, so with fewer of them a
# further process hardly pays. (In a rollout of `tiny`, 207 ms on two cores, forking, the child's
# exit and building the decoder take 18 ms.)
_MIN_SEQUENCES_PER_PROCESS = 8

_Prompts = Sequence[Sequence[int]]
_Recorded = list[np.ndarray] | None  # receives the experts of prompts, see `NumpyDecoder.prefill`


class _Cache(Protocol):
    """Keys and values of the sequences still running."""

    def select(self, keep: np.ndarray) -> None: ...


class _Decoder(Protocol):
    """Computes the logits of next tokens: `NumpyDecoder` or `PaddleDecoder`."""

    def prefill(self, prompts: _Prompts, recorded: _Recorded = None) -> tuple[Prediction, Any]: ...

    def __call__(self, tokens: np.ndarray, cache: Any) -> Prediction: ...


@dataclass
class Completion:
    """The tokens sampled for a prompt; a stop token, if one was reached, is the last of `ids`.

    `logprobs` are taken from the distribution at the sampling temperature (greedy: at 1), before
    top-p and top-k truncate it, as a policy update at this temperature recomputes them.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nats
    finished: bool = False  # a stop token was reached; False: cut at max_new_tokens
    # [T,L,K] int16, if requested: the experts at the position that predicted each token.
    expert_ids: np.ndarray | None = field(default=None, compare=False)
    # [S-1,L,K] int16, if requested: those at the positions of the prompt before its last. Equal
    # prompts of a batch share the array.
    prompt_expert_ids: np.ndarray | None = field(default=None, compare=False)


def generate(  # noqa: PLR0913 - the public call; everything after the prompts is a keyword
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
    record_prompt_experts: bool = False,
    sequence_ids: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_token: Callable[[int, int], None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Continue every prompt until a stop token or `max_new_tokens`; return them in prompt order.

    The random numbers of a sequence depend on `seed` and its sequence id alone (by default the
    index of its prompt), not on the batch or the process that samples it. Logits are rounded
    differently with another number of threads. Equal prompts are prefilled once per batch. At most
    `batch_size` sequences are sampled at once, over all processes.

    record_experts: fill `Completion.expert_ids`; record_prompt_experts: `prompt_expert_ids` too.
    limits: the most tokens of each completion; by default, and at most, `max_new_tokens`.
    on_progress: called with the number of finished prompts.
    on_token: called with the index of a prompt and each of its tokens as it is sampled.
    stop_requested: polled before each forward pass and while waiting for other processes; when it
        returns true, `Interrupted` is raised.

    Raises `ValueError` on an empty prompt or a setting out of range, and `ErnieTrainError` if one
    of the processes was killed.
    """
    config = SamplingConfig(max_new_tokens, temperature, top_p, top_k, seed)
    max_tokens = check_request(prompts, config, limits)
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ids = range(len(prompts)) if sequence_ids is None else sequence_ids
    request = _Request(prompts, ids, config, np.array(stops, np.int64), max_tokens, on_token)
    outputs = _Outputs(len(prompts), max_new_tokens, moe_shape(model) if record_experts else None)
    was_training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            decoder: _Decoder
            decoder = NumpyDecoder(model) if can_decode(model) else PaddleDecoder(model)
            at_once = min(len(prompts), batch_size)
            processes = 1 if on_token else _num_processes(decoder, at_once)
            batches = _partition(prompts, processes, batch_size)
            if record_prompt_experts and outputs.moe_shape is not None:
                outputs.prompts = PromptExperts(prompts, batches, outputs.moe_shape)
            _run(batches, decoder, request, outputs, on_progress, stop_requested)
    finally:
        if was_training:
            model.train()
    return [outputs.completion(i) for i in range(len(prompts))]


def check_request(
    prompts: _Prompts, config: SamplingConfig, limits: Sequence[int] | None
) -> np.ndarray:
    """Return the most tokens of each completion; raise `ValueError` on what cannot be sampled."""
    config.check()
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty")
    if limits is None:
        return np.full(len(prompts), config.max_new_tokens)
    found = np.array(limits, np.int64)
    if len(found) and not 1 <= found.min() <= found.max() <= config.max_new_tokens:
        raise ValueError(f"limits must lie between 1 and max_new_tokens={config.max_new_tokens}")
    return found


@dataclass(frozen=True)
class _Request:
    """Prompts and settings of one `generate` call; a prompt is named by its index."""

    prompts: Sequence[Sequence[int]]
    sequence_ids: Sequence[int]  # with the seed, they determine the random numbers
    config: SamplingConfig
    stop_tokens: np.ndarray
    limits: np.ndarray  # [prompts] the most tokens of each
    on_token: Callable[[int, int], None] | None = None


class _Outputs:
    """Sampled tokens of all prompts, in memory that the processes share."""

    def __init__(self, count: int, max_new_tokens: int, moe_shape: tuple[int, int] | None) -> None:
        """`moe_shape`: (L, K) if experts are to be recorded."""
        shape = (count, max_new_tokens)
        self.ids = shared_zeros(shape, np.int64)
        self.logprobs = shared_zeros(shape, np.float32)
        self.lengths = shared_zeros(count, np.int64)
        self.finished = shared_zeros(count, bool)
        self.ended = shared_zeros(count, bool)  # finished or at its limit
        self.moe_shape = moe_shape
        self.experts = None if moe_shape is None else shared_zeros((*shape, *moe_shape), np.int16)
        self.prompts: PromptExperts | None = None  # if those of prompts are recorded too

    def completion(self, i: int) -> Completion:
        """Return the completion of prompt `i`."""
        length = int(self.lengths[i])
        experts = None if self.experts is None else self.experts[i, :length].copy()
        return Completion(
            self.ids[i, :length].tolist(),
            self.logprobs[i, :length].tolist(),
            bool(self.finished[i]),
            experts,
            None if self.prompts is None else self.prompts.of(i),
        )


def moe_shape(model: Ernie4_5_MoeForCausalLM) -> tuple[int, int] | None:
    """Return (MoE layers, experts per token), or None for a dense model."""
    layers = sum(layer.is_moe for layer in model.model.layers)
    return (layers, model.config.moe_k) if layers else None


# ---- processes -----------------------------------------------------------------------------------


def _num_processes(decoder: _Decoder, sequences: int) -> int:
    """Return the number of processes that sample `sequences` at once."""
    if not (isinstance(decoder, NumpyDecoder) and decoder.without_paddle and can_limit_blas()):
        return 1
    return max(1, min(cpu_setup().threads, sequences // _MIN_SEQUENCES_PER_PROCESS))


def _partition(
    prompts: Sequence[Sequence[int]], processes: int, batch_size: int
) -> list[list[list[int]]]:
    """Return the batches of each process, as prompt indices; `batch_size` counts all processes.

    Prompts of similar length share a batch, so that little of the prefill is padding; equal
    prompts are neighbours.
    """
    first: dict[tuple[int, ...], int] = {}
    leader = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), leader[i], i))
    groups = [list(group) for _, group in groupby(order, leader.__getitem__)]
    parts = [order] if processes == 1 else _partition_groups(groups, prompts, processes)
    size = batch_size // processes
    return [[part[at : at + size] for at in range(0, len(part), size)] for part in parts]


def _partition_groups(
    groups: list[list[int]], prompts: Sequence[Sequence[int]], processes: int
) -> list[list[int]]:
    """Partition prompts evenly over processes; split a group of equal prompts only if needed.

    The length of completions is not known in advance, so the number of sequences is balanced
    first, then the number of prompt tokens. A process keeps the order of `groups`.
    """
    most = -(-sum(map(len, groups)) // processes)
    loads = [(0, 0, process) for process in range(processes)]  # sequences, tokens, process
    parts: list[list[int]] = [[] for _ in loads]
    for group in reversed(groups):  # the longest first
        fits = min(loads)[0] + len(group) <= most
        for piece in [group] if fits else [[i] for i in group]:
            sequences, tokens, process = min(loads)
            tokens += sum(len(prompts[i]) for i in piece)
            loads[process] = (sequences + len(piece), tokens, process)
            parts[process] += piece
    rank = {i: at for at, i in enumerate(i for group in groups for i in group)}
    return [sorted(part, key=rank.__getitem__) for part in parts]


def _run(
    batches: list[list[list[int]]],
    decoder: _Decoder,
    request: _Request,
    outputs: _Outputs,
    on_progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Sample `batches` [process][batch]: the first process is this one, the others are forked.

    Raises `Interrupted` when a stop is requested.
    """
    done, reported = shared_zeros(len(batches), np.int64), 0

    def sample(process: int, before_pass: Callable[[], None], after: Callable[[], None]) -> None:
        for batch in batches[process]:
            _BatchSampler(decoder, request, outputs, batch).run(before_pass)
            done[process] += len(batch)
            after()

    def raise_on_stop() -> None:
        if stop_requested():
            raise Interrupted("stopped on a signal while generating")

    def report_progress() -> None:
        nonlocal reported
        if done.sum() > reported:
            reported = int(done.sum())
            on_progress(reported)

    def poll() -> None:
        raise_on_stop()
        report_progress()
        pool.poll()

    def nothing() -> None: ...

    if len(batches) == 1:
        sample(0, raise_on_stop, report_progress)
        return
    # Each process has one BLAS thread: together they use as many cores as one process would.
    with one_blas_thread(), one_mkl_thread(), WorkerPool() as pool:
        for process in range(1, len(batches)):
            pool.start(partial(sample, process, nothing, nothing))
        sample(0, poll, nothing)
        pool.wait(poll)
    report_progress()


# ---- one batch -----------------------------------------------------------------------------------


class _BatchSampler:
    """Samples the sequences of one batch into `outputs`."""

    def __init__(
        self, decoder: _Decoder, request: _Request, outputs: _Outputs, batch: list[int]
    ) -> None:
        """`batch`: prompt indices."""
        self.decoder, self.config, self.request = decoder, request.config, request
        self.prompts = [request.prompts[i] for i in batch]
        on_gpu = isinstance(decoder, PaddleDecoder) and decoder.on_gpu
        kind = DeviceSampler if on_gpu else Sampler
        self.sampler = kind(request.config, [request.sequence_ids[i] for i in batch])
        self.outputs, self.prompt_index = outputs, np.array(batch)

    def run(self, before_pass: Callable[[], None]) -> None:
        """Sample until every sequence has ended; call `before_pass` before each forward pass."""
        before_pass()
        recorded: list[np.ndarray] = []
        kept = self.outputs.prompts
        prediction, cache = _prefill(self.decoder, self.prompts, None if kept is None else recorded)
        if kept is not None:
            kept.record(self.prompt_index.tolist(), recorded)
        rows = np.arange(len(self.prompts))  # [B] sequences of the batch still in the cache
        for step in range(self.config.max_new_tokens):
            tokens = self._sample(prediction, rows, step)
            running = ~self.outputs.ended[self.prompt_index[rows]]
            if not running.any():
                return
            if running.mean() <= 1 - _COMPACT_SHARE:
                keep = _compaction(running)
                cache.select(keep)
                rows, tokens = rows[keep], tokens[keep]
            before_pass()
            prediction = self.decoder(tokens, cache)

    def _sample(self, prediction: Prediction, rows: np.ndarray, step: int) -> np.ndarray:
        """Sample and record token number `step` of the sequences `rows` [B]; return it [B]."""
        logits, experts = prediction
        outputs, prompts = self.outputs, self.prompt_index[rows]
        tokens, logprobs = self.sampler(logits, rows, step)
        outputs.ids[prompts, step] = tokens
        outputs.logprobs[prompts, step] = logprobs
        if outputs.experts is not None:
            outputs.experts[prompts, step] = np.stack(experts, 1)  # [B,L,K]
        # Sequences that ended earlier are computed until the next compaction, and ignored.
        running = prompts[~outputs.ended[prompts]]
        outputs.lengths[running] = step + 1
        if self.request.on_token is not None:
            for prompt in running.tolist():
                self.request.on_token(prompt, int(outputs.ids[prompt, step]))
        stopped = np.isin(outputs.ids[running, step], self.request.stop_tokens)
        outputs.finished[running] = stopped
        outputs.ended[running] = stopped | (step + 1 == self.request.limits[running])
        return tokens


def _compaction(running: np.ndarray) -> np.ndarray:
    """Return the indices of the running sequences of a batch [B].

    The last ones fill the gaps of the finished ones, so that the cache moves few sequences.
    """
    left = np.flatnonzero(running)
    keep = np.arange(len(left))
    keep[~running[: len(left)]] = left[left >= len(left)]
    return keep


def _prefill(
    decoder: _Decoder, prompts: _Prompts, recorded: _Recorded
) -> tuple[Prediction, _Cache]:
    """Return the prediction after each prompt and the filled cache; equal prompts run once."""
    unique: dict[tuple[int, ...], int] = {}
    owner = np.array([unique.setdefault(tuple(prompt), len(unique)) for prompt in prompts])
    (logits, experts), cache = decoder.prefill(list(unique), recorded)
    if len(unique) < len(prompts):
        cache.select(owner)
        logits, experts = logits[owner], [chosen[owner] for chosen in experts]
    return (logits, experts), cache
