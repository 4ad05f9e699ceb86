"""Operations, traffic and layouts that `plan` states, and how it tells them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from ernie_train.cli.main import main
from ernie_train.core.config import parse_config
from ernie_train.core.errors import UserError
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute, RecomputeConfig
from ernie_train.parallel.recompute import PARTS
from ernie_train.plan import PlanSettings, print_plan
from ernie_train.plan.command import plan_request
from ernie_train.plan.cost import Rates, mean_context, recomputed_flops, step_cost, token_flops
from ernie_train.plan.layout import CHUNK_TOKENS, Layout, Precision, count_parameters, layouts
from ernie_train.plan.memory import Machine, memory_demand
from ernie_train.plan.search import PlanRequest, candidates, smallest_cluster
from ernie_train.plan.workload import MicroBatch, Workload, recipe_workloads
from ernie_train.run.recipe import ParallelConfig, Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
BF16 = Precision("bfloat16", "bfloat16")
RATES = Rates(tflops=100.0, inside_gbps=800.0, between_gbps=80.0, memory_gb_per_s=1000.0)
SFT = {
    "name": "sft", "kind": "sft", "data": [{"path": "x"}], "seq_len": 8192,
    "micro_batch_size": 1, "grad_accum_steps": 64, "steps": 10, "optim": {"lr": 1e-5},
}  # fmt: skip
RL = {
    "name": "rl", "kind": "upo", "data": [{"path": "x"}], "reward": "logic", "iterations": 10,
    "rollout": {
        "prompts_per_iteration": 64, "group_size": 8, "max_prompt_tokens": 1024,
        "max_new_tokens": 7168, "batch_size": 16,
    },
    "micro_batch_size": 2, "policy": {"minibatches": 4}, "optim": {"lr": 1e-6},
    "preference": {"coef": 0.1, "pairs": "online"},
}  # fmt: skip
CRITIC = {"critic": {"optim": {"lr": 1e-6}}}


@pytest.fixture(scope="module")
def large() -> Ernie4_5_MoeConfig:
    return Ernie4_5_MoeConfig.preset("21b-a3b")


def recipe_data(*stages: dict[str, Any], preset: str, device: str) -> dict[str, Any]:
    return {
        "name": "plan", "model": {"preset": preset}, "tokenizer": {"path": "data/tokenizer"},
        "device": device, "stages": list(stages),
    }  # fmt: skip


def recipe(*stages: dict[str, Any], preset: str = "21b-a3b", device: str = "gpu") -> Recipe:
    return parse_config(Recipe, recipe_data(*stages, preset=preset, device=device), "test")


def request(of: Recipe, memory_gb: float = 80.0) -> PlanRequest:
    return PlanRequest(
        of.model.build(), recipe_workloads(of), Machine(True, BF16), memory_gb, RATES
    )


def printed(of: Recipe, settings: PlanSettings) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        print_plan(of, settings, console)
    return captured.get()


# ---- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "mini", "21b-a3b", "0.3b"])
def test_a_forward_pass_is_two_operations_a_weight(preset: str) -> None:
    """Every active weight that multiplies is used once; norms do not, the embedding is looked up.

    The tied embedding counts once, as the head.
    """
    config = Ernie4_5_MoeConfig.preset(preset)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    products = config.num_parameters()[1] - norms
    assert token_flops(config, 0.0).forward == 2 * products


def test_attention_is_the_causal_half(large: Ernie4_5_MoeConfig) -> None:
    """Summed over the tokens of a document, as a double loop would."""
    length = 37
    pairs = sum(query + 1 for query in range(length))
    wanted = 2 * 2 * pairs * 20 * 128 * 28
    assert token_flops(large, mean_context(length)).attention * length == wanted


def test_training_and_what_is_done_again(large: Ernie4_5_MoeConfig) -> None:
    """Parts add up to the layers, and layers of one kind cost the same; the first one is dense."""
    flops = token_flops(large, 100.0)
    assert flops.training(0.0) == 3 * flops.forward
    assert flops.training(flops.head) == 3 * flops.forward + flops.head
    whole = recomputed_flops(large, 100.0, True)
    assert whole == pytest.approx(flops.layers + flops.attention)
    attention, experts = (
        recomputed_flops(large, 100.0, RecomputeConfig(parts=(part,))) for part in PARTS
    )
    assert attention + experts == pytest.approx(whole)
    # 2560 x (20 + 4) x 128 twice, and 20 x 128 x 100 twice, all times 2, in each of 28 layers
    assert attention == 28 * 2 * (2 * 2560 * 24 * 128 + 2 * 20 * 128 * 100)
    some = [
        recomputed_flops(large, 100.0, RecomputeConfig(parts=("experts",), layers=n))
        for n in (1, 2, 3)
    ]
    assert some[0] == 2 * 3 * 2560 * 12288
    assert some[2] - some[1] == pytest.approx((experts - some[0]) / 27)
    assert recomputed_flops(large, 100.0, False) == 0


# ---- traffic -------------------------------------------------------------------------------------


def sft_load(micro_batches: int = 4) -> Workload:
    return Workload("sft", MicroBatch(1, 8192, 8192), 1, micro_batches, 10)


@pytest.mark.parametrize(
    ("recompute", "passes"),
    [
        (False, 4),
        (True, 6),
        (RecomputeConfig(parts=("attention",)), 4),
        (RecomputeConfig(parts=("experts",)), 6),
        (RecomputeConfig(parts=("experts",), layers=10), 4 + 2 * 9 / 27),  # the first is dense
    ],
)
def test_an_exchange_sends_k_rows_a_layer(
    large: Ernie4_5_MoeConfig, recompute: Recompute, passes: float
) -> None:
    """Of 8 ranks' rows 1/8 stays at home; dispatch and combine, forward, backward and again."""
    layout = Layout(8, 1, False, recompute)
    cost = step_cost(large, BF16, layout, RATES, sft_load(8))
    assert cost.sent["all-to-all"] == pytest.approx(8192 * 27 * 6 * 2560 * 2 * 7 / 8 * passes)
    assert cost.seconds["all-to-all"] == pytest.approx(cost.sent["all-to-all"] * 8 / 800e9)
    alone = step_cost(large, BF16, Layout(1, 8, False, recompute), RATES, sft_load(8))
    assert alone.sent["all-to-all"] == 0


