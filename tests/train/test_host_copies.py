"""Copies of a step from the device to the host, each of which waits for a GPU: few, same bits."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from ernie_train.generate.paddle_decoder import PaddleDecoder
from ernie_train.losses import unbiased_expert_ids
from ernie_train.model import Ernie4_5_MoeForCausalLM, RouterStats
from ernie_train.model.moe import MoE
from ernie_train.model.token_dispatcher import Placement
from ernie_train.parallel import ExpertDispatcher, expert
from ernie_train.train.moe_balance import RouterStatsAccumulator
from ernie_train.train.moe_health import RoutingProbe
from ernie_train.train.optimizer import OptimConfig, Optimizer
from tests.parallel.test_overlap import LateCollectives
from tests.train.test_trainer import CONFIG, PackedLoss, new_trainer, rows

LAYERS, EXPERTS, TOP_K = 5, 6, 2


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """The sizes of the tensors that are copied to the host."""
    sizes: list[int] = []
    original = paddle.Tensor.numpy

    def counted(self, *arguments):
        sizes.append(self.size)
        return original(self, *arguments)

    monkeypatch.setattr(paddle.Tensor, "numpy", counted)
    return sizes


def router_stats(seed: int) -> list[RouterStats]:
    made = []
    for layer in range(LAYERS):
        rng = np.random.default_rng([seed, layer])
        logits = paddle.to_tensor(rng.normal(size=(37, EXPERTS)).astype(np.float32))
        probs = paddle.nn.functional.softmax(logits)
        ids = unbiased_expert_ids(probs, TOP_K)
        made.append(RouterStats(layer, logits, probs, ids, dropped=layer))
    return made


def test_statistics_of_all_layers_are_one_copy_with_the_bits_of_one_after_another(
    copies, monkeypatch
):
    """And one count, which copies the smallest and the largest number out of sight."""
    counted, bincount = [], paddle.bincount
    monkeypatch.setattr(
        paddle, "bincount", lambda x, **how: counted.append(x) or bincount(x, **how)
    )
    load = RouterStatsAccumulator(range(LAYERS), EXPERTS)
    counts, entropy = np.zeros((LAYERS, EXPERTS)), np.zeros(LAYERS)
    for seed in (1, 2):
        stats = router_stats(seed)
        copies.clear()
        counted.clear()
        load.add(stats)
        assert len(counted) == 1
        assert copies == [LAYERS * (EXPERTS + 1)]
        for at, one in enumerate(stats):
            counts[at] += np.bincount(one.expert_ids.numpy().reshape(-1), minlength=EXPERTS)
            probs = one.router_probs
            entropy[at] -= float((probs * paddle.log(paddle.clip(probs, 1e-30))).sum())
    assert load.tokens_per_expert.tobytes() == counts.tobytes()
    assert load.entropy.tobytes() == entropy.tobytes()
    assert load.tokens.tolist() == [74.0] * LAYERS
    assert load.dropped.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    copies.clear()
    load.add([])
    assert copies == []


def test_experts_of_all_layers_are_one_copy_a_step_of_decoding_and_of_a_probe(copies):
    layers = 3
    deeper = {"num_hidden_layers": layers + 1, "moe_layer_end_index": layers}
    model = Ernie4_5_MoeForCausalLM(CONFIG.with_overrides(deeper))
    decoder = PaddleDecoder(model)
    with paddle.no_grad():
        cache = decoder.new_cache(2, 3)
        _, experts = decoder.prefill([[1, 2], [3, 4]], cache, np.arange(2))
        assert len(experts) == layers and experts[0].shape == (2, CONFIG.moe_k)
        copies.clear()
        decoder(np.array([5, 6]), cache)
    assert sorted(copies) == sorted([2 * CONFIG.vocab_size, layers * 2 * CONFIG.moe_k])
    batch = rows()
    copies.clear()
    RoutingProbe.take(model, batch, 8)
    routed = layers * 8 * CONFIG.moe_k
    assert copies.count(routed) == 1


@pytest.mark.parametrize(("capacity", "selections"), [(None, 0), (0.5, 1)])
def test_a_layer_with_experts_on_other_ranks_copies_the_counts_of_all_and_nothing_else(
    copies, monkeypatch, capacity, selections
):
    """Not its own before it exchanges them. A limit adds one wait, for the number of rows left."""
    collectives, selected = LateCollectives(), []
    monkeypatch.setattr(expert, "get_collectives", lambda: collectives)
    select = paddle.masked_select
    monkeypatch.setattr(paddle, "masked_select", lambda *x: selected.append(1) or select(*x))
    for name in ("item", "__bool__", "__float__", "__index__", "__int__"):
        monkeypatch.delattr(paddle.Tensor, name)
    config = CONFIG.with_overrides({"moe_capacity_factor": capacity})
    layer = MoE(config, Placement(None, ExpertDispatcher()))
    x = paddle.randn([13, config.hidden_size])
    x.stop_gradient = False
    copies.clear()
    layer(x)[0].sum().backward()
    assert copies == [config.moe_num_experts + 1], "with the signals of `Lockstep`"
    assert len(selected) == selections


def test_the_gradient_norm_is_a_copy_for_dense_and_one_for_expert_parameters(copies):
    trainer = new_trainer()
    PackedLoss("tokens")(trainer.model, rows()).terms[0].sum.backward()
    parameters = trainer.optimizer.parameters.values()
    squares = []
    for parameter in parameters:
        flat = parameter.grad.reshape([-1])
        squares.append(float(paddle.dot(flat, flat)))
    copies.clear()
    assert trainer.optimizer.gradient_norm() == math.sqrt(math.fsum(squares))
    assert len(copies) == 2 and sum(copies) == len(squares)
    trainer.optimizer.clear_gradients()
    bare = Optimizer(paddle.nn.Linear(2, 2), OptimConfig(lr=1e-3))
    assert bare.gradient_norm() == 0.0


def test_copies_of_a_step_do_not_grow_with_parameters_but_with_layers_alone(copies):
    trainer = new_trainer()
    copies.clear()
    trainer.train_step([rows(), rows(seed=1)], PackedLoss("tokens"), 10)
    moe_layers = sum(CONFIG.is_moe_layer(at) for at in range(CONFIG.num_hidden_layers))
    # A micro-batch: the experts' counts of each MoE layer, statistics, loss and its metric. A step:
    # the gradient norm of dense and of expert parameters.
    assert len(copies) <= 2 * (moe_layers + 3) + 2, copies
