"""The memory that `plan` states: known figures, closed forms, and what a real step takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernie_train.losses import cross_entropy
from ernie_train.model import Ernie4_5_MoeConfig, kv_cache
from ernie_train.model import layout as model_layout
from ernie_train.parallel import RecomputeConfig
from ernie_train.parallel.recompute import Part
from ernie_train.plan import activations, memory
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

BF16 = Precision("bfloat16", "bfloat16")
FP32 = Precision("float32", "float32")
ROOT = Path(__file__).resolve().parent.parent


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
    precision = Precision("bfloat16", gradients)  # type: ignore[arg-type]
    parts = model_bytes(count_parameters(large), precision, Layout(8, 1, True, True))
    assert sum(parts) / GB == pytest.approx(expected_gb, abs=0.05)


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
    assert model_bytes(counts, BF16, layout) == (2e6 * held, 2e6 * held, 12e6 * updated)
    assert model_bytes(counts, FP32, layout) == (4e6 * held, 4e6 * held, 8e6 * updated)


def test_states_of_all_ranks_add_up_to_the_whole(large: Ernie4_5_MoeConfig) -> None:
    """Sharded, every parameter's state exists once in the whole job."""
    counts = count_parameters(large)
    for layout in layouts(large, 64):
        total = counts.updated_on_rank(layout) * layout.ranks
        if layout.sharding:
            assert total == pytest.approx(counts.total)
        else:
            assert total == counts.dense * 64 + counts.experts * layout.data


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


MEASURE = """
import json, sys
sys.path.insert(0, "tools")
import bench_plan
print(json.dumps(bench_plan.measure(bench_plan.Case(*json.loads(sys.argv[1])))))
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
