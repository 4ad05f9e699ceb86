"""A plan counts what a LoRA stage trains: as many numbers as the model that is made has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ernie_train.core.config import parse_config
from ernie_train.model import is_expert_parameter
from ernie_train.model.partial import begin_partial_training, trained_parameters
from ernie_train.plan.activations import layer_bytes
from ernie_train.plan.layout import Layout, Machine, Precision, count_parameters, count_trained
from ernie_train.plan.memory import memory_demand
from ernie_train.plan.workload import MicroBatch, Workload
from ernie_train.rl.dpo import DpoConfig
from ernie_train.weights.layout import parameter_shapes
from tests.small_models import make_model

ONE, CPU = Layout(1, 1, False, False), Machine(False, Precision("float32"))
GPU = Machine(True, Precision("bfloat16"))


def stage(**changes: Any) -> DpoConfig:
    settings = {
        "name": "dpo", "kind": "dpo", "data": "x", "seq_len": 8, "steps": 1, "pairs_per_step": 1,
        "micro_batch_size": 2, "optim": {"lr": 1e-3}, **changes,
    }  # fmt: skip
    return parse_config(DpoConfig, settings, "recipe")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4, "dora": True}},
        {"lora": {"rank": 2}, "train": ["*norm*"]},
        {"freeze": ["experts"]},
    ],
)
def test_the_plan_counts_the_parameters_that_train(changes: dict[str, Any]) -> None:
    model, settings = make_model(), stage(**changes)
    part = count_trained(model.config, settings)
    selection = settings.selection(parameter_shapes(model.config))
    assert part is not None
    assert selection is not None
    begin_partial_training(model, selection, settings.lora, {}, seed=0)
    sizes = {name: int(p.size) for name, p in trained_parameters(model).items()}
    assert part.trained.experts == sum(n for name, n in sizes.items() if is_expert_parameter(name))
    assert part.trained.total == sum(sizes.values())
    assert part.pairs.total == sum(n for name, n in sizes.items() if "lora_" in name)
    assert part.adapter_alone == ("lora" in changes and "train" not in changes)


def test_memory_of_lora_is_the_model_once_and_the_state_of_its_pairs() -> None:
    config = make_model().config
    whole, batch = count_parameters(config).total, MicroBatch(1, 8, 8)
    part = count_trained(config, stage(lora={"rank": 4}))
    assert part is not None
    pairs = part.pairs.total
    for machine, width, state in ((CPU, 4, 8), (GPU, 2, 12)):
        load = Workload("", batch, micro_batches=2, reference=True)
        full = memory_demand(config, machine, ONE, load)
        lora = memory_demand(config, machine, ONE, replace(load, part=part))
        assert full.reference == full.weights == whole * width
        assert (lora.reference, lora.weights) == (0, (whole + pairs) * width)
        assert (lora.gradients, lora.optimizer) == (pairs * 4, pairs * state)
        assert lora.activations <= full.activations


def test_experts_with_pairs_keep_more_of_each_row() -> None:
    """2 H + 4 I and three ranks instead of H + 5 I numbers; attention and MLP a rank a pair."""
    config = make_model().config
    part = count_trained(config, stage(lora={"rank": 4}))
    outside = count_trained(config, stage(lora={"rank": 4}, freeze=["mlp.experts"]))
    plain, some, all_of_them = (
        layer_bytes(config, CPU, ONE, 8, True, pairs) for pairs in (None, outside, part)
    )
    hidden, width = config.hidden_size, config.moe_intermediate_size
    assert some["attention"] - plain["attention"] == 4 * 4 * 4
    assert some["experts"] - plain["experts"] == 4 * 3 * 4
    more = config.moe_k * (hidden - width + 3 * 4) * 4
    assert all_of_them["experts"] - some["experts"] == more


def test_dora_keeps_the_outputs_before_they_are_scaled() -> None:
    config = make_model().config
    lora, dora = (
        layer_bytes(config, CPU, ONE, 8, True, count_trained(config, stage(lora=settings)))
        for settings in ({"rank": 4}, {"rank": 4, "dora": True})
    )
    q, k, hidden, width = 32, 16, config.hidden_size, config.moe_intermediate_size
    assert dora["attention"] - lora["attention"] == (q + 2 * k + hidden) * 4
    expert = 2 * width + hidden
    assert dora["experts"] - lora["experts"] == (config.moe_k + 1) * expert * 4