def test_gradients_go_around_a_ring(large: Ernie4_5_MoeConfig) -> None:
    """An all-reduce of n ranks sends 2 (n-1)/n of the data; sharded, half as much, and weights."""
    counts = count_parameters(large)
    dense, experts = counts.dense * 15 / 16, counts.experts / 8 * 1 / 2
    plain = step_cost(large, BF16, Layout(8, 2, False, False), RATES, sft_load(16))
    sharded = step_cost(large, BF16, Layout(8, 2, True, False), RATES, sft_load(16))
    assert plain.sent["gradients"] == pytest.approx(2 * 2 * (dense + experts))
    assert plain.sent["weights"] == 0
    assert sharded.sent["gradients"] == pytest.approx(2 * (dense + experts))
    assert sharded.sent["weights"] == pytest.approx(2 * (dense + experts))
    # 16 ranks are two machines, so the slower wires carry them.
    assert plain.seconds["gradients"] == pytest.approx(plain.sent["gradients"] * 8 / 80e9)


def test_compute_follows_the_fullest_rank(large: Ernie4_5_MoeConfig) -> None:
    layout = Layout(8, 1, False, False)
    even = step_cost(large, BF16, layout, RATES, sft_load(8))
    uneven = step_cost(large, BF16, layout, RATES, sft_load(9))
    few = step_cost(large, BF16, layout, RATES, sft_load(3))
    flops = 3 * token_flops(large, mean_context(8192)).forward
    assert even.seconds["compute"] == pytest.approx(8192 * flops / 100e12)
    assert uneven.seconds["compute"] == pytest.approx(2 * even.seconds["compute"])
    assert (even.busy_ranks, few.busy_ranks) == (8, 3)


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


def test_recorded_experts_are_counted_in_memory_and_on_the_disk() -> None:
    """By hand: 27 MoE layers of 6 experts, 2 bytes each; 64 prompts of 1024, 512 x 7168 tokens."""
    rollout = {"rollout": {**RL["rollout"], "dump": True}}
    of = recipe(RL | rollout | {"policy": {"minibatches": 4, "router_replay": True}})
    (load,) = recipe_workloads(of)
    size = 27 * 6 * 2 * (64 * 1024 + 512 * 7168)
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
    assert (load.reference, load.sampling) == (True, None)


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


# ---- layouts -------------------------------------------------------------------------------------


def test_sft_and_rl_of_the_large_model_fit_eight_ranks() -> None:
    """8K rows on 8 x 80 GB; nothing but spread experts with recompute does it."""
    for stage in (SFT, RL):
        fitting = [c for c in candidates(request(recipe(stage)), 8) if c.fits(80)]
        assert fitting
        assert all(c.layout.recompute and c.layout.expert > 1 for c in fitting)
        assert fitting[0].seconds == min(c.seconds for c in fitting)


