"""The memory that `plan` states: known figures, closed forms, and what a real step takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.losses import cross_entropy
from ernie_train.model import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    LocalDispatcher,
    Placement,
    kv_cache,
    numpy_decoder,
)
from ernie_train.model import batch_layout as model_layout
from ernie_train.parallel import RecomputeConfig
from ernie_train.parallel import gradients as parallel_gradients
from ernie_train.parallel.recompute import Part
from ernie_train.plan import activations, buckets, decoder, memory
from ernie_train.plan.activations import Activations, MicroBatch
from ernie_train.plan.layout import (
    GB,
    Layout,
    Parameters,
    Precision,
    count_parameters,
    critic_parameters,
    layouts,
)
from ernie_train.plan.memory import (
    Job,
    Machine,
    Rollout,
    cache_bytes,
    model_bytes,
    rank_memory,
    rollout_bytes,
)
from ernie_train.plan.shards import updated_by_rank

BF16 = Precision("bfloat16", "bfloat16")
FP32 = Precision("float32", "float32")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def large() -> Ernie4_5_MoeConfig:
    return Ernie4_5_MoeConfig.preset("21b-a3b")


# ---- parameters and what stays -------------------------------------------------------------------


def test_the_parameters_of_the_large_model(large: Ernie4_5_MoeConfig) -> None:
    """The published figures; the sum is that of the model itself."""
    counts = count_parameters(large)
    assert counts.experts / 1e9 == pytest.approx(20.384, abs=5e-4)
    assert counts.dense / 1e9 == pytest.approx(1.441, abs=5e-4)
    assert counts.total == large.num_parameters()[0]


@pytest.mark.parametrize(("gradients", "expected_gb"), [("bfloat16", 48.7), ("float32", 56.7)])
def test_the_large_model_on_eight_ranks(
    large: Ernie4_5_MoeConfig, gradients: str, expected_gb: float
) -> None:
    """About 49 GB (57 with float32 gradients) of weights, gradients and states."""
    precision, layout = Precision("bfloat16", gradients), Layout(8, 1, True, True)  # type: ignore[arg-type]
    counts = count_parameters(large)
    held, even = counts.on_rank(layout).total, counts.updated_on_rank(layout)
    assert sum(model_bytes(held, even, precision)) / GB == pytest.approx(expected_gb, abs=0.05)
    # Parameters are not cut: the owner of the embedding has 1.0 GB of states more.
    fullest = max(updated_by_rank(large, layout))
    more = 12 * (large.vocab_size * large.hidden_size - counts.dense / 8) / GB
    assert sum(model_bytes(held, fullest, precision)) / GB == pytest.approx(
        expected_gb + more, abs=0.05
    )


@pytest.mark.parametrize(
    ("layout", "held", "updated"),
    [
        (Layout(1, 1, False, False), 1.0 + 16.0, 1.0 + 16.0),
        (Layout(4, 1, False, False), 1.0 + 4.0, 1.0 + 4.0),
        (Layout(4, 1, True, False), 1.0 + 4.0, 1.0 / 4 + 4.0),
        (Layout(1, 4, True, False), 1.0 + 16.0, 17.0 / 4),
        (Layout(2, 2, True, False), 1.0 + 8.0, 1.0 / 4 + 8.0 / 2),
    ],
)
def test_states_are_sharded_over_the_ranks_that_hold_a_parameter(
    layout: Layout, held: float, updated: float
) -> None:
    counts = Parameters(dense=1_000_000, experts=16_000_000)
    assert counts.on_rank(layout).total == held * 1e6
    assert counts.updated_on_rank(layout) == updated * 1e6
    own = counts.on_rank(layout).total, counts.updated_on_rank(layout)
    assert model_bytes(*own, BF16) == (2e6 * held, 2e6 * held, 12e6 * updated)
    assert model_bytes(*own, FP32) == (4e6 * held, 4e6 * held, 8e6 * updated)


def test_states_of_all_ranks_add_up_to_the_whole(large: Ernie4_5_MoeConfig) -> None:
    """Sharded, every parameter's state exists once in the whole job."""
    counts = count_parameters(large)
    for layout in layouts(large, 64):
        total = counts.updated_on_rank(layout) * layout.ranks
        if layout.sharding:
            assert total == pytest.approx(counts.total)
        else:
            assert total == counts.dense * 64 + counts.experts * layout.data


