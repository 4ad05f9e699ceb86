"""Terms of the balance by hand, and their settings in recipes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.dpo import DpoConfig
from ernie_train.train import moe_balance
from ernie_train.train.moe_balance import BalanceConfig
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.supervised_data import PretrainConfig, SftConfig, SupervisedConfig
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


@pytest.mark.parametrize(
    ("off", "names"),
    [
        ("load_balance_coef", ["load_balance_loss", "unbiased_expert_ids"]),
        ("z_loss_coef", ["router_z_loss"]),
        ("orthogonal_coef", ["router_orthogonal_loss", "router_orthogonal_gradient"]),
        ("bias_update_rate", ["selection_bias_step"]),
    ],
)
def test_what_is_off_is_not_computed_beside_the_others(monkeypatch, off, names):
    def never(*arguments):
        raise AssertionError("a term with coefficient 0 was computed")

    for name in names:
        monkeypatch.setattr(moe_balance, name, never)
    everything = dict.fromkeys(
        ("load_balance_coef", "z_loss_coef", "orthogonal_coef", "bias_update_rate"), 0.01
    )
    new_trainer(small_model(), **everything | {off: 0.0}).train_step([rows()], LOSS, 9)
    with pytest.raises(AssertionError, match="coefficient 0"):
        new_trainer(small_model(), **everything).train_step([rows()], LOSS, 9)


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
