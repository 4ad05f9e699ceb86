"""Referee: the model without a cache, whose parity with transformers is tested elsewhere."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.kernels import packed
from ernie_train.model import LocalDispatcher, numpy_decoder, numpy_layers
from ernie_train.model.numpy_decoder import NumpyDecoder, can_decode
from tests.small_models import VARIANTS, make_model

PROMPT_LENGTHS = (5, 40, 3, 17)
STEPS = 30
LEAVES_AT = 26  # after the cache has grown for the longest, beyond 64 slots

CASES = {
    **VARIANTS,
    "gelu": {"hidden_act": "gelu"},
    "k-1": {"moe_k": 1},
    "norm-min": {"moe_norm_min": 0.6},
    "multi-query": {"num_key_value_heads": 1},
}


def uncached(model, ids):
    """Logits [V] and the experts of each MoE layer at the last of `ids`."""
    output = model(paddle.to_tensor([ids]))
    return output.logits[0, -1].numpy(), [s.expert_ids[-1].tolist() for s in output.router_stats]


@pytest.mark.parametrize(
    ("name", "least_packed"), [*((name, 512) for name in CASES), ("dense-bias", 1), ("gelu", 1)]
)
@paddle.no_grad()
def test_equals_the_uncached_model(name, least_packed, monkeypatch):
    monkeypatch.setattr(packed, "_LEAST_INPUTS", least_packed)
    model = make_model(**CASES[name])
    assert can_decode(model)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 96, n).tolist() for n in PROMPT_LENGTHS]
    decoder = NumpyDecoder(model)
    cache = decoder.new_cache(len(sequences), max(PROMPT_LENGTHS) + STEPS)
    decoder.prefill(sequences, cache, np.arange(len(sequences)))
    capacities = []
    for step in range(STEPS):
        if step == LEAVES_AT:  # the longest leaves, the others change places
            cache.select(np.array([3, 0, 2]))
            sequences = [sequences[i] for i in (3, 0, 2)]
        tokens = rng.integers(1, 96, len(sequences))
        logits, experts = decoder(tokens, cache)
        capacities.append(cache.capacity)
        for row, token in enumerate(tokens.tolist()):
            sequences[row].append(token)
            if step % 5 == 0 or step == LEAVES_AT:
                expected, chosen = uncached(model, sequences[row])
                np.testing.assert_allclose(logits[row], expected, atol=2e-5)
                assert [sorted(e[row].tolist()) for e in experts] == [sorted(c) for c in chosen]
    assert capacities[0] < capacities[-1], "the cache must have grown"
    assert cache.lengths.tolist() == [len(s) for s in sequences]
    assert len(experts) == sum(layer.is_moe for layer in model.model.layers)


@pytest.mark.parametrize("small_kernel", [False, True])
@pytest.mark.parametrize("name", CASES)
@paddle.no_grad()
def test_prefill_equals_the_uncached_model(name, small_kernel, monkeypatch):
    """In chunks of one and of several prompts, whose queries are scored in blocks, into sequences
    in any order, and once more after some have been copied."""
    monkeypatch.setattr(numpy_layers, "_HAS_SMALL_KERNEL", small_kernel)
    monkeypatch.setattr(numpy_decoder, "PROMPT_CHUNK_TOKENS", 60)
    monkeypatch.setattr(numpy_decoder, "_QUERY_BLOCK", 16)
    model = make_model(**CASES[name])
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 96, n).tolist() for n in (3, 3, 17, 20, 18, 90, 5)]
    decoder = NumpyDecoder(model)
    cache = decoder.new_cache(9, 91)
    places = np.array([2, 0, 3, 1, 5, 4, 8])
    logits, experts = decoder.prefill(prompts, cache, places)
    assert cache.lengths[places].tolist() == [len(prompt) for prompt in prompts]
    assert len(experts) == sum(layer.is_moe for layer in model.model.layers)
    for row, prompt in enumerate(prompts):
        expected, chosen = uncached(model, prompt)
        np.testing.assert_allclose(logits[row], expected, atol=2e-5)
        assert [sorted(e[row].tolist()) for e in experts] == [sorted(c) for c in chosen]
    copied = np.array([3, 1])
    cache.copy(places[copied], np.array([6, 7]), np.array([20, 3]))
    owner = np.array([1, 3, 0, 2, 5, 4, 3, 1, 6])  # the prompt of each sequence
    tokens = rng.integers(1, 96, len(owner))
    logits, _ = decoder(tokens, cache)
    for row, token in enumerate(tokens.tolist()):
        expected, _ = uncached(model, [*prompts[owner[row]], token])
        np.testing.assert_allclose(logits[row], expected, atol=2e-5)


def test_chunks_hold_neighbours_of_similar_length(monkeypatch):
    monkeypatch.setattr(numpy_decoder, "PROMPT_CHUNK_TOKENS", 30)
    lengths = np.array([4, 5, 5, 10, 10, 10, 10, 50, 8])
    assert [(c.start, c.stop) for c in numpy_decoder._chunks(lengths)] == [
        (0, 3), (3, 6), (6, 7), (7, 8), (8, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("small_kernel", [False, True])
@pytest.mark.parametrize(("size", "columns"), [(1, 1), (48, 96), (48, 50), (300, 33), (9000, 5)])
@pytest.mark.parametrize("rows", [1, 70])
def test_products_are_those_of_float64(size, columns, rows, small_kernel, monkeypatch):
    monkeypatch.setattr(numpy_layers, "_HAS_SMALL_KERNEL", small_kernel)
    monkeypatch.setattr(
        numpy_layers, "_SMALL_PRODUCT", 300 * 32 * 16
    )  # 70 rows of 300 take five blocks
    rng = np.random.default_rng(size)
    x = rng.normal(size=(rows, size)).astype(np.float32)
    weight = rng.normal(size=(size, columns)).astype(np.float32)
    bias = rng.normal(size=columns).astype(np.float32)
    expected = x.astype(np.float64) @ weight + bias
    y = numpy_layers.NumpyLinear(weight, bias)(x)
    assert y.shape == (rows, columns)
    np.testing.assert_allclose(y, expected, atol=1e-6 * size + 1e-5)


@pytest.mark.parametrize("bias", [0.0, 5.0])
@paddle.no_grad()
def test_experts_equal_the_layer_under_any_load(bias):
    """A selection bias of 5 sends every token to the first expert."""
    model = make_model()
    moe = model.model.layers[1].mlp
    selection = np.zeros((1, 4), np.float32)
    selection[0, 0] = bias
    moe.moe_statics.e_score_correction_bias.set_value(selection)
    x = np.random.default_rng(4).normal(size=(50, 32)).astype(np.float32)
    expected, _, ids, _ = moe(paddle.to_tensor(x))
    assert (ids.numpy() == 0).any(1).all() == bool(bias)
    output, chosen = numpy_layers.NumpyMoE(moe)(x)
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5)
    assert (np.sort(chosen) == np.sort(ids.numpy())).all()


def test_says_what_it_cannot_compute():
    class Elsewhere(LocalDispatcher):
        pass

    assert can_decode(make_model())
    assert can_decode(make_model(moe_capacity_factor=1.0))  # training alone drops tokens
    assert not can_decode(make_model().to(dtype="bfloat16"))
    model = make_model()
    model.model.layers[2].mlp.dispatcher = Elsewhere()
    assert not can_decode(model)


@paddle.no_grad()
def test_positions_follow_the_base_of_the_model():
    model = make_model()
    model.set_rope_theta(100.0)
    prompt = [4, 8, 15, 16]
    decoder = NumpyDecoder(model)
    cache = decoder.new_cache(1, 5)
    decoder.prefill([prompt], cache, np.arange(1))
    logits, _ = decoder(np.array([23]), cache)
    expected, _ = uncached(model, [*prompt, 23])
    np.testing.assert_allclose(logits[0], expected, atol=2e-5)
    model.set_rope_theta(1e6)
    assert np.abs(uncached(model, [*prompt, 23])[0] - expected).max() > 1e-3


@paddle.no_grad()
def test_a_cache_of_another_base_is_refused():
    model = make_model()
    decoder = NumpyDecoder(model)
    cache = decoder.new_cache(1, 4)
    decoder.prefill([[5, 6, 7]], cache, np.arange(1))
    model.set_rope_theta(2 * model.config.rope_theta)
    with pytest.raises(ValueError, match="the cache was made under rope_theta="):
        NumpyDecoder(model)(np.array([8]), cache)