def test_whole_parameters_are_dealt_out_over_a_job(large: Ernie4_5_MoeConfig) -> None:
    """Nothing is lost or doubled, and the owner of the embedding has the most of all."""
    layout = Layout(8, 2, True, True)
    found = updated_by_rank(large, layout)
    assert sum(found) == count_parameters(large).total
    embedding = large.vocab_size * large.hidden_size
    assert max(found) >= embedding + min(found) - count_parameters(large).dense / 16
    assert updated_by_rank(large, Layout(8, 2, False, True)) == [
        count_parameters(large).on_rank(layout).total
    ] * 16  # fmt: skip
    critic = updated_by_rank(large, layout, critic=True)
    assert sum(critic) == critic_parameters(large).total  # tied: the embedding stays


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "use_bias": True}])
@pytest.mark.parametrize("grid", [Grid(4, 1, True), Grid(2, 2, True), Grid(1, 4, True)])
def test_the_plan_deals_parameters_as_the_optimizer_does(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool], grid: Grid
) -> None:
    """Against the owners that each rank of a real model names."""
    config = Ernie4_5_MoeConfig.preset("tiny", **settings)
    monkeypatch.setattr(process_group, "_grid", grid)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    owned = []
    for rank in range(4):
        monkeypatch.setenv("PADDLE_TRAINER_ID", str(rank))
        count = 16 // grid.expert
        here = range(rank % grid.expert * count, (rank % grid.expert + 1) * count)
        model = Ernie4_5_MoeForCausalLM(config, Placement(here, LocalDispatcher()))
        names = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
        owned.append(sum(int(names[name].size) for name in parallel.owned_names(names)))
    layout = Layout(grid.expert, grid.data, True, False)
    assert updated_by_rank(config, layout) == owned


@pytest.mark.parametrize("preset", ["tiny", "21b-a3b"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_critic_has_a_scalar_head(preset: str, tied: bool) -> None:
    config = Ernie4_5_MoeConfig.preset(preset, tie_word_embeddings=tied)
    # The embedding stays; the vocabulary's own head, if there is one, gives way to H + 1 numbers.
    once = Ernie4_5_MoeConfig.preset(preset, tie_word_embeddings=True).num_parameters()[0]
    assert critic_parameters(config).total == once + config.hidden_size + 1


# ---- activations ---------------------------------------------------------------------------------


def test_constants_are_those_of_the_code() -> None:
    """They are repeated because the model's modules load Paddle."""
    assert model_layout._BATCHED_LENGTH == activations.BATCHED_LENGTH
    assert model_layout._KEPT_LENGTH == activations.KEPT_LENGTH
    assert model_layout._KEPT_BLOCK == activations.KEPT_BLOCK
    assert model_layout._ALIGNMENT == activations.ALIGNMENT
    assert cross_entropy._CHUNK_ELEMENTS == activations.CHUNK_ELEMENTS
    assert kv_cache._GROWTH == memory._CACHE_GROWTH
    assert numpy_decoder._GROWTH == decoder.GROWTH
    assert numpy_decoder._CHUNK_TOKENS == decoder.CHUNK_TOKENS
    assert parallel_gradients.BUCKET_ELEMENTS == buckets.BUCKET_NUMBERS
    assert parallel_gradients.MAX_IN_FLIGHT == buckets.IN_FLIGHT


MEASURE = """
import json, sys
from tools.bench import plan
print(json.dumps(plan.measure(plan.Case(*json.loads(sys.argv[1])))))
"""


@pytest.mark.parametrize(
    ("seq_len", "rows", "documents", "recompute"),
    [
        (512, 1, 512, False),  # blocks of a longer document
        (512, 2, 64, False),  # short documents, scored as a whole
        (1280, 1, 1280, False),  # probabilities are not kept
        (1024, 1, 128, True),
        (512, 2, 128, {"parts": ["experts"]}),
        (1024, 1, 1024, {"parts": ["attention"], "layers": 3}),
        (1280, 1, 1280, {"chunk_tokens": 256}),
        (1024, 1, 128, {"parts": ["experts"], "chunk_tokens": 100}),
    ],
)
def test_the_peak_of_a_real_step(seq_len: int, rows: int, documents: int, recompute: Any) -> None:
    """Against Paddle's own count of the bytes of all tensors, at its highest, in a fresh process.

    What is left are temporaries inside operators, about 1 % of a step's memory.
    """
    case = json.dumps(["tiny", seq_len, rows, documents, recompute])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, case], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["tensors"], rel=0.02)


