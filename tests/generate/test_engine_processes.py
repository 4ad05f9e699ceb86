"""Sampling by several processes. Referee: one process; how its numbers are checked is elsewhere."""

from __future__ import annotations

import os
import signal
import time
from itertools import groupby

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from ernie_train.core import worker_pool
from ernie_train.core.cpu import cpu_setup
from ernie_train.core.errors import ErnieTrainError, Interrupted
from ernie_train.core.processes import process_state
from ernie_train.generate import engine as generate_engine
from ernie_train.generate.engine import generate
from ernie_train.kernels import packed
from ernie_train.model.numpy_decoder import NumpyDecoder
from tests.small_models import make_model

SETTINGS = {"max_new_tokens": 24, "temperature": 1.0, "seed": 11, "eos_token_id": [5, 6, 7]}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    """27 sequences of 9 different prompts, groups of 1 to 5, in no order."""
    rng = np.random.default_rng(0)
    different = [rng.integers(3, 96, n).tolist() for n in (5, 9, 3, 30, 17, 9, 4, 12, 8)]
    sizes = (3, 1, 4, 2, 5, 3, 3, 5, 1)
    repeated = [p for p, size in zip(different, sizes, strict=True) for _ in range(size)]
    return [repeated[i] for i in rng.permutation(len(repeated))]


@pytest.fixture
def forks(monkeypatch):
    """The numbers of the processes that were forked."""
    pids = []
    fork = os.fork

    def noted():
        pid = fork()
        if pid:
            pids.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", noted)
    return pids


@pytest.fixture
def threads(monkeypatch):
    return lambda count: monkeypatch.setattr(cpu_setup(), "threads", count)


def gone(pids):
    """Whether they were waited for, too."""
    return pids and all(process_state(pid) is None for pid in pids)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (3, {}),
        (2, {"temperature": 0.0}),
        (3, {"batch_size": 25, "sequence_ids": range(100, 127)}),
        (2, {"top_p": 0.8, "top_k": 20, "temperature": 0.7}),
    ],
)
def test_samples_what_one_process_does(model, prompts, forks, threads, processes, changes):
    settings = {**SETTINGS, "record_experts": True, **changes}
    expected = generate(model, prompts, **settings)
    assert not forks
    threads(processes)
    completions = generate(model, prompts, **settings)
    assert len(forks) == processes - 1 and gone(forks)
    assert [c.ids for c in completions] == [c.ids for c in expected]
    assert [c.finished for c in completions] == [c.finished for c in expected]
    assert len({len(c.ids) for c in completions}) > 1, "sequences must leave the batch at times"
    for a, b in zip(completions, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
        assert a.expert_ids.dtype == np.uint8
        np.testing.assert_array_equal(np.sort(a.expert_ids), np.sort(b.expert_ids))


def test_a_dense_model_is_shared_out_too(prompts, forks, threads):
    dense = make_model(moe_num_experts=0)
    expected = generate(dense, prompts, **SETTINGS)
    threads(2)
    completions = generate(dense, prompts, record_experts=True, **SETTINGS)
    assert len(forks) == 1
    assert [c.ids for c in completions] == [c.ids for c in expected]
    assert [c.expert_ids for c in completions] == [None] * len(prompts)


def test_the_same_processes_sample_the_same_bits(model, prompts, threads):
    threads(2)
    first, second = (generate(model, prompts, **SETTINGS) for _ in range(2))
    assert first == second


@pytest.mark.skipif(not packed.packs(512), reason="MKL packs no weights on this processor")
def test_processes_multiply_by_the_same_packed_weights(prompts, forks, threads, monkeypatch):
    """MKL has run in this process before it forks."""
    monkeypatch.setattr(packed, "_LEAST_INPUTS", 1)
    dense = make_model(moe_num_experts=0)
    expected = generate(dense, prompts, **SETTINGS)
    threads(2)
    completions = generate(dense, prompts, **SETTINGS)
    assert len(forks) == 1 and gone(forks)
    assert [c.ids for c in completions] == [c.ids for c in expected]


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [(15, 256, 1), (16, 256, 2), (27, 15, 1), (27, 16, 2), (27, 256, 3), (1, 1, 1)],
)
def test_small_work_takes_fewer_processes(
    model, prompts, forks, threads, count, batch_size, expected
):
    threads(4)
    few = {"max_new_tokens": 2, "batch_size": batch_size}
    completions = generate(model, prompts[:count], **few)
    assert len(forks) == expected - 1
    threads(1)
    assert [c.ids for c in completions] == [c.ids for c in generate(model, prompts[:count], **few)]


def test_what_needs_paddle_is_not_forked(model, prompts, forks, threads, monkeypatch):
    threads(2)
    few = {"max_new_tokens": 2}
    generate(make_model(hidden_act="gelu"), prompts, **few)
    monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    generate(model, prompts, **few)
    assert not forks


