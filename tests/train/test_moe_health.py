"""Metrics of the experts by definition, the routing probe, and warnings."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_train.train.moe_balance import BalanceConfig, MoeBalance
from ernie_train.train.moe_health import MoeHealth, MoeHealthConfig, layer_health, over_layers
from tests.train.test_moe_balance import forward, small_model
from tests.train.test_trainer import rows


def test_health_by_definition():
    model, batch = small_model(moe_capacity_factor=0.7), rows()
    load = MoeBalance(model, BalanceConfig()).new_load()
    stats = forward(model, batch).router_stats
    load.add(stats)
    figures = layer_health(model, load)
    assert list(figures) == [1, 2]
    for layer, found in zip(stats, figures.values(), strict=True):
        counts = np.bincount(layer.expert_ids.numpy().reshape(-1), minlength=4)
        probs = layer.router_probs.numpy().astype(np.float64)
        assert found["load_max"] == pytest.approx(counts.max() / counts.mean())
        assert found["load_cv"] == pytest.approx(counts.std() / counts.mean())
        assert found["dead_experts"] == (counts == 0).sum()
        assert found["router_entropy"] == pytest.approx(
            -(probs * np.log(probs)).sum(-1).mean(), rel=1e-5
        )
        capacity = np.ceil(0.7 * batch.num_tokens * 2 / 4)
        dropped = np.maximum(counts - capacity, 0).sum()
        assert dropped > 0
        assert found["drop_rate"] == pytest.approx(dropped / counts.sum())
    merged = over_layers(figures)
    assert merged["moe/load_max"] == max(f["load_max"] for f in figures.values())
    assert merged["moe/load_cv"] == pytest.approx(np.mean([f["load_cv"] for f in figures.values()]))


def health_of(model, warnings, **keys):
    return MoeHealth(model, MoeHealthConfig(**keys), first_batch=rows, warn=warnings.append)


def test_changed_routing_is_zero_at_the_start_and_one_after_a_swap():
    model, said = small_model(), []
    health = health_of(model, said, probe_every_steps=1, layers_every_steps=1)
    load = MoeBalance(model, BalanceConfig()).new_load()
    load.add(forward(model, rows()).router_stats)
    assert health.observe(1, load)["moe/routing_changed"] == 0.0
    bias = model.model.layers[2].mlp.moe_statics.e_score_correction_bias
    chosen = health._probe.expert_ids[1]
    bias.set_value(np.array([[0, 0, 9, 9]], np.float32))
    expected = (chosen != np.array([2, 3])).any(-1).mean()
    metrics = health.observe(2, load)
    assert metrics["moe/layer_02/routing_changed"] == pytest.approx(expected)
    assert metrics["moe/layer_01/routing_changed"] == 0.0
    assert expected > 0.1


def test_warnings_come_once_after_enough_steps_and_survive_a_checkpoint():
    model, said = small_model(), []
    health = health_of(model, said, warn_after_steps=3, warn_load_max=1.5)
    load = MoeBalance(model, BalanceConfig()).new_load()
    load.tokens_per_expert[0] = [8, 4, 4, 0]
    load.tokens_per_expert[1] = [4, 4, 4, 4]
    for step in (1, 2):
        health.observe(step, load)
    assert said == []
    again = []
    resumed = MoeHealth(
        model, MoeHealthConfig(warn_after_steps=3, warn_load_max=1.5), first_batch=rows,
        state=health.state_dict(), warn=again.append,
    )  # fmt: skip
    for step in (3, 4, 5):
        health.observe(step, load)
        resumed.observe(step, load)
    assert said == again
    assert len(said) == 2
    assert "layer 1: expert 3 got no token for 3 steps" in said[0]
    assert "layer 1: the busiest expert" in said[1]
    assert all("bias_update_rate" in text for text in said), "every warning names its remedy"
    load.tokens_per_expert[0] = [4, 4, 4, 4]
    health.observe(6, load)
    load.tokens_per_expert[0] = [8, 4, 4, 0]
    for step in (7, 8, 9):
        health.observe(step, load)
    assert len(said) == 4, "it is said again after it had been in order"


def test_every_figure_of_health_by_definition():
    model = small_model()
    biases = {1: [0.1, -0.2, 0.05, 0.0], 2: [0.0, 0.0, 0.4, 0.0]}
    cosines, counts = {}, {1: [6, 0, 3, 3], 2: [0, 0, 12, 0]}
    load = MoeBalance(model, BalanceConfig()).new_load()
    for at, (layer, values) in enumerate(biases.items()):
        moe = model.model.layers[layer].mlp
        moe.moe_statics.e_score_correction_bias.set_value(np.array([values], np.float32))
        columns = moe.gate.weight.numpy().astype(np.float64)
        columns /= np.linalg.norm(columns, axis=0)
        gram = np.abs(columns.T @ columns)
        cosines[layer] = gram[~np.eye(4, dtype=bool)].mean()
        load.tokens_per_expert[at], load.tokens[at] = counts[layer], 6
        load.entropy[at] = 6 * at
    figures = layer_health(model, load)
    expected = {
        1: {"load_max": 2.0, "load_cv": np.std(counts[1]) / 3, "dead_experts": 1,
            "router_entropy": 0.0, "bias_range": 0.3, "bias_mean": -0.0125,
            "router_cosine": cosines[1]},
        2: {"load_max": 4.0, "load_cv": np.std(counts[2]) / 3, "dead_experts": 3,
            "router_entropy": 1.0, "bias_range": 0.4, "bias_mean": 0.1,
            "router_cosine": cosines[2]},
    }  # fmt: skip
    assert figures.keys() == expected.keys()
    for layer, values in expected.items():
        assert figures[layer] == pytest.approx(values, rel=1e-5), "no drop rate without a capacity"
    merged = over_layers(figures)
    means = ("load_cv", "router_entropy", "router_cosine")
    by_hand = {f"moe/{n}": np.mean([expected[1][n], expected[2][n]]) for n in means}
    worst = {"moe/load_max": 4.0, "moe/dead_experts": 4.0, "moe/bias_range": 0.4}
    worst["moe/bias_mean"] = 0.1
    assert merged == pytest.approx({**by_hand, **worst}, 1e-5)
