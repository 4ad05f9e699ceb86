"""Sampling of a list of prompts, by several processes where that is faster.

On a CPU the sequences are divided among forked processes, one per BLAS thread. A decoding step is
many small operations, which a second thread hardly speeds up; two processes sample 1.4 to 1.6 times
as many tokens per second as one.

Shapes: L MoE layers, K experts per token, S tokens of a prompt, T of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import paddle

from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import Interrupted
from ernie_train.core.worker_pool import WorkerPool, can_limit_blas, one_blas_thread
from ernie_train.generate.lanes import Decoder, LaneSampler, Outputs, Request
from ernie_train.generate.paddle_decoder import PaddleDecoder
from ernie_train.generate.prompt_experts import PromptExperts, expert_dtype
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.kernels.packed import one_mkl_thread
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.numpy_decoder import NumpyDecoder, can_decode

# Most of the time of a step does not depend on the number of sequences, so with fewer of them a
# further process hardly pays. (In a rollout of `tiny`, 207 ms on two cores, forking, the child's
# exit and building the decoder take 18 ms.)
_MIN_SEQUENCES_PER_PROCESS = 8

_Prompts = Sequence[Sequence[int]]


@dataclass
class Completion:
    """The tokens sampled for a prompt; a stop token, if one was reached, is the last of `ids`.

    `logprobs` are taken from the distribution at the sampling temperature (greedy: at 1), before
    top-p and top-k truncate it, as a policy update at this temperature recomputes them.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nats
    finished: bool = False  # a stop token was reached; False: cut at max_new_tokens
    # [T,L,K], if requested: the experts at the position that predicted each token, in bytes where
    # there are at most 256 of them, else int16.
    expert_ids: np.ndarray | None = field(default=None, compare=False)
    # [S-1,L,K], if requested: those at the positions of the prompt before its last. Equal
    # prompts share the array, except over processes.
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
    record_experts: int = 0,
    record_prompt_experts: bool = False,
    sequence_ids: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_token: Callable[[int, int], None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """Continue every prompt until a stop token or `max_new_tokens`; return them in prompt order.

    The random numbers of a sequence depend on `seed` and its sequence id alone (by default the
    index of its prompt), not on the batch or the process that samples it; logits are rounded
    differently with other neighbours. Equal prompts are prefilled once per process. At most
    `batch_size` sequences are sampled at once, over all processes; as they end, others start.

    record_experts: fill `Completion.expert_ids` of each so many-th sequence, by its id; 0: of none.
    record_prompt_experts: fill `prompt_expert_ids` of all.
    limits: the most tokens of each completion; at most, and by default, `max_new_tokens`.
    on_progress: called with the number of finished prompts; on_token: with (index, token id).
    stop_requested: polled before each forward pass and while waiting for other processes.

    Raises `ValueError` on what cannot be sampled, `ErnieTrainError` if a process was killed, and
    `Interrupted` when a stop is requested.
    """
    config = SamplingConfig(max_new_tokens, temperature, top_p, top_k, seed)
    max_tokens = check_request(prompts, config, limits)
    stops = np.array([eos_token_id] if isinstance(eos_token_id, int) else [*eos_token_id], np.int64)
    ids = range(len(prompts)) if sequence_ids is None else sequence_ids
    request = Request(prompts, _leaders(prompts), ids, config, stops, max_tokens, on_token)
    outputs = _outputs(model, ids, max_new_tokens, record_experts)
    was_training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            decoder: Decoder = (NumpyDecoder if can_decode(model) else PaddleDecoder)(model)
            processes = 1 if on_token else _num_processes(decoder, min(len(prompts), batch_size))
            queues = _partition(prompts, request.leaders, processes)
            if record_prompt_experts and outputs.experts is not None:
                outputs.prompts = PromptExperts(prompts, queues, outputs.experts)
            sampler = partial(LaneSampler, decoder, request, outputs, lanes=batch_size // processes)
            _run(queues, sampler, outputs.ended, on_progress, stop_requested)
    finally:
        if was_training:
            model.train()
    return [_completion(outputs, i) for i in range(len(prompts))]


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


def _outputs(
    model: Ernie4_5_MoeForCausalLM, ids: Sequence[int], max_new_tokens: int, every: int
) -> Outputs:
    """Return room for the completions of `ids`, with the experts of each `every`-th if not 0."""
    outputs, shape = Outputs(len(ids), max_new_tokens), moe_shape(model)
    if every and shape is not None:
        recorded, dtype = np.array(ids) % every == 0, expert_dtype(model.config.moe_num_experts)
        outputs.record_experts(recorded, shape, dtype)
    return outputs


def _completion(outputs: Outputs, i: int) -> Completion:
    """Return the completion of prompt `i`."""
    length, experts = int(outputs.lengths[i]), outputs.experts
    return Completion(
        outputs.ids[i, :length].tolist(),
        outputs.logprobs[i, :length].tolist(),
        bool(outputs.finished[i]),
        experts[i, :length].copy() if experts is not None and outputs.recorded[i] else None,
        None if outputs.prompts is None else outputs.prompts.of(i),
    )


def moe_shape(model: Ernie4_5_MoeForCausalLM) -> tuple[int, int] | None:
    """Return (MoE layers, experts per token), or None for a dense model."""
    layers = sum(layer.is_moe for layer in model.model.layers)
    return (layers, model.config.moe_k) if layers else None


# ---- processes -----------------------------------------------------------------------------------


def _num_processes(decoder: Decoder, sequences: int) -> int:
    """Return the number of processes that sample `sequences` at once."""
    if not (isinstance(decoder, NumpyDecoder) and decoder.without_paddle and can_limit_blas()):
        return 1
    return max(1, min(cpu_setup().threads, sequences // _MIN_SEQUENCES_PER_PROCESS))


def _leaders(prompts: _Prompts) -> list[int]:
    """Return, for each prompt, the first that equals it."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]


def _partition(prompts: _Prompts, leaders: Sequence[int], processes: int) -> list[list[int]]:
    """Return the queue of each process, as prompt indices.

    Equal prompts are neighbours, and so are prompts of similar length, so that little of a prefill
    is padding; the longest come first, as the last ones run beside lanes that are empty.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), leaders[i], i))
    groups = [list(group) for _, group in groupby(order, leaders.__getitem__)]
    return [order] if processes == 1 else _partition_groups(groups, prompts, processes)


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
    for group in groups:
        fits = min(loads)[0] + len(group) <= most
        for piece in [group] if fits else [[i] for i in group]:
            sequences, tokens, process = min(loads)
            tokens += sum(len(prompts[i]) for i in piece)
            loads[process] = (sequences + len(piece), tokens, process)
            parts[process] += piece
    rank = {i: at for at, i in enumerate(i for group in groups for i in group)}
    return [sorted(part, key=rank.__getitem__) for part in parts]


def _run(
    queues: list[list[int]],
    sampler: Callable[[list[int]], LaneSampler],
    ended: np.ndarray,
    on_progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Sample the queue of each process: the first is this one, the others are forked.

    Raises `Interrupted` when a stop is requested.
    """
    reported = 0

    def sample(process: int, before_pass: Callable[[], None]) -> None:
        if queues[process]:
            sampler(queues[process]).run(before_pass)

    def poll() -> None:
        nonlocal reported
        if stop_requested():
            raise Interrupted("stopped on a signal while generating")
        if ended.sum() > reported:
            reported = int(ended.sum())
            on_progress(reported)

    def poll_all() -> None:
        poll()
        pool.poll()

    def nothing() -> None: ...

    if len(queues) == 1:
        sample(0, poll)
    else:
        # Each process has one BLAS thread: together they use as many cores as one process would.
        with one_blas_thread(), one_mkl_thread(), WorkerPool() as pool:
            for process in range(1, len(queues)):
                pool.start(partial(sample, process, nothing))
            sample(0, poll_all)
            pool.wait(poll_all)
    if ended.sum() > reported:
        on_progress(int(ended.sum()))
