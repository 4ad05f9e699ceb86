"""Referee: every expert computed for every token, in plain operations."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.moe import MoE, experts_by_autograd, make_routing


def config(**keys):
    values = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "moe_intermediate_size": 16, "moe_num_experts": 5, "moe_k": 2,
        "moe_num_shared_experts": 0, "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    return Ernie4_5_MoeConfig(**{**values, **keys})


def dense_reference(layer, x, act=F.silu):
    """softmax router; topk of probability plus bias; all experts on all tokens, weighted."""
    c = layer.config
    probs = F.softmax(paddle.matmul(x, layer.gate.weight))
    bias = layer.moe_statics.e_score_correction_bias
    _, ids = paddle.topk(probs + bias, c.moe_k)
    chosen = paddle.nn.functional.one_hot(ids, c.moe_num_experts).sum(1) * probs
    weights = chosen / paddle.clip(chosen.sum(-1, keepdim=True), min=c.moe_norm_min)
    total = paddle.zeros_like(x)
    for e in range(c.moe_num_experts):
        gate, up = x @ layer.experts.gate_proj[e], x @ layer.experts.up_proj[e]
        total = total + weights[:, e : e + 1] * ((act(gate) * up) @ layer.experts.down_proj[e])
    return total


def gradients(layer, function, x, weight):
    leaf = paddle.to_tensor(x, stop_gradient=False)
    out = function(leaf)
    (out * weight).sum().backward()
    named = {n: p.grad.numpy() for n, p in layer.named_parameters() if p.grad is not None}
    layer.clear_gradients()
    return out.numpy(), leaf.grad.numpy(), named


@pytest.mark.parametrize("bias", [0.0, 0.4])
@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_equals_all_experts_on_all_tokens_with_gradients(bias, hidden_act):
    paddle.seed(1)
    layer = MoE(config(hidden_act=hidden_act))
    for p in layer.parameters():
        p.set_value(paddle.randn(p.shape) * 0.3)
    layer.moe_statics.e_score_correction_bias.set_value(
        paddle.to_tensor([[bias, -bias, 0.0, bias / 2, 0.0]])
    )
    x = np.random.default_rng(0).normal(size=(23, 24)).astype(np.float32)
    weight = paddle.randn([23, 24])
    ours = gradients(layer, lambda t: layer(t)[0], x, weight)
    act = {"silu": F.silu, "gelu": F.gelu}[hidden_act]
    plain = gradients(layer, lambda t: dense_reference(layer, t, act), x, weight)
    np.testing.assert_allclose(ours[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], plain[1], atol=2e-5)
    assert ours[2].keys() == plain[2].keys() == dict(layer.named_parameters()).keys()
    for name, grad in plain[2].items():
        np.testing.assert_allclose(ours[2][name], grad, atol=5e-5, err_msg=name)


def test_an_expert_without_tokens_has_a_zero_gradient():
    layer = MoE(config(moe_k=1))
    layer.moe_statics.e_score_correction_bias.set_value(
        paddle.to_tensor([[9.0, 0.0, 0.0, 0.0, 0.0]])
    )
    out, _, ids, _ = layer(paddle.randn([7, 24]))
    out.sum().backward()
    assert set(ids.numpy().reshape(-1)) == {0}
    grad = layer.experts.up_proj.grad.numpy()
    assert np.abs(grad[0]).sum() > 0
    assert np.abs(grad[1:]).sum() == 0


def test_fast_path_equals_autograd():
    layer = MoE(config())
    rows, rng = [4, 0, 9, 1, 3], np.random.default_rng(2)
    x = rng.normal(size=(17, 24)).astype(np.float32)
    w = rng.random((17, 1)).astype(np.float32)
    results = []
    for fast in (True, False):
        leaves = [paddle.to_tensor(a, stop_gradient=False) for a in (x, w)]
        e = layer.experts
        parameters = (e.gate_proj, e.up_proj, e.down_proj)
        slow = experts_by_autograd(*leaves, parameters, rows, F.silu)
        out = e(*leaves, rows) if fast else slow
        out.square().sum().backward()
        results.append([out, *(t.grad for t in (*leaves, *parameters))])
        results[-1] = [t.numpy().copy() for t in results[-1]]
        layer.clear_gradients()
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_capacity_drops_later_pairs_and_counts_them(monkeypatch):
    ids = paddle.to_tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    # It would wait for a GPU twice before its result can be copied.
    monkeypatch.setattr(paddle, "bincount", None)
    routing = make_routing(ids, num_experts=3, capacity=2)
    assert routing.ends.tolist() == [2, 4, 6]
    assert routing.dropped == 2
    assert routing.token_of_row.tolist() == [0, 1, 0, 2, 1, 3]
    assert (routing.row_of_pair.numpy() == 6).sum() == 2
    free = make_routing(ids, num_experts=3, capacity=None)
    assert free.ends.tolist() == [4, 6, 8]
    assert free.dropped == 0


def test_capacity_factor_zeroes_what_it_drops():
    paddle.seed(4)
    layer = MoE(config(moe_capacity_factor=0.5, moe_k=1))
    x = paddle.randn([20, 24])
    out, _, ids, dropped = layer(x)
    counts = np.bincount(ids.numpy().reshape(-1), minlength=5)
    limit = 2  # ceil(0.5 * 20 * 1 / 5)
    assert dropped == np.maximum(counts - limit, 0).sum() > 0
    assert (np.abs(out.numpy()).sum(1) == 0).sum() == dropped


def test_training_alone_drops_tokens():
    """Else a token's output would depend on tokens after it, and an export's differ."""
    paddle.seed(4)
    limited, free = (
        Ernie4_5_MoeForCausalLM(config(moe_capacity_factor=factor)) for factor in (0.5, None)
    )
    free.set_state_dict(limited.state_dict())
    ids = paddle.to_tensor(np.random.default_rng(0).integers(1, 40, (1, 20)))
    trained = limited(ids)
    assert sum(stats.dropped for stats in trained.router_stats) > 0
    for model in (limited, free):
        model.eval()
    found = limited(ids)
    assert not any(stats.dropped for stats in found.router_stats)
    assert np.array_equal(found.logits.numpy(), free(ids).logits.numpy())


def test_router_statistics_hold_real_tokens_alone():
    model = Ernie4_5_MoeForCausalLM(config())
    document_ids = np.array([[1, 1, 1, 0, 0], [1, 2, 2, 2, 0]])
    output = model(paddle.ones([2, 5], "int64"), document_ids=paddle.to_tensor(document_ids))
    assert [s.layer for s in output.router_stats] == [1, 2]
    for stats in output.router_stats:
        assert stats.router_logits.shape == [7, 5]
        np.testing.assert_allclose(stats.router_probs.sum(-1).numpy(), 1.0, rtol=1e-6)
    assert np.abs(output.logits.numpy()[document_ids == 0]).sum() == 0


def test_a_batch_of_padding_alone_is_refused():
    model = Ernie4_5_MoeForCausalLM(config())
    with pytest.raises(ValueError, match="no real token"):
        model(paddle.ones([1, 3], "int64"), document_ids=paddle.zeros([1, 3], "int64"))