@pytest.mark.parametrize("prompt", [31, 32, 100])
def test_slots_grow_as_those_of_the_decoder(prompt: int) -> None:
    config = Ernie4_5_MoeConfig.preset("tiny")
    cache = numpy_decoder.DecoderCache(config, 1, prompt + 1, config.rope_theta)
    cache.lengths[:] = prompt
    for new in range(1, 200):  # the first token comes from the prompt, the last one stays outside
        assert decoder._slots(prompt, prompt + new) == cache.capacity
        cache.advance()


def test_activations_grow_with_tokens_and_recompute_keeps_a_layer() -> None:
    config = Ernie4_5_MoeConfig.preset("mini")
    batch, twice = MicroBatch(1, 2048, 2048), MicroBatch(2, 2048, 2048)
    keep = Activations(config, BF16, Layout(1, 1, False, False), True)
    again = Activations(config, BF16, Layout(1, 1, False, True), True)
    assert keep.kept(twice) == 2 * keep.kept(batch)
    inputs = config.num_hidden_layers * 2048 * config.hidden_size * 2
    layers = 7 * keep.layer(batch, True) + keep.layer(batch, False)
    assert keep.kept(batch) - again.kept(batch) == pytest.approx(layers - inputs)


@pytest.mark.parametrize(("parts", "layers"), [(("experts",), 8), (("attention",), 3)])
def test_a_part_that_is_run_again_keeps_its_input(parts: tuple[Part, ...], layers: int) -> None:
    """By hand, with T = 2048 tokens of `mini` in bfloat16 on a GPU; its first layer is dense."""
    config = Ernie4_5_MoeConfig.preset("mini")
    batch, tokens = MicroBatch(1, 2048, 2048), 2048
    again = RecomputeConfig(parts=parts, layers=layers)
    keep = Activations(config, BF16, Layout(1, 1, False, False), True)
    less = Activations(config, BF16, Layout(1, 1, False, again), True)
    norm = tokens * (256 * 6 + 4)
    attention = norm + tokens * (32 * (2 * 8 + 2 * 2) * 2 + 4 * 8)
    shared = 4 * tokens * 2 * 176 * 2
    router = tokens * (4 * 16 + 16 * 4 + 24 * 4 + 4 * 256)
    mixture = norm + shared + router + 4 * tokens * (256 + 1 + 5 * 176) * 2
    dense = norm + 4 * tokens * 768 * 2
    held = 7 * mixture + dense if parts == ("experts",) else 3 * attention
    assert keep.kept(batch) - less.kept(batch) == held - layers * tokens * 256 * 2


