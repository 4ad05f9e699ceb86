"""Micro-batches, sampling and passes of the stages of recipes."""

from dataclasses import replace

import pytest

from ernie_train.plan import PlanSettings
from ernie_train.plan.cost import step_cost, token_flops
from ernie_train.plan.disk import dumped_bytes
from ernie_train.plan.layout import Layout, Machine
from ernie_train.plan.memory import memory_demand, recorded_bytes
from ernie_train.plan.workload import MicroBatch, recipe_workloads
from ernie_train.run.recipe import load_recipe
from tests.plan.plans import BF16, CRITIC, RATES, RL, ROOT, printed, recipe

# ---- the workload of stages ----------------------------------------------------------------------


def test_phases_of_a_schedule() -> None:
    stage = {
        "name": "pre", "kind": "pretrain", "data": [{"path": "x"}], "micro_batch_size": 4,
        "grad_accum_steps": 2, "optim": {"lr": 1e-4},
        "rope_schedule": [
            {"rope_theta": 1e4, "seq_len": 1024, "steps": 5},
            {"rope_theta": 1e5, "seq_len": 4096, "steps": 3, "micro_batch_size": 1},
        ],
    }  # fmt: skip
    loads = recipe_workloads(recipe(stage), document_tokens=2000)
    batches = [w.micro_batch for w in loads]
    assert batches == [MicroBatch(4, 1024, 1024), MicroBatch(1, 4096, 2000)]
    assert [(w.name, w.steps, w.tokens) for w in loads] == [
        ("pre at 1024", 5, 8192), ("pre at 4096", 3, 8192),
    ]  # fmt: skip


def test_an_iteration_of_rl() -> None:
    """512 samples in 4 updates of 64 micro-batches of 2; a last token predicts nothing."""
    (load,) = recipe_workloads(
        recipe(RL | CRITIC | {"policy": {"minibatches": 4, "update_epochs": 2}})
    )
    assert load.micro_batch == MicroBatch(2, 8191, 8191)
    assert (load.updates, load.micro_batches) == (8, 64)
    assert load.tokens == 2 * 512 * 8191
    assert load.sampling is not None
    assert load.sampling.sequences == 512
    assert (load.reference, load.critic, load.scoring_models) == (True, True, 3)


def test_a_micro_batch_of_rl_is_the_largest_within_its_tokens() -> None:
    many = RL | {"micro_batch_size": 16, "preference": None, "micro_batch_tokens": 3 * 8191 + 5}
    (load,) = recipe_workloads(recipe(many))
    assert load.micro_batch == MicroBatch(3, 8191, 8191)
    assert load.micro_batches == 43  # of 128 sequences
    (load,) = recipe_workloads(recipe(many | {"share_prompts": True}))
    batch = load.micro_batch
    assert (batch.rows, batch.tokens) == (3, 3 * 8191 - 2 * RL["rollout"]["max_prompt_tokens"])


@pytest.mark.parametrize("learns_from", ["informative groups", "critic", "pairs"])
def test_refills_are_counted_as_full_rounds(learns_from: str) -> None:
    """They are sampled, scored, kept and written; what they replace is not trained on, if it is."""
    rollout, one, three = {**RL["rollout"], "dump": True}, [], []
    more = {
        "informative groups": {"preference": None}, "pairs": {},
        "critic": {**CRITIC, "preference": None},
    }[learns_from]  # fmt: skip
    policy = {"policy": {"minibatches": 4, "router_replay": True}}
    for refills, found in ((0, one), (2, three)):
        of = recipe(RL | policy | more | {"rollout": {**rollout, "refill_rounds": refills}})
        (load,) = recipe_workloads(of)
        assert load.sampling is not None
        cost = step_cost(of.model.build(), BF16, Layout(8, 1, True, True), RATES, load)
        config, sampling = of.model.build(), load.sampling
        found += [cost.seconds["rollouts"], cost.sent["rollouts"], recorded_bytes(config, sampling),
                  dumped_bytes(config, sampling), load.scored, load.tokens]  # fmt: skip
    times = [3, 3, 3, 3, *([1, 1] if learns_from == "informative groups" else [3, 3])]
    assert three == pytest.approx([a * b for a, b in zip(one, times, strict=True)])