def test_attention_and_experts_are_tried_alone_and_what_the_recipe_says(
    large: Ernie4_5_MoeConfig,
) -> None:
    own = RecomputeConfig(parts=("experts",), layers=14)
    tried = [layout.recompute_label for layout in layouts(large, 1)]
    assert tried == ["no", "attention", "experts", "layers"]
    assert [x.recompute_label for x in layouts(large, 1, own=own)] == [*tried, "experts, first 14"]
    for known in (True, RecomputeConfig(), RecomputeConfig(parts=("experts",))):
        assert [x.recompute_label for x in layouts(large, 1, own=known)] == tried


def test_less_is_run_again_where_memory_is_left() -> None:
    """The more is kept, the faster; the experts are the bulk of what a layer keeps."""
    by_choice = {
        c.layout.recompute_label: c
        for c in candidates(request(recipe(SFT)), 8)
        if c.layout.expert == 8 and c.layout.sharding
    }
    order = ["no", "attention", "experts", "layers"]
    peaks, seconds = ([getattr(by_choice[n], k) for n in order] for k in ("peak", "seconds"))
    assert peaks == sorted(peaks, reverse=True)
    assert seconds == sorted(seconds)
    saved = peaks[0] - np.array(peaks)
    assert saved[2] > 4 * saved[1]