def test_the_first_layers_save_as_much_as_all_where_the_head_takes_most() -> None:
    """Layers go back from the last to the first, and what is made again stands alone.

    So a few first layers lower the peak by what they do not keep, and never raise it.
    """
    config = Ernie4_5_MoeConfig.preset("mini")
    batch = MicroBatch(1, 2048, 2048)
    peaks = []
    for layers in range(9):
        again = RecomputeConfig(parts=("experts",), layers=layers) if layers else False
        activations = Activations(config, FP32, Layout(1, 1, False, again), False)
        peaks.append(activations.peak(batch, "cross_entropy"))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] > peaks[4] > peaks[7]


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "use_bias": True}])
@pytest.mark.parametrize("grid", [Grid(4, 1, True), Grid(2, 2, True), Grid(1, 4, False)])
def test_gradients_on_their_way_are_those_of_real_buckets(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool], grid: Grid
) -> None:
    """Against the buckets of a model's own parameters, in the order in which they leave."""
    monkeypatch.setattr(parallel_gradients, "BUCKET_ELEMENTS", 4096)
    monkeypatch.setattr(buckets, "BUCKET_NUMBERS", 4096)
    monkeypatch.setattr(process_group, "_grid", grid)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    config = Ernie4_5_MoeConfig.preset("tiny", **settings)
    here = range(config.moe_num_experts // grid.expert)
    model = Ernie4_5_MoeForCausalLM(config, Placement(here, LocalDispatcher()))
    parameters = {n: p for n, p in model.named_parameters() if not p.stop_gradient}
    shared = parallel_gradients._shared_parameters(parameters)
    leaving = parallel_gradients._gradient_buckets(shared, None)
    layout = Layout(grid.expert, grid.data, grid.sharding, False)
    buckets._known.clear()
    planned = buckets.numbers_in_flight(config, layout)
    for layer, most in enumerate(planned):
        gone = [bucket for bucket in leaving if bucket.complete_after > layer]
        sizes = [sum(int(parameters[n].size) for n in bucket.names) for bucket in gone]
        flights = [
            sum(sizes[at : at + parallel_gradients.MAX_IN_FLIGHT]) for at in range(len(sizes))
        ]
        assert max(flights, default=0) <= most
        assert most <= max(4 * 4096, sum(sorted(sizes)[-4:]), 1.5 * max(flights, default=0))
    buckets._known.clear()
    assert planned == sorted(planned, reverse=True)
    assert buckets.numbers_in_flight(config, Layout(1, 1, False, False)) == [0] * len(planned)


def test_gradients_on_their_way_lift_the_peak_of_first_layers() -> None:
    """With the loss's peak out of the way: a layer's turn grows by the buckets beside it."""
    config = Ernie4_5_MoeConfig.preset("mini")
    alone = Activations(config, FP32, Layout(1, 1, False, True), False)
    among = Activations(config, FP32, Layout(1, 2, False, True), False)
    batch = MicroBatch(1, 8, 8)
    more = among.peak(batch, "cross_entropy") - alone.peak(batch, "cross_entropy")
    travelling = 4 * max(buckets.numbers_in_flight(config, among.layout))
    assert 0 < more <= travelling


def test_shared_experts_copy_their_input_where_rows_leave() -> None:
    """In float32 the router keeps the original; in bfloat16 nothing but the copy stays."""
    config = Ernie4_5_MoeConfig.preset("mini", moe_capacity_factor=None)
    without = Ernie4_5_MoeConfig.preset("mini", moe_num_shared_experts=0)
    tokens, batch = 1024, MicroBatch(1, 1024, 1024)
    for precision, copies in ((FP32, 1), (BF16, 0)):
        spread, here = (
            [Activations(c, precision, Layout(n, 1, False, False), True) for c in (config, without)]
            for n in (2, 1)
        )
        with_shared, no_shared = (
            a.layer(batch, True) - b.layer(batch, True) for a, b in zip(spread, here, strict=True)
        )
        assert with_shared - no_shared == copies * tokens * config.hidden_size * 4


def test_an_expert_group_has_a_fullest_rank(large: Ernie4_5_MoeConfig) -> None:
    """Rows per rank stay k per token, times the stated imbalance once experts are spread."""
    alone = Activations(large, BF16, Layout(1, 8, False, True), True)
    spread = Activations(large, BF16, Layout(8, 1, False, True), True)
    assert alone.routed_rows(1000) == 6000
    assert spread.routed_rows(1000) == 6000 * activations.LOAD_IMBALANCE


# ---- rollouts ------------------------------------------------------------------------------------


def test_the_cache_of_one_sequence(large: Ernie4_5_MoeConfig) -> None:
    """2 (keys, values) x 28 layers x 4 heads x 128 x 2 bytes = 57 344 bytes a token."""
    assert cache_bytes(large, 1, 8192, 2) == 57_344 * 8192
    assert cache_bytes(large, 3, 33, 2) == 57_344 * 3 * 64  # slots come in multiples of 32


def test_rollouts_hold_half_of_the_cache_more_while_it_grows(large: Ernie4_5_MoeConfig) -> None:
    rollout = Rollout(512, 8, 1024, 7168, 16)
    bytes_ = rollout_bytes(Activations(large, BF16, Layout(8, 1, True, True), True), rollout)
    logits = 2 * 16 * large.vocab_size * 4
    assert bytes_ == 1.5 * 57_344 * 8192 * 16 + logits
    assert rollout.on_rank(8) == 64
    assert rollout.at_once(64) == 8  # fewer sequences than a batch holds


def test_reference_and_critic_stand_beside_the_policy(large: Ernie4_5_MoeConfig) -> None:
    machine, layout = Machine(True, BF16), Layout(8, 1, True, True)
    batch = MicroBatch(1, 1024, 1024)
    alone = rank_memory(large, machine, layout, Job(batch, "logprobs"))
    both = rank_memory(large, machine, layout, Job(batch, "logprobs", True, True))
    assert both.reference == alone.weights
    trained = alone.weights + alone.gradients + alone.optimizer
    assert both.critic == pytest.approx(trained, rel=1e-4)  # a scalar head more
    assert both.peak == alone.peak + both.reference + both.critic


def test_sharded_gradients_come_and_go(large: Ernie4_5_MoeConfig) -> None:
    """Full ones stand in the backward pass, none in rollouts, and one model's at a time."""
    layout, batch = Layout(8, 1, True, True), MicroBatch(1, 1024, 1024)
    rollout = Rollout(512, 8, 1024, 7168, 64)
    job = Job(batch, "logprobs", True, True, rollout)
    stay = rank_memory(large, Machine(True, BF16), layout, job)
    go = rank_memory(large, Machine(True, BF16, shards_gradients=True), layout, job)
    gradients = 2 * count_parameters(large).on_rank(layout).total
    assert stay.critic - go.critic == pytest.approx(gradients, rel=1e-4)
    assert stay.gradients == gradients
    assert go.gradients == pytest.approx(gradients, rel=1e-4)  # a critic's value head more
    assert go.rollouts > go.activations + gradients
    assert stay.peak - go.peak == pytest.approx(2 * gradients, rel=1e-4)
    whole = Layout(8, 1, False, True)
    assert rank_memory(large, Machine(True, BF16, True), whole, job) == rank_memory(
        large, Machine(True, BF16), whole, job
    )


def test_sampling_on_a_cpu_copies_the_weights() -> None:
    """Not where experts are spread: there the model's own forward pass samples."""
    config, rollout = Ernie4_5_MoeConfig.preset("mini"), Rollout(4, 1, 32, 32, 4)
    bytes_ = rollout_bytes(Activations(config, FP32, Layout(1, 1, False, False), False), rollout)
    weights = 4 * count_parameters(config).total
    assert weights < bytes_ < 1.5 * weights
    spread = rollout_bytes(Activations(config, FP32, Layout(2, 1, False, False), False), rollout)
    assert spread < 0.5 * weights
