"""Referee: the model without a cache, one sequence at a time."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.core.errors import Interrupted
from ernie_train.generate import engine as generate_engine
from ernie_train.generate.engine import generate
from ernie_train.generate.engines import OwnEngine
from ernie_train.generate.paddle_decoder import PaddleDecoder
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from tests.small_models import make_model

PROMPT_LENGTHS = (5, 9, 3, 40, 17)


@pytest.fixture(scope="module")
def model():
    config = Ernie4_5_MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
        moe_num_experts=6, moe_k=2, moe_num_shared_experts=1, max_position_embeddings=256,
        initializer_range=0.3,
    )  # fmt: skip
    paddle.seed(3)
    return Ernie4_5_MoeForCausalLM(config)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, n).tolist() for n in PROMPT_LENGTHS]


def log_probs(model, ids, temperature=1.0):
    with paddle.no_grad():
        logits = model(paddle.to_tensor([ids])).logits[0].numpy().astype(np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_greedy_equals_the_uncached_model_token_by_token(model, prompts):
    completions = generate(model, prompts, max_new_tokens=70, batch_size=3)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = log_probs(model, prompt + completion.ids)[len(prompt) - 1 : -1]
        assert completion.ids == expected.argmax(-1).tolist()
        chosen = expected[np.arange(len(completion.ids)), completion.ids]
        np.testing.assert_allclose(completion.logprobs, chosen, atol=2e-5)
        assert not completion.finished


def test_sampled_logprobs_are_those_of_the_tempered_distribution(model, prompts):
    completions = generate(model, prompts, max_new_tokens=20, temperature=0.7, seed=5)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = log_probs(model, prompt + completion.ids, 0.7)[len(prompt) - 1 : -1]
        chosen = expected[np.arange(len(completion.ids)), completion.ids]
        np.testing.assert_allclose(completion.logprobs, chosen, atol=2e-5)


def test_limits_cut_single_sequences_and_leave_the_others_as_they_are(model, prompts):
    settings = {"max_new_tokens": 25, "temperature": 1.0, "seed": 11, "eos_token_id": [5, 6, 7]}
    whole = generate(model, prompts, **settings)
    limits = [25, 1, 7, 2, 25]
    cut = generate(model, prompts, limits=limits, batch_size=3, **settings)
    for limit, full, found in zip(limits, whole, cut, strict=True):
        assert found.ids == full.ids[:limit]
        assert found.finished == (full.finished and len(full.ids) <= limit)
    for limits in ([0, 1, 1, 1, 1], [26, 1, 1, 1, 1]):
        with pytest.raises(ValueError, match="limits must lie between 1 and max_new_tokens=25"):
            generate(model, prompts, limits=limits, **settings)


def test_episodes_that_still_run_keep_their_random_numbers(model, prompts):
    """A later turn has fewer prompts: the id, not the place in the call, says what is drawn."""
    engine = OwnEngine([5, 6, 7], batch_size=3)
    engine.load_weights(model, version=1)
    settings = SamplingConfig(25, temperature=1.0, seed=11)
    whole = engine.sample(prompts, settings)
    ids = [4, 1, 3]
    some = engine.sample([prompts[i] for i in ids], settings, sequence_ids=ids, limits=[25, 25, 4])
    assert [c.ids for c in some[:2]] == [whole[i].ids for i in ids[:2]]
    assert some[2].ids == whole[3].ids[:4]
    assert all(c.expert_ids.shape == (len(c.ids), 2, 2) for c in some)
    assert engine.sample([], settings) == []


@pytest.mark.parametrize("everything", [False, True])
def test_without_replay_few_completions_carry_experts(model, everything):
    """They would all be gathered on every rank, for a mean; later turns keep those of earlier."""
    engine = OwnEngine([], record_experts=everything)
    engine.load_weights(model, version=1)
    settings = SamplingConfig(2, temperature=1.0)
    found = []
    for ids in (range(129), range(0, 129, 2)):
        some = engine.sample([[5, 6]] * len(ids), settings, sequence_ids=ids)
        found.append([at for at, c in zip(ids, some, strict=True) if c.expert_ids is not None])
        assert all((c.prompt_expert_ids is not None) == everything for c in some)
    assert found == [list(range(0, 129, n)) for n in ([1, 2] if everything else [4, 2])]


def test_recomputed_logprobs_are_the_sampled_ones(model, prompts):
    """By the pass that an update makes: with a gradient, packed in one row."""
    completions = generate(model, prompts, max_new_tokens=40, temperature=1.0, seed=2)
    rows = [p + c.ids for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(row) for row in rows]
    documents = np.repeat(np.arange(1, len(rows) + 1), lengths)[None]
    ids = paddle.to_tensor(np.concatenate(rows)[None])
    logits = model(ids, document_ids=paddle.to_tensor(documents)).logits[0].astype("float64")
    logprobs = paddle.nn.functional.log_softmax(logits).numpy()
    ends = np.cumsum(lengths)
    differences = [
        logprobs[np.arange(end - len(c.ids), end) - 1, c.ids] - c.logprobs
        for end, c in zip(ends, completions, strict=True)
    ]
    assert np.abs(np.exp(np.concatenate(differences)) - 1).mean() < 1e-5


@pytest.mark.parametrize("own_forward", [False, True])
def test_experts_of_prompts_are_recorded_once_for_equal_prompts(model, own_forward, monkeypatch):
    """At every layer and position before the last, in chunks of prompts of several lengths."""
    if own_forward:
        monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    rng = np.random.default_rng(3)
    different = [rng.integers(10, 90, length).tolist() for length in (1, 2, 9, 10, 30)]
    prompts = [different[i] for i in (0, 3, 3, 1, 4, 2, 3)]
    settings = {"max_new_tokens": 3, "temperature": 1.0, "batch_size": 6, "record_experts": True}
    found = generate(model, prompts, record_prompt_experts=True, **settings)
    for prompt, completion in zip(prompts, found, strict=True):
        stats = model(paddle.to_tensor([prompt])).router_stats
        expected = np.stack([s.expert_ids.numpy() for s in stats], 1)[:-1]
        assert completion.prompt_expert_ids.dtype == np.uint8
        np.testing.assert_array_equal(np.sort(completion.prompt_expert_ids), np.sort(expected))
    assert found[1].prompt_expert_ids is found[2].prompt_expert_ids
    plain = generate(model, prompts, **settings)
    assert [c.prompt_expert_ids for c in plain] == [None] * len(prompts)
    assert [c.ids for c in plain] == [c.ids for c in found]


def test_a_dense_model_has_no_experts_to_record():
    dense = make_model(moe_num_experts=0)
    settings = {"record_experts": True, "record_prompt_experts": True}
    (completion,) = generate(dense, [[3, 4, 5]], max_new_tokens=4, **settings)
    assert len(completion.ids) == 4
    assert completion.expert_ids is completion.prompt_expert_ids is None


@pytest.mark.parametrize("own_forward", [False, True])
def test_recorded_experts_are_those_of_the_predicting_positions(
    model, prompts, own_forward, monkeypatch
):
    if own_forward:
        monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    settings = {"temperature": 1.0, "seed": 4, "eos_token_id": [5, 6, 7]}
    completions = generate(model, prompts, max_new_tokens=30, record_experts=True, **settings)
    assert len({len(c.ids) for c in completions}) > 1, "sequences must leave the batch at times"
    for prompt, completion in zip(prompts, completions, strict=True):
        stats = model(paddle.to_tensor([prompt + completion.ids])).router_stats
        expected = np.stack([s.expert_ids.numpy() for s in stats], 1)[len(prompt) - 1 : -1]
        assert completion.expert_ids.dtype == np.uint8
        np.testing.assert_array_equal(np.sort(completion.expert_ids), np.sort(expected))
    plain = generate(model, prompts, max_new_tokens=30, **settings)
    assert [c.expert_ids for c in plain] == [None] * len(prompts)
    assert [c.ids for c in plain] == [c.ids for c in completions]


@pytest.mark.parametrize(
    ("own_forward", "lanes"), [(False, 256), (False, 3), (True, 256), (True, 3)]
)
def test_equal_prompts_are_computed_once_and_sampled_apart(
    model, prompts, own_forward, lanes, monkeypatch
):
    if own_forward:
        monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    engine = PaddleDecoder if own_forward else generate_engine.NumpyDecoder
    computed = []
    prefill = engine.prefill

    def noted(self, rows, *others):
        computed.extend(rows)
        return prefill(self, rows, *others)

    monkeypatch.setattr(engine, "prefill", noted)
    repeated = [p for _ in range(4) for p in prompts]
    settings = {"max_new_tokens": 15, "temperature": 1.0, "seed": 11}
    completions = generate(model, repeated, batch_size=lanes, **settings)
    assert sorted(computed, key=len) == sorted(prompts, key=len)
    assert [c.ids for c in completions[: len(prompts)]] == [
        c.ids for c in generate(model, prompts, **settings)
    ]
    assert len({tuple(c.ids) for c in completions}) == len(repeated)
    for prompt, completion in zip(repeated, completions, strict=True):
        expected = log_probs(model, prompt + completion.ids)[len(prompt) - 1 : -1]
        chosen = expected[np.arange(len(completion.ids)), completion.ids]
        np.testing.assert_allclose(completion.logprobs, chosen, atol=2e-5)


def test_on_a_gpu_logits_stay_there(model, prompts, monkeypatch):
    """Those of a large vocabulary take longer to copy than to compute."""
    monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 11}
    expected = generate(model, [*prompts, prompts[0]], **settings)
    copies = []
    numpy = paddle.Tensor.numpy
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda t: copies.append(t.size) or numpy(t))
    monkeypatch.setattr(paddle.base.core.Place, "is_gpu_place", lambda self: True, raising=False)
    found = generate(model, [*prompts, prompts[0]], **settings)
    assert max(copies) < model.config.vocab_size
    assert [c.ids for c in found] == [c.ids for c in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)


def test_finished_sequences_leave_the_batch(model, prompts, monkeypatch):
    batches = []
    step = generate_engine.NumpyDecoder.__call__

    def counted(self, tokens, cache):
        batches.append(len(tokens))
        return step(self, tokens, cache)

    monkeypatch.setattr(generate_engine.NumpyDecoder, "__call__", counted)
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 1, "eos_token_id": [5, 6, 7, 8]}
    completions = generate(model, prompts * 4, **settings)
    running = [sum(len(c.ids) > n for c in completions) for n in range(1, len(batches) + 1)]
    assert all(left <= batch for left, batch in zip(running, batches, strict=True))
    # The cache is repacked once lanes have idled for as long as one pass takes.
    for size in set(batches):
        idled = [b - left for left, b in zip(running, batches, strict=True) if b == size]
        assert sum(idled) < 2 * size
    assert len(set(batches)) > 3


def test_stops_at_a_stop_token_and_says_so(model, prompts):
    free = generate(model, prompts, max_new_tokens=12)
    stop = free[0].ids[4]
    stopped = generate(model, prompts, max_new_tokens=12, eos_token_id=stop)
    first = free[0].ids.index(stop)
    assert stopped[0].ids == free[0].ids[: first + 1]
    assert stopped[0].finished
    for a, b in zip(free, stopped, strict=True):
        assert b.finished == (stop in a.ids)


def test_sampling_follows_the_distribution(model):
    prompt = [4, 8, 15]
    probs = np.exp(log_probs(model, prompt)[-1])
    drawn = generate(model, [prompt] * 4000, max_new_tokens=1, temperature=1.0, batch_size=1000)
    counts = np.bincount([c.ids[0] for c in drawn], minlength=97)
    # Pearson's chi-squared over 96 degrees of freedom: mean 96, standard deviation 14.
    expected = probs * 4000
    assert (((counts - expected) ** 2) / expected).sum() < 96 + 5 * 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 1, "top_k": -1}, "top_k"),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[1, 2]], **settings)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=1)


def test_a_stop_request_interrupts(model, prompts):
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        generate(model, prompts, max_new_tokens=50, stop_requested=lambda: next(asked))
