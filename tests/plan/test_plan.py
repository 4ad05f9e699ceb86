"""Operations, traffic and layouts that `plan` states, and how it tells them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.core.config import parse_config
from ernie_train.core.errors import UserError
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.parallel import RecomputeConfig
from ernie_train.plan import PlanSettings
from ernie_train.plan.command import plan_request
from ernie_train.plan.layout import CHUNK_TOKENS, Layout, layouts
from ernie_train.plan.search import candidates, smallest_cluster
from ernie_train.run.recipe import ParallelConfig, Recipe
from tests.plan.plans import (
    CRITIC,
    RL,
    SFT,
    printed,
    recipe,
    recipe_data,
    request,
)

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


def test_gradients_take_the_room_of_their_type() -> None:
    """P = 1.441 + 20.384 / 8 B gradients of 4 or 2 bytes, which exist at the peak of a step."""
    peaks = []
    for dtype in ("float32", "bfloat16"):
        stage = SFT | {"optim": SFT["optim"] | {"gradient_dtype": dtype}}
        tried = candidates(request(recipe(stage)), 8)
        peaks += [c.peak for c in tried if c.layout == Layout(8, 1, True, True)]
    # A little more: buckets on their way to other ranks have that type too.
    assert peaks[0] - peaks[1] == pytest.approx(2e9 * (1.441 + 20.384 / 8), rel=0.05)


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


def test_the_smallest_cluster_is_found_for_any_expert_degree() -> None:
    odd = recipe_data(SFT, preset="21b-a3b", device="gpu")
    odd["model"]["moe_num_experts"] = 48
    tight = replace(request(parse_config(Recipe, odd, "test")), expert=3)
    cluster = smallest_cluster(tight)
    assert cluster.fits(80) and (cluster.layout.expert, cluster.layout.ranks % 3) == (3, 0)


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
    assert "weights bfloat16 (device: gpu)" in text


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
    assert "weights float32 (device: cpu)" in text
    assert "reserve" not in text


def test_naming_gpus_plans_for_gpus() -> None:
    auto = recipe(SFT, device="auto")
    assert "weights bfloat16" in printed(auto, PlanSettings(ranks=8))
    assert "weights float32" in printed(auto, PlanSettings())


def test_rates_are_those_that_are_given() -> None:
    """Rollouts read weights and cache: at half the rate they take twice as long.

    Where that takes nothing, what is left are the starts of layers: 64 sequences of a rank, 16 at a
    time, 7168 tokens each, 28 layers.
    """
    text = printed(recipe(RL), PlanSettings(interconnect_gbps=800.0, between_gbps=100.0))
    assert "800 Gbit/s within a machine of 8 and 100 beyond" in text
    assert "communication is counted without overlap" in text

    def seconds(rate: float, layer_us: float = 1e-6) -> float:
        settings = PlanSettings(
            memory_gb_per_s=rate, tflops=1e9, interconnect_gbps=1e9, layer_us=layer_us
        )
        planned, _ = plan_request(recipe(RL), settings)
        return candidates(planned, 8)[0].cost[0].seconds["rollouts"]

    assert seconds(1000.0) == pytest.approx(2 * seconds(2000.0), rel=1e-3)
    assert seconds(1e9, 500.0) == pytest.approx(4 * 7168 * 28 * 500e-6, rel=1e-3)


def test_ranks_without_a_micro_batch_are_told() -> None:
    text = printed(recipe(SFT | {"grad_accum_steps": 3}), PlanSettings())
    assert "sft: 5 of 8 ranks have no micro-batch" in text


@pytest.mark.parametrize(("expert", "ranks"), [(3, 9), (16, 8), (128, 128)])
def test_an_expert_degree_that_cannot_be(expert: int, ranks: int) -> None:
    message = f"--expert {expert} must divide the 64 experts of a layer and the {ranks} ranks"
    with pytest.raises(UserError, match=message):
        printed(recipe(SFT), PlanSettings(ranks=ranks, expert=expert))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--gpus", "2", "--gpu-memory-gb", "80"], 0, "it fits"),
        (["--gpus", "0"], 2, "--gpus"),
        (["--gpu-memory-gb", "-1"], 2, "--gpu-memory-gb"),
        (["--expert", "3", "--gpus", "8"], 2, "--expert 3 must divide the 16 experts"),
    ],
)
def test_the_command(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_data(SFT, preset="tiny", device="auto")))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(path), *arguments])
    told = capsys.readouterr()
    assert (stopped.value.code or 0) == status, told.err
    assert message in told.out + told.err