def test_recorded_experts_are_counted_in_memory_and_on_the_disk() -> None:
    """By hand: 27 MoE layers of 6 experts, a byte each; 64 prompts of 1024, 512 x 7168 tokens."""
    rollout = {"rollout": {**RL["rollout"], "dump": True}}
    of = recipe(RL | rollout | {"policy": {"minibatches": 4, "router_replay": True}})
    (load,) = recipe_workloads(of)
    size = 27 * 6 * (64 * 1024 + 512 * 7168)
    said = printed(of, PlanSettings())
    assert f"router_replay keeps up to {size / 1e9:.2f} GB of experts" in said
    assert f"dump writes up to {27 * 6 * 2 * 512 * 8192 * 4 / 3 / 1e9:.2f} GB" in said
    free = replace(load, sampling=replace(load.sampling, records_experts=False))
    for on_gpu, more in ((True, 0), (False, size)):  # of a rank's memory
        machine = Machine(on_gpu, BF16)
        with_them, without = (
            memory_demand(of.model.build(), machine, Layout(8, 1, True, True), one)
            for one in (load, free)
        )
        assert with_them.peak - without.peak == pytest.approx(more)
    assert "GB of experts" not in printed(recipe(RL), PlanSettings())


def test_shared_prompts_leave_tokens_out() -> None:
    """A micro-batch of 4 of a group of 8 computes one prompt of 1024 instead of four."""
    stage = RL | {"micro_batch_size": 4, "preference": None}
    (alone,), (shared,) = (
        recipe_workloads(recipe(stage | {"share_prompts": share})) for share in (False, True)
    )
    assert alone.micro_batch.tokens - shared.micro_batch.tokens == 3 * 1024
    of = recipe(stage | {"share_prompts": True})
    assert f"leaves out {3 * 1024 / (4 * 8191):.1%} of the tokens" in printed(of, PlanSettings())
    costs = [
        step_cost(of.model.build(), BF16, Layout(8, 1, True, True), RATES, load)
        for load in (alone, shared)
    ]
    share = costs[1].seconds["compute"] / costs[0].seconds["compute"]
    assert share == pytest.approx(1 - 3 * 1024 / (4 * 8191))


def test_an_engine_samples_beside_the_ranks() -> None:
    engine = {"rollout": {**RL["rollout"], "batch_size": 256, "engine": {"kind": "vllm"}}}
    of = recipe(RL | engine)
    (load,) = recipe_workloads(of)
    assert (
        "rollouts"
        not in step_cost(of.model.build(), BF16, Layout(8, 1, True, True), RATES, load).seconds
    )
    demand = memory_demand(of.model.build(), Machine(True, BF16), Layout(8, 1, True, True), load)
    assert demand.rollouts == 0
    assert "completions come from vllm" in (said := printed(of, PlanSettings()))
    assert "a version of the weights takes 43.65 GB of disk" in said


def test_the_large_recipe_of_rl_is_planned_with_its_experts() -> None:
    of = load_recipe(ROOT / "recipes/ernie-21b-a3b-prl.yaml")
    said = printed(of, PlanSettings(ranks=8))
    for stage in of.stages:
        assert f"{stage.name}: router_replay keeps up to 1.21 GB" in said


def test_dpo_trains_pairs_and_samples_nothing() -> None:
    stage = {
        "name": "dpo", "kind": "dpo", "data": "x", "seq_len": 512, "steps": 4,
        "pairs_per_step": 6, "micro_batch_size": 4, "optim": {"lr": 1e-6},
    }  # fmt: skip
    (load,) = recipe_workloads(recipe(stage))
    assert (load.micro_batch.rows, load.micro_batches) == (4, 3)
    assert (load.reference, load.scoring_models, load.sampling) == (False, 1, None)


def test_a_reward_model_trains_pairs_without_logits_or_a_reference() -> None:
    stage = {
        "name": "rm", "kind": "reward", "data": "x", "seq_len": 512, "steps": 4,
        "pairs_per_step": 6, "micro_batch_size": 4, "optim": {"lr": 1e-6},
    }  # fmt: skip
    (load,) = recipe_workloads(recipe(stage))
    assert (load.micro_batch, load.micro_batches) == (MicroBatch(4, 512, 512), 3)
    assert (load.reference, load.sampling, load.scored) == (False, None, 0)
    config = recipe(stage).model.build()
    scored, with_logits = (
        step_cost(config, BF16, Layout(1, 1, False, False), RATES, replace(load, loss=loss))
        for loss in ("score", "logprobs")
    )
    head = token_flops(config, 1).head
    assert with_logits.flops_per_token - scored.flops_per_token == pytest.approx(4 * head)