def test_a_critic_needs_more_machines() -> None:
    tight = request(recipe(RL | CRITIC))
    assert not any(c.fits(80) for c in candidates(tight, 8))
    cluster = smallest_cluster(tight)
    assert cluster.fits(80)
    assert not any(c.fits(80) for c in candidates(tight, cluster.layout.ranks // 2))


def test_long_rows_fit_where_experts_take_chunks_of_them() -> None:
    long = request(recipe(SFT | {"seq_len": 131072}))
    cluster = smallest_cluster(long)
    assert (cluster.layout.ranks, cluster.fits(80)) == (16, True)
    assert cluster.layout.recompute == RecomputeConfig(chunk_tokens=CHUNK_TOKENS)
    assert cluster.memory[0].largest_part() == "activations"
    whole = next(
        c for c in candidates(long, 16) if c.layout == replace(cluster.layout, recompute=True)
    )
    assert not whole.fits(80)
    assert whole.seconds == cluster.seconds


def test_chunks_are_tried_for_long_micro_batches_alone(large: Ernie4_5_MoeConfig) -> None:
    tried = [layout.recompute_label for layout in layouts(large, 1, tokens=CHUNK_TOKENS)]
    more = [layout.recompute_label for layout in layouts(large, 1, tokens=CHUNK_TOKENS + 1)]
    words = f"chunks of {CHUNK_TOKENS}"
    assert more == [*tried, f"experts, {words}", f"layers, {words}"]
    limited = Ernie4_5_MoeConfig.preset("21b-a3b", moe_capacity_factor=1.0)
    assert [x.recompute_label for x in layouts(limited, 1, tokens=10**6)] == tried


def test_more_ranks_do_not_help_a_row_that_is_too_long() -> None:
    long = request(recipe(SFT | {"seq_len": 131072, "micro_batch_size": 4}))
    cluster = smallest_cluster(long)
    assert not cluster.fits(80)
    assert cluster.memory[0].largest_part() == "activations"
    least = min(c.peak for ranks in (512, 1024) for c in candidates(long, ranks))
    assert cluster.peak <= 1.01 * least


def test_every_layout_multiplies_to_the_ranks(large: Ernie4_5_MoeConfig) -> None:
    found = candidates(request(recipe(SFT)), 48)
    assert {c.layout.expert for c in found} == {1, 2, 4, 8, 16}  # divisors of 64 and of 48
    assert all(c.layout.ranks == 48 for c in found)


# ---- what is printed -----------------------------------------------------------------------------


def test_the_answer_names_the_best_layout() -> None:
    text = printed(recipe(SFT), PlanSettings())
    best = next(c for c in candidates(request(recipe(SFT)), 8) if c.fits(80)).layout
    assert f"parallel: {{expert: {best.expert}, data: {best.data}, sharding: true" in text
    assert "20.384 B in routed experts" in text
    assert "8 GPUs of 80 GB" in text
    assert "weights bfloat16, gradients bfloat16 (device: gpu)" in text


def test_the_answer_says_what_is_run_again() -> None:
    own = parse_config(
        Recipe,
        recipe_data(SFT, preset="21b-a3b", device="gpu")
        | {"parallel": {"recompute": {"parts": ["experts"], "layers": 27}}},
        "test",
    )
    text = printed(own, PlanSettings(expert=8))
    rows = [line.split("yes")[1] for line in text.splitlines() if line.count("yes") == 1]
    assert {row.split()[0] for row in rows} >= {"experts", "experts,", "layers"}
    layout = Layout(8, 1, True, own.parallel.recompute)
    said = yaml.safe_load(layout.as_yaml())
    assert said["parallel"]["recompute"] == {"parts": ["experts"], "layers": 27}
    for choice, words in ((False, False), (True, True), (RecomputeConfig(layers=3),
                          {"parts": ["attention", "experts"], "layers": 3}),
                          (RecomputeConfig(parts=("experts",), chunk_tokens=512),
                          {"parts": ["experts"], "chunk_tokens": 512})):  # fmt: skip
        yaml_ = Layout(8, 1, True, choice).as_yaml()
        assert yaml.safe_load(yaml_)["parallel"]["recompute"] == words
        assert parse_config(ParallelConfig, yaml.safe_load(yaml_)["parallel"], "plan")


def test_a_layout_is_printed_with_its_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    sft = ROOT / "recipes" / "ernie-21b-a3b-sft.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(sft), "--gpus", "8", "--gpu-memory-gb", "80"])
    assert not stopped.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "recompute: {parts: [experts]}}" in said


def test_the_answer_says_what_is_missing() -> None:
    text = printed(recipe(RL | CRITIC), PlanSettings())
    assert "nothing fits" in text
    assert "what binds is critic" in text
    assert "the smallest cluster that holds it: " in text
    too_long = recipe(SFT | {"seq_len": 131072, "micro_batch_size": 4})
    long = " ".join(printed(too_long, PlanSettings()).split())
    assert "no cluster of up to 1024 ranks holds it" in long
    assert "a smaller micro_batch_size or shorter rows take less" in long


def test_a_cpu_recipe_is_float32_and_takes_what_the_bench_measures() -> None:
    text = printed(recipe(SFT, preset="mini", device="cpu"), PlanSettings(ranks=1))
    assert "weights float32, gradients float32 (device: cpu)" in text
    assert "reserve" not in text


def test_naming_gpus_plans_for_gpus() -> None:
    auto = recipe(SFT, device="auto")
    assert "bfloat16, gradients float32" in printed(
        auto, PlanSettings(ranks=8, gradients="float32")
    )
    assert "weights float32" in printed(auto, PlanSettings())


def test_rates_are_those_that_are_given() -> None:
    """Rollouts read weights and cache: at half the rate they take twice as long."""
    text = printed(recipe(RL), PlanSettings(interconnect_gbps=800.0, between_gbps=100.0))
    assert "800 Gbit/s within a machine of 8 and 100 beyond" in text
    assert "communication is counted without overlap" in text

    def seconds(rate: float) -> float:
        settings = PlanSettings(memory_gb_per_s=rate, tflops=1e9, interconnect_gbps=1e9)
        planned, _ = plan_request(recipe(RL), settings)
        return candidates(planned, 8)[0].cost[0].seconds["rollouts"]

    assert seconds(1000.0) == pytest.approx(2 * seconds(2000.0), rel=1e-3)


def test_ranks_without_a_micro_batch_are_told() -> None:
    text = printed(recipe(SFT | {"grad_accum_steps": 3}), PlanSettings())
    assert "sft: 5 of 8 ranks have no micro-batch" in text


@pytest.mark.parametrize(("expert", "ranks"), [(3, 9), (16, 8), (128, 128)])
def test_an_expert_degree_that_cannot_be(expert: int, ranks: int) -> None:
    message = f"--expert {expert} must divide the 64 experts of a layer and the {ranks} ranks"
    with pytest.raises(UserError, match=message):
        printed(recipe(SFT), PlanSettings(ranks=ranks, expert=expert))


def test_gradients_that_cannot_be() -> None:
    with pytest.raises(UserError, match="on a CPU weights and gradients are float32"):
        printed(recipe(SFT, device="cpu"), PlanSettings(gradients="bfloat16"))
    with pytest.raises(UserError, match="--gradients fp8: float32 or bfloat16"):
        printed(recipe(SFT), PlanSettings(gradients="fp8"))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--gpus", "2", "--gpu-memory-gb", "80"], 0, "it fits"),
        (["--gpus", "0"], 2, "--gpus"),
        (["--gpu-memory-gb", "-1"], 2, "--gpu-memory-gb"),
        (["--expert", "3", "--gpus", "8"], 2, "--expert 3 must divide the 16 experts"),
    ],
)
def test_the_command(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_data(SFT, preset="tiny", device="auto")))
    done = subprocess.run(
        [sys.executable, "-m", "ernie_train", "plan", str(path), *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
