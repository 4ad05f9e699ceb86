"""Effects of the balance in training: parameters touched, absent terms, counts, the bias."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from pydantic import ValidationError

from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.train.moe_balance import BalanceConfig, MoeBalance
from ernie_train.train.moe_health import MoeHealth, MoeHealthConfig
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer
from tests.small_models import assert_same, make_config, make_model, state
from tests.train.test_trainer import rows

LAYERS = {"num_hidden_layers": 3, "tie_word_embeddings": False}


def new_trainer(model, *, lr=1e-3, **balance):
    optimizer = Optimizer(model, OptimConfig(lr=lr, schedule="constant"))
    return Trainer(model, optimizer, balance=BalanceConfig(**balance))


def small_model(**keys):
    paddle.seed(4)
    return Ernie4_5_MoeForCausalLM(make_config(initializer_range=0.2, **{**LAYERS, **keys}))


def forward(model, batch):
    return model.model(
        paddle.to_tensor(batch.input_ids), paddle.to_tensor(batch.position_ids), batch.document_ids
    )


def touched(**balance):
    """Names of the parameters to which the balance terms alone give a gradient."""
    model = make_model(**LAYERS)
    model.train()
    terms = MoeBalance(model, BalanceConfig(**balance)).terms(forward(model, rows()).router_stats)
    sum((term.sum * term.coef for term in terms), paddle.zeros([])).backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and float(parameter.grad.abs().max()) > 0
    }


ROUTERS = {"model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"}


def test_orthogonalization_touches_the_routers_alone():
    assert touched(orthogonal_coef=1.0) == ROUTERS


@pytest.mark.parametrize("term", ["load_balance_coef", "z_loss_coef"])
def test_terms_on_the_router_touch_it_and_what_stands_before_it(term):
    names = touched(**{term: 1.0})
    assert names >= ROUTERS | {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    behind = ("lm_head", "model.norm", "model.layers.2.mlp.experts", "model.layers.2.mlp.shared")
    assert not [name for name in names if name.startswith(behind)]
    assert not [name for name in names if "correction_bias" in name]


def test_zero_coefficients_are_the_bits_of_a_loss_without_them():
    found = []
    for balance in ({}, {"orthogonal_coef": 0.0, "z_loss_coef": 0, "load_balance_coef": 0.0}):
        trainer = new_trainer(small_model(), **balance)
        metrics = [trainer.train_step([rows(seed=s)], PackedLoss("tokens"), 9) for s in range(3)]
        assert not [name for name in metrics[-1].metrics if name.startswith("balance/")]
        found.append((state(trainer.model), [m.metrics for m in metrics]))
    assert found[0][1] == found[1][1]
    assert_same(found[0][0], found[1][0])
    plain = small_model()  # without a balancer in the way at all
    optimizer = Optimizer(plain, OptimConfig(lr=1e-3, schedule="constant"))
    for seed in range(3):
        batch = rows(seed=seed)
        output = PackedLoss("tokens")(plain, batch)
        (output.terms[0].sum * (1.0 / output.terms[0].count)).backward()
        optimizer.step(1e-3, optimizer.gradient_norm())
        optimizer.clear_gradients()
    assert_same(state(plain), found[0][0])


def test_load_balance_counts_unbiased_choices_and_the_load_counts_real_ones():
    model, batch = small_model(), rows()
    bias = np.zeros((1, 4), np.float32)
    bias[0, 3] = 5.0  # everyone takes expert 3
    for layer in (1, 2):
        model.model.layers[layer].mlp.moe_statics.e_score_correction_bias.set_value(bias)
    stats = forward(model, batch).router_stats
    balancer = MoeBalance(model, BalanceConfig(load_balance_coef=1.0))
    expected = []
    for layer in stats:
        probs = layer.router_probs.numpy().astype(np.float64)
        ids = np.argsort(-probs, -1)[:, :2]
        counts = np.bincount(ids.reshape(-1), minlength=4)
        expected.append(4 * (probs.mean(0) * counts / len(probs)).sum())
    term = balancer.terms(stats)[0]
    assert float(term.sum) / batch.num_tokens == pytest.approx(np.mean(expected), rel=1e-5)
    assert term.count == batch.num_tokens
    load = balancer.new_load()
    load.add(stats)
    assert (load.tokens_per_expert[:, 3] == batch.num_tokens).all()
    assert load.tokens_per_expert.sum() == 2 * 2 * batch.num_tokens, "padding is no load"


def test_the_selection_bias_moves_once_a_step_from_the_counts_of_all_micro_batches():
    model = small_model()
    trainer = new_trainer(model, bias_update_rate=0.01)
    result = trainer.train_step([rows(), rows(seed=1), rows(seed=2)], PackedLoss("tokens"), 9)
    for at, layer in enumerate((1, 2)):
        counts = result.load.tokens_per_expert[at]
        assert counts.sum() == 2 * sum(rows(seed=s).num_tokens for s in range(3))
        bias = model.model.layers[layer].mlp.moe_statics.e_score_correction_bias.numpy()[0]
        step = 0.01 * np.sign(counts.mean() - counts)
        np.testing.assert_allclose(bias, step - step.mean(), atol=1e-9)


def test_the_mean_of_the_selection_bias_does_not_drift():
    model = small_model()
    balance = MoeBalance(model, BalanceConfig(bias_update_rate=0.01))
    load = balance.new_load()
    load.tokens_per_expert[:] = [30, 1, 1, 1]  # every step raises three of four
    for _ in range(50):
        balance.after_step(load)
    for moe in balance.layers.values():
        bias = moe.moe_statics.e_score_correction_bias.numpy()[0].astype(np.float64)
        assert abs(bias.mean()) < 1e-6
        np.testing.assert_allclose(bias[1:] - bias[0], 50 * 0.02, rtol=1e-4)


def test_padding_counts_in_no_balance_term():
    """One document in rows of two lengths: the same terms, load and entropy."""
    model = small_model()
    balance = MoeBalance(model, BalanceConfig(load_balance_coef=0.1, z_loss_coef=0.1))
    found = []
    for length in (6, 24):
        ids = np.zeros((2, length), np.int64)
        documents = np.zeros((2, length), np.int64)
        ids[0, :5], documents[0, :5] = [3, 7, 1, 9, 4], 1
        stats = model(paddle.to_tensor(ids), document_ids=paddle.to_tensor(documents)).router_stats
        load = balance.new_load()
        load.add(stats)
        terms = balance.terms(stats)
        found.append([float(t.sum) for t in terms] + [t.count for t in terms])
        found[-1] += [*load.tokens_per_expert.ravel(), *load.entropy, *load.tokens]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert load.tokens.max() == 5


def test_the_bias_evens_out_a_load_that_is_far_from_even():
    model = small_model()
    for layer in (1, 2):  # everything goes to experts 0 and 1
        bias = model.model.layers[layer].mlp.moe_statics.e_score_correction_bias
        bias.set_value(np.array([[0.9, 0.9, 0.0, 0.0]], np.float32))
    spreads = []
    trainer = new_trainer(model, lr=1e-12, bias_update_rate=0.03)
    for _ in range(40):
        result = trainer.train_step([rows()], PackedLoss("tokens"), 99)
        load = result.load.tokens_per_expert
        spreads.append((load.std(-1) / load.mean(-1)).max())
    assert spreads[0] > 0.9
    assert max(spreads[-5:]) < 0.5 * spreads[0]


def by_definition(w):
    columns = w / np.linalg.norm(w, axis=0)
    return ((columns.T @ columns - np.eye(w.shape[1])) ** 2).mean()


def test_the_decoupled_mode_steps_after_the_optimizer_by_lambda_times_the_gradient():
    batch, ends = rows(), {}
    for coef in (0.0, 0.3):
        mode = "decoupled" if coef else "loss"
        model = small_model()
        trainer = new_trainer(model, orthogonal_coef=coef, orthogonal_mode=mode)
        metrics = trainer.train_step([batch], PackedLoss("tokens"), 9).metrics
        ends[coef] = state(model)
        if coef:
            value = metrics["balance/orthogonal"]
            continue
        assert "balance/orthogonal" not in metrics
        expected = [by_definition(ends[0.0][name].astype(np.float64)) for name in ROUTERS]
    assert value == pytest.approx(np.mean(expected), rel=1e-5), "what was stepped down is shown"
    for name, plain in ends[0.0].items():
        if name not in ROUTERS:
            np.testing.assert_array_equal(ends[0.3][name], plain, err_msg=name)
            continue
        w, loss = plain.astype(np.float64), by_definition
        gradient = np.zeros_like(w)
        for at in np.ndindex(*w.shape):
            step = np.zeros_like(w)
            step[at] = 1e-6
            gradient[at] = (loss(w + step) - loss(w - step)) / 2e-6
        np.testing.assert_allclose(ends[0.3][name], w - 0.3 * gradient, atol=1e-6)


def test_a_dense_model_has_nothing_to_balance():
    model = small_model(moe_num_experts=0)
    trainer = new_trainer(model)
    result = trainer.train_step([rows()], PackedLoss("tokens"), 9)
    assert result.load.tokens_per_expert.size == 0
    health = MoeHealth(model, MoeHealthConfig(), first_batch=rows)
    assert health.observe(1, result.load) == {}
    assert health.state_dict() == {}


def test_a_mode_of_a_term_that_is_off_is_refused():
    with pytest.raises(ValidationError, match="no effect without orthogonal_coef"):
        BalanceConfig(orthogonal_mode="decoupled")
