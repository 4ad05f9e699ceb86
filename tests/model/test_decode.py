"""Referee: the model without a cache, whose parity with transformers is tested elsewhere."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.model import LocalDispatcher, decode
from ernie_train.model.decode import Decoder, can_decode
from tests.small_models import VARIANTS, make_model

PROMPT_LENGTHS = (5, 40, 3, 17)
STEPS = 30  # the cache grows twice: at 64 and at 32 slots of the others after the longest left
LEAVES_AT = 12

CASES = {
    **VARIANTS,
    "gelu": {"hidden_act": "gelu"},
    "k-1": {"moe_k": 1},
    "norm-min": {"moe_norm_min": 0.6},
    "multi-query": {"num_key_value_heads": 1},
}


def prefilled(model, prompts):
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    documents = (np.arange(width) < np.array([[len(p)] for p in prompts])).astype(np.int64)
    cache = model.new_cache(len(prompts))
    model.model(paddle.to_tensor(ids), document_ids=paddle.to_tensor(documents), kv_cache=cache)
    return cache


def uncached(model, ids):
    """Logits [V] and the experts of each MoE layer at the last of `ids`."""
    output = model(paddle.to_tensor([ids]))
    return output.logits[0, -1].numpy(), [s.expert_ids[-1].tolist() for s in output.router_stats]


@pytest.mark.parametrize("name", CASES)
@paddle.no_grad()
def test_equals_the_uncached_model(name):
    model = make_model(**CASES[name])
    assert can_decode(model)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, 96, n).tolist() for n in PROMPT_LENGTHS]
    cache, decoder = prefilled(model, sequences), Decoder(model)
    capacities = set()
    for step in range(STEPS):
        if step == LEAVES_AT:  # the longest leaves, the others change places
            cache.select(np.array([3, 0, 2]))
            sequences = [sequences[i] for i in (3, 0, 2)]
        tokens = rng.integers(1, 96, len(sequences))
        hidden, experts = decoder(tokens, cache)
        logits = model.logits(hidden).numpy()
        capacities.add(cache.capacity)
        for row, token in enumerate(tokens.tolist()):
            sequences[row].append(token)
            if step % 5 == 0 or step == LEAVES_AT:
                expected, chosen = uncached(model, sequences[row])
                np.testing.assert_allclose(logits[row], expected, atol=2e-5)
                assert [sorted(e[row].tolist()) for e in experts] == [sorted(c) for c in chosen]
    assert cache.lengths.tolist() == [len(s) for s in sequences]
    assert len(experts) == sum(layer.is_moe for layer in model.model.layers)


@pytest.mark.parametrize("bias", [0.0, 5.0])
@paddle.no_grad()
def test_experts_together_and_one_by_one_agree(monkeypatch, bias):
    """A selection bias of 5 sends every token to the first expert."""
    model = make_model()
    moe = model.model.layers[1].mlp
    selection = np.zeros((1, 4), np.float32)
    selection[0, 0] = bias
    moe.moe_statics.e_score_correction_bias.set_value(selection)
    experts = decode._Experts(moe)
    x = paddle.to_tensor(np.random.default_rng(4).normal(size=(50, 32)).astype(np.float32))
    expected, _, ids, _ = moe(x)
    assert (ids.numpy() == 0).any(1).all() == bool(bias)
    calls = []
    for name in ("_together", "_one_by_one"):
        method = getattr(decode._Experts, name)
        monkeypatch.setattr(
            decode._Experts,
            name,
            lambda *a, method=method, name=name: (calls.append(name), method(*a))[1],
        )
    for cost in (np.inf, -1.0):  # padding is never, always too dear
        monkeypatch.setattr(decode, "_FLOPS_OF_A_CALL", cost)
        output, chosen = experts(x)
        np.testing.assert_allclose(output.numpy(), expected.numpy(), atol=1e-5)
        assert (np.sort(chosen) == np.sort(ids.numpy())).all()
    assert calls == ["_together", "_one_by_one"]


def test_says_what_it_cannot_compute():
    class Elsewhere(LocalDispatcher):
        pass

    assert can_decode(make_model())
    assert not can_decode(make_model(moe_capacity_factor=1.0))
    assert not can_decode(make_model().to(dtype="bfloat16"))
    model = make_model()
    model.model.layers[2].mlp.dispatcher = Elsewhere()
    assert not can_decode(model)


@paddle.no_grad()
def test_positions_follow_the_base_of_the_model():
    model = make_model()
    model.set_rope_theta(100.0)
    prompt = [4, 8, 15, 16]
    hidden, _ = Decoder(model)(np.array([23]), prefilled(model, [prompt]))
    expected, _ = uncached(model, [*prompt, 23])
    np.testing.assert_allclose(model.logits(hidden)[0].numpy(), expected, atol=2e-5)
    model.set_rope_theta(1e6)
    assert np.abs(uncached(model, [*prompt, 23])[0] - expected).max() > 1e-3


@paddle.no_grad()
def test_a_cache_of_another_base_is_refused():
    model = make_model()
    cache = prefilled(model, [[5, 6, 7]])
    model.set_rope_theta(2 * model.config.rope_theta)
    with pytest.raises(ValueError, match="the cache was made under rope_theta="):
        Decoder(model)(np.array([8]), cache)
