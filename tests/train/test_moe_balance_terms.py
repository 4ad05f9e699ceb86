"""Terms of the balance by hand, over ranks and over training, and their settings in recipes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.core import process_group
from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError
from ernie_train.data import Batch
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.dpo import DpoConfig
from ernie_train.train import moe_balance
from ernie_train.train.moe_balance import BalanceConfig, MoeBalance
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.supervised_data import PretrainConfig, SftConfig, SupervisedConfig
from tests.small_models import assert_same, state
from tests.train.test_moe_balance import forward, new_trainer, small_model
from tests.train.test_trainer import part, rows

LOSS = PackedLoss("tokens")


# ---- the objective -------------------------------------------------------------------------------


def orthogonal_by_hand(weight, stats):
    columns = weight / paddle.norm(weight, axis=0, keepdim=True)
    gram = paddle.matmul(columns, columns, transpose_x=True)
    return ((gram - paddle.eye(4)) ** 2).sum() / 16


def load_balance_by_hand(weight, stats):
    probs = stats.router_probs
    chosen = np.argsort(-probs.numpy(), -1)[:, :2]
    counts = np.bincount(chosen.reshape(-1), minlength=4)
    return 4 * (probs.mean(0) * paddle.to_tensor((counts / len(probs)).astype(np.float32))).sum()


def z_by_hand(weight, stats):
    return (paddle.log(paddle.exp(stats.router_logits).sum(-1)) ** 2).mean()


BY_HAND = {
    "orthogonal": orthogonal_by_hand,
    "load_balance": load_balance_by_hand,
    "z_loss": z_by_hand,
}


def gradients_of_a_step(micro_batches, **coefs):
    """The gradients that the optimizer is given, and the metrics of the step."""
    model, found = small_model(), {}
    trainer = new_trainer(model, **coefs)
    trainer.optimizer.step = lambda lr, norm: found.update(
        {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    )
    return found, trainer.train_step(micro_batches, LOSS, 9).metrics


@pytest.mark.parametrize("term", list(BY_HAND))
def test_the_gradient_of_a_term_is_its_mean_over_real_tokens_summed_over_layers(term):
    """Of uneven micro-batches the larger one counts for more; of a constant term, each once."""
    batch = rows()
    parts = [part(batch, slice(0, 1)), part(batch, slice(1, 8))]
    coef = 0.5
    plain, _ = gradients_of_a_step(parts)
    found, metrics = gradients_of_a_step(parts, **{f"{term}_coef": coef})
    model, total, shown = small_model(), paddle.zeros([]), 0.0
    share = np.array([p.num_tokens for p in parts]) / batch.num_tokens
    if term == "orthogonal":
        share = np.array([0.5, 0.5])
    for micro_batch, weight in zip(parts, share, strict=True):
        for stats in forward(model, micro_batch).router_stats:
            router = model.model.layers[stats.layer].mlp.gate.weight
            total = total + BY_HAND[term](router, stats) * float(weight)
    total.backward()
    shown = float(total) / 2  # two mixture layers
    assert metrics[f"balance/{term}"] == pytest.approx(shown, rel=1e-5)
    assert metrics["loss"] == gradients_of_a_step(parts)[1]["loss"], "apart from the main loss"
    largest = 0.0
    for name, parameter in model.named_parameters():
        alone = np.zeros_like(plain[name]) if parameter.grad is None else parameter.grad.numpy()
        largest = max(largest, float(np.abs(alone).max()))
        np.testing.assert_allclose(found[name] - plain[name], coef * alone, atol=2e-6, err_msg=name)
    assert largest > 1e-3, "a gradient too small to be told from rounding proves nothing"


def test_more_padding_changes_no_term():
    batch = rows()
    coefs = {"load_balance_coef": 0.1, "z_loss_coef": 0.1, "orthogonal_coef": 0.1}
    wide = Batch(*(np.pad(x, ((0, 2), (0, 5))) for x in (
        batch.input_ids, batch.labels, batch.position_ids, batch.document_ids, batch.loss_mask
    )))  # fmt: skip
    (found, metrics), (expected, before) = (
        gradients_of_a_step([b], **coefs) for b in (wide, batch)
    )
    for name, value in before.items():
        if name != "lr":
            assert metrics[name] == pytest.approx(value, rel=1e-6), name
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=1e-7, err_msg=name)


def test_what_is_off_is_not_computed(monkeypatch):
    def never(*arguments):
        raise AssertionError("a term with coefficient 0 was computed")

    for name in (
        "load_balance_loss", "router_orthogonal_gradient", "router_orthogonal_loss",
        "router_z_loss", "selection_bias_step", "unbiased_expert_ids",
    ):  # fmt: skip
        monkeypatch.setattr(moe_balance, name, never)
    new_trainer(small_model()).train_step([rows()], LOSS, 9)
    with pytest.raises(AssertionError, match="coefficient 0"):
        new_trainer(small_model(), z_loss_coef=1e-9).train_step([rows()], LOSS, 9)


# ---- ranks ---------------------------------------------------------------------------------------


def test_the_bias_follows_the_load_of_all_ranks(monkeypatch):
    """Another rank, played here, sends so many tokens to expert 2 that it must fall."""
    model = small_model()
    trainer = new_trainer(model, bias_update_rate=0.01)
    own = MoeBalance(model, BalanceConfig()).new_load()
    own.add(forward(model, rows()).router_stats)
    other = np.tile([3.0, 0.0, 1000.0, 5.0], (2, 1))
    reduced = []

    def two_ranks(values):
        if len(values) != 2 * 4 + 3 * 2:  # anything but a load: the other rank has nothing
            return list(values)
        reduced.append(values)
        return (np.array(values) + np.concatenate([other.ravel(), np.arange(6)])).tolist()

    monkeypatch.setattr(process_group, "all_reduce_sum", two_ranks)
    load = trainer.train_step([rows()], LOSS, 9).load
    assert len(reduced) == 1, "once a step"
    expected = own.tokens_per_expert + other
    np.testing.assert_array_equal(load.tokens_per_expert, expected)
    np.testing.assert_allclose(load.entropy, own.entropy + np.array([0, 1]), rtol=1e-6)
    np.testing.assert_array_equal(load.tokens, own.tokens + np.array([2, 3]))
    np.testing.assert_array_equal(load.dropped, own.dropped + np.array([4, 5]))
    for at, layer in enumerate((1, 2)):
        bias = model.model.layers[layer].mlp.moe_statics.e_score_correction_bias.numpy()[0]
        step = 0.01 * np.sign(expected[at].mean() - expected[at])
        np.testing.assert_allclose(bias, step - step.mean(), atol=1e-9)
        assert bias[2] < 0 < bias[1]


# ---- training ------------------------------------------------------------------------------------


def trained(**coefs):
    model = small_model()
    for layer in (1, 2):  # sure of themselves, and uneven
        weight = model.model.layers[layer].mlp.gate.weight
        weight.set_value(weight.numpy() * np.array([6.0, 3.0, 1.0, 1.0], np.float32))
    trainer = new_trainer(model, lr=3e-3, **coefs)
    for _ in range(15):
        result = trainer.train_step([rows()], LOSS, 99)
    return trainer.model, result


def test_the_z_loss_keeps_router_logits_small():
    found = []
    for coef in (0.0, 0.1):
        model, _ = trained(z_loss_coef=coef)
        stats = forward(model, rows()).router_stats
        found.append(np.mean([float(z_by_hand(None, s)) for s in stats]))
    assert found[1] < 0.1 * found[0]


def test_the_load_balance_loss_evens_out_the_load():
    found = []
    for coef in (0.0, 0.5):
        _, result = trained(load_balance_coef=coef)
        load = result.load.tokens_per_expert
        found.append((load.std(-1) / load.mean(-1)).mean())
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("name", "coefs"),
    [
        ("orthogonal", {"orthogonal_coef": 0.3}),
        ("decoupled", {"orthogonal_coef": 0.3, "orthogonal_mode": "decoupled"}),
        ("load_balance", {"load_balance_coef": 0.3}),
        ("z_loss", {"z_loss_coef": 0.3}),
        ("bias", {"bias_update_rate": 0.01}),
    ],
)
def test_one_term_off_is_the_bits_of_the_others_alone(name, coefs):
    """Switched on and off again, it leaves no trace: what is left is the others, bit by bit."""
    others = {"z_loss_coef": 0.1, "bias_update_rate": 0.002, "load_balance_coef": 0.01}
    others = {key: value for key, value in others.items() if key not in coefs}
    zeros = {key: 0.0 for key in coefs if key != "orthogonal_mode"}
    ends = []
    for settings in (others, {**others, **zeros}, {**others, **coefs}):
        trainer = new_trainer(small_model(), **settings)
        for seed in range(2):
            trainer.train_step([rows(seed=seed), rows(seed=seed + 5)], LOSS, 9)
        ends.append(state(trainer.model))
    assert_same(ends[0], ends[1])
    changed = [n for n, array in ends[0].items() if not np.array_equal(array, ends[2][n])]
    assert changed, f"{name} has no effect"


# ---- settings ------------------------------------------------------------------------------------

STAGES = {
    PretrainConfig: {"kind": "pretrain", "data": [{"path": "x"}], "seq_len": 8, "steps": 1},
    SftConfig: {"kind": "sft", "data": [{"path": "x"}], "seq_len": 8, "steps": 1},
    DpoConfig: {"kind": "dpo", "data": "x", "seq_len": 8, "steps": 1, "pairs_per_step": 1},
    UpoConfig: {"kind": "upo", "data": [{"path": "x"}], "reward": "math", "iterations": 1,
                "rollout": {"prompts_per_iteration": 1, "max_new_tokens": 4}},
}  # fmt: skip


def settings(kind, **changes):
    common = {"name": "s", "micro_batch_size": 2, "optim": {"lr": 1e-3}}
    return {**common, **STAGES[kind], **changes}


@pytest.mark.parametrize("kind", list(STAGES))
def test_balance_is_a_setting_of_every_stage_and_mistakes_in_it_have_a_path(kind):
    given = {"z_loss_coef": 0.1, "bias_update_rate": 0.001, "orthogonal_coef": 1e-3}
    config = parse_config(kind, settings(kind, balance=given), "recipe.yaml")
    assert config.balance == BalanceConfig(**given)
    assert isinstance(config, SupervisedConfig | DpoConfig | UpoConfig)
    for name in given:
        with pytest.raises(ConfigError, match=rf"recipe.yaml: balance\.{name}: must be >= 0"):
            parse_config(kind, settings(kind, balance={**given, name: -1e-3}), "recipe.yaml")