def test_without_openblas_nothing_is_forked(model, prompts, forks, threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(worker_pool, "_openblas", lambda: ThreadpoolController().select())
    generate(model, prompts, max_new_tokens=2)
    assert not forks


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_batch_bounds_what_all_sample_at_once(model, prompts, threads, monkeypatch, processes):
    threads(processes)
    most = worker_pool.shared_zeros(1, np.int64)
    new_cache = NumpyDecoder.new_cache

    def noted(self, batch, slots):
        most[0] = max(most[0], batch)
        return new_cache(self, batch, slots)

    monkeypatch.setattr(NumpyDecoder, "new_cache", noted)
    generate(model, prompts, max_new_tokens=2, batch_size=25)
    assert most[0] == {1: 25, 2: 12, 3: 8}[processes]


def test_progress_tells_of_all_processes(model, prompts, threads):
    threads(2)
    told = []
    generate(model, prompts, batch_size=16, on_progress=told.append, **SETTINGS)
    assert told == sorted(set(told)) and told[-1] == len(prompts) and len(told) > 1


def test_a_stop_request_ends_all(model, prompts, forks, threads):
    threads(3)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        generate(model, prompts, stop_requested=lambda: next(asked), **SETTINGS)
    assert len(forks) == 2 and gone(forks)


def slow_in_copies(monkeypatch, action):
    """Forked processes do `action` before they sample; this one does not."""
    own, prefill = os.getpid(), NumpyDecoder.prefill

    def slow(*arguments):
        if os.getpid() != own:
            action()
        return prefill(*arguments)

    monkeypatch.setattr(NumpyDecoder, "prefill", slow)


def test_a_stop_request_is_heard_while_waiting_for_others(
    model, prompts, forks, threads, monkeypatch
):
    threads(2)
    slow_in_copies(monkeypatch, lambda: time.sleep(600))
    asked = 0

    def stop_requested():
        nonlocal asked
        asked += 1
        return asked > 2 * SETTINGS["max_new_tokens"]  # more often than it samples

    with pytest.raises(Interrupted):
        generate(model, prompts, stop_requested=stop_requested, **SETTINGS)
    assert gone(forks)


def test_a_killed_process_is_a_clear_error(model, prompts, forks, threads, monkeypatch):
    threads(3)
    slow_in_copies(monkeypatch, lambda: time.sleep(600))

    def kill_one():
        os.kill(forks[0], signal.SIGKILL)
        return False

    with pytest.raises(ErnieTrainError, match="forked process was killed by SIGKILL"):
        generate(model, prompts, stop_requested=kill_one, **SETTINGS)
    assert len(forks) == 2 and gone(forks)


def test_an_error_in_a_process_is_that_of_the_whole(model, prompts, forks, threads, monkeypatch):
    def fail():
        raise FloatingPointError("a number was not to be had")

    threads(2)
    slow_in_copies(monkeypatch, fail)
    with pytest.raises(FloatingPointError) as caught:
        generate(model, prompts, **SETTINGS)
    assert str(caught.value) == "a number was not to be had"
    assert gone(forks)


def test_matrix_products_take_one_thread_meanwhile(model, prompts, threads):
    threads(2)
    openblas = worker_pool._openblas()
    seen = []

    def get():
        return openblas.info()[0]["num_threads"]

    with openblas.limit(limits=2):
        generate(model, prompts, max_new_tokens=2, stop_requested=lambda: bool(seen.append(get())))
        assert set(seen) == {1} and get() == 2


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("sizes", [[64], [8, 8, 8], [8] * 17, [1] * 13, [7, 3, 1, 9, 2]])
def test_the_partition_is_even_and_splits_few_groups(sizes, processes):
    rng = np.random.default_rng(0)
    distinct = sorted((rng.integers(3, 96, n).tolist() for n in rng.integers(3, 90, 20)), key=len)
    prompts = [p for p, size in zip(distinct, sizes, strict=False) for _ in range(size)]
    leaders = [prompts.index(prompt) for prompt in prompts]
    queues = generate_engine._partition(prompts, leaders, processes)
    assert sorted(i for queue in queues for i in queue) == list(range(len(prompts)))
    counts = [len(queue) for queue in queues]
    assert max(counts) - min(counts) <= 1
    owners = {}
    for process, queue in enumerate(queues):
        lengths = [len(prompts[i]) for i in queue]
        assert lengths == sorted(lengths, reverse=True)
        different = [leader for leader, _ in groupby(leaders[i] for i in queue)]
        assert len(set(different)) == len(different), "equal prompts are neighbours"
        for leader in different:
            owners.setdefault(leader, set()).add(process)
    assert sum(len(found) > 1 for found in owners.values()) <= processes - 1
    tokens = [sum(len(prompts[i]) for i in queue) for queue in queues]
    if len(sizes) > 2 * processes:
        assert max(tokens) - min(tokens) <= 90 * max(sizes)
    assert generate_engine._partition(prompts, leaders, processes) == queues
