"""Operations and bytes sent, counted by hand."""

import pytest

from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute, RecomputeConfig
from ernie_train.parallel.recompute import PARTS
from ernie_train.plan.cost import mean_context, recomputed_flops, step_cost, token_flops
from ernie_train.plan.layout import Layout, count_parameters
from ernie_train.plan.workload import MicroBatch, Workload
from tests.plan.plans import BF16, RATES

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
    assert plain.sent["gradients"] == pytest.approx(4 * 2 * (dense + experts))
    assert plain.sent["weights"] == 0
    assert sharded.sent["gradients"] == pytest.approx(4 * (dense + experts))
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
