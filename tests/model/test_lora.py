"""LoRA and DoRA pairs and partial training, with closed forms in float64 as the referee."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train import kernels, parallel
from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError
from ernie_train.losses import linear_cross_entropy
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.lora import Adapter, LoraConfig, merged_weight
from ernie_train.model.numpy_decoder import NumpyDecoder
from ernie_train.model.partial import (
    adapter_off,
    begin_partial_training,
    end_partial_training,
    select,
    set_dropout_key,
    trained_parameters,
    trained_sizes,
)
from ernie_train.train.optimizer import decays
from ernie_train.weights.layout import parameter_shapes
from tests.small_models import VARIANTS, assert_same, make_config, make_model, state

ALL = ["all-linear", "embed_tokens", "lm_head"]
NOWHERE = {"path": "nowhere", "sha256": ""}


def adapted_model(
    variant: str = "untied", *, random_pairs: bool = True, **settings: Any
) -> Ernie4_5_MoeForCausalLM:
    """A small model in which everything that can has a pair, of random numbers."""
    model = make_model(**VARIANTS[variant])
    targets = ALL if not model.config.tie_word_embeddings else ALL[:1]
    lora = LoraConfig(**{"rank": 3, "alpha": 4.5, "targets": targets, **settings})
    selection = select(parameter_shapes(model.config), lora, [], [])
    begin_partial_training(model, selection, lora, NOWHERE, seed=3)
    random = np.random.default_rng(1)
    for matrix in trained_parameters(model).values() if random_pairs else ():
        matrix.set_value(random.normal(0, 0.2, matrix.shape).astype(np.float32))
    return model


def adapter_of(model: Ernie4_5_MoeForCausalLM) -> Adapter:
    adapter: Adapter = model.partial.adapter
    return adapter


def tokens(seed: int = 0) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).integers(0, 96, (2, 9)))


def loss(model: Ernie4_5_MoeForCausalLM, ids: paddle.Tensor) -> paddle.Tensor:
    hidden = model.model(ids).hidden
    labels = paddle.roll(ids.reshape([-1]), -1)
    total, _ = linear_cross_entropy(hidden, *model.head(), labels, paddle.ones([len(labels)]))
    return total


def as_float64(tensor: paddle.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy().astype("f8")
    return array


def sums(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    """W + scale * A B of every adapted parameter, [..,in,out], in float64."""
    named = dict(model.named_parameters())
    found = {}
    for name, pair in adapter_of(model).pairs.items():
        weight = as_float64(named[name])
        weight = weight.T if name == "lm_head.weight" else weight
        found[name] = weight + pair.adapter.config.scale * as_float64(pair.a) @ as_float64(pair.b)
    return found


def lengths(pair: Any, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The magnitudes and the norms [..,1,out] of the columns of V; ones without DoRA."""
    if pair.lengths is None:
        return np.ones(1), np.ones(1)
    magnitude = as_float64(pair.lengths.magnitude)[..., None, :]
    return magnitude, np.linalg.norm(whole, axis=-2, keepdims=True)


def merge(model: Ernie4_5_MoeForCausalLM) -> None:
    """Merges every pair into its weight, in float64, and drops the pairs."""
    named, adapter = dict(model.named_parameters()), adapter_of(model)
    for name, whole in sums(model).items():
        magnitude, norm = lengths(adapter.pairs[name], whole)
        merged = magnitude * whole / norm
        merged = merged.T if name == "lm_head.weight" else merged
        named[name].set_value(merged.astype(np.float32))
    end_partial_training(model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_with_pairs_computes_what_the_merged_one_does(variant: str, dora: bool) -> None:
    model, ids = adapted_model(variant, dora=dora), tokens()
    before = state(model)
    with adapter_off(model):
        base = model(ids).logits.numpy()
    found = model(ids).logits.numpy()
    prompts, decoder = ids.numpy().tolist(), NumpyDecoder(model)
    cache = decoder.new_cache(len(prompts), ids.shape[1])
    sampled, _ = decoder.prefill(prompts, cache, np.arange(len(prompts)))
    assert len(trained_parameters(model)) == (3 if dora else 2) * len(adapter_of(model).pairs)
    assert_same(state(model), before)  # the pairs are none of the model's parameters
    merge(model)
    expected = model(ids).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(sampled, expected[:, -1], atol=2e-5)
    assert np.abs(expected - base).max() > 0.1
    fresh = make_model(**VARIANTS[variant])
    np.testing.assert_array_equal(base, fresh(ids).logits.numpy())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("variant", ["moe", "untied", "dense-bias"])
def test_gradients_of_a_and_b_are_those_of_the_weight_times_the_other(
    variant: str, dora: bool
) -> None:
    """d loss/dA = s dV B^T and dB = s A^T dV (arXiv:2106.09685), dV that of the merged weight.

    With DoRA dV is m / |V| times that, |V| taken for a constant, and dm the sum over the inputs of
    the merged weight's gradient times V / |V| (arXiv:2402.09353, section 4.3).
    """
    model, ids = adapted_model(variant, dora=dora), tokens()
    loss(model, ids).backward()
    pairs, whole = adapter_of(model).pairs, sums(model)
    grads = {n: [p.a.grad.numpy(), p.b.grad.numpy()] for n, p in pairs.items()}
    for name, pair in pairs.items() if dora else ():
        grads[name].append(pair.lengths.magnitude.grad.numpy())
    assert all(p.grad is None for p in model.parameters())  # the base takes none
    merge(model)
    loss(model, ids).backward()
    named = dict(model.named_parameters())
    for name, pair in pairs.items():
        grad = as_float64(named[name].grad)
        grad = grad.T if name == "lm_head.weight" else grad
        magnitude, norm = lengths(pair, whole[name])
        of_sum = grad * magnitude / norm
        expected = [
            1.5 * of_sum @ as_float64(pair.b).swapaxes(-1, -2),
            1.5 * as_float64(pair.a).swapaxes(-1, -2) @ of_sum,
        ] + ([(grad * whole[name] / norm).sum(-2)] if dora else [])
        for found, wanted in zip(grads[name], expected, strict=True):
            scale = max(np.abs(wanted).max(), 1)
            np.testing.assert_allclose(found, wanted, atol=2e-5 * scale, err_msg=name)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert LoraConfig(rank=16, alpha=8).scale == 0.5
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale == 2.0
    assert LoraConfig(rank=16).scale == 2.0  # alpha is twice the rank


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(dora: bool) -> None:
    model, ids = adapted_model(random_pairs=False, dora=dora), tokens()
    with adapter_off(model):
        base = model(ids).logits.numpy()
    np.testing.assert_allclose(model(ids).logits.numpy(), base, atol=2e-6)
    again = adapter_of(adapted_model(random_pairs=False, dora=dora)).parameters()
    for name, matrix in adapter_of(model).parameters().items():
        np.testing.assert_array_equal(matrix.numpy(), again[name].numpy(), err_msg=name)
    a = adapter_of(model).pairs["model.layers.0.self_attn.q_proj.weight"].a.numpy()
    assert 0.9 < np.abs(a).max() * np.sqrt(32) <= 1  # uniform within 1 / sqrt(in), as PEFT's


@pytest.mark.parametrize("dora", [False, True])
def test_recomputation_changes_no_gradient_and_dropout_is_drawn_by_step_and_place(
    dora: bool,
) -> None:
    """Also where all below a layer is frozen, so that Paddle's `recompute` would give none."""
    ids = tokens()

    def gradients(recompute: Any, *key: int) -> dict[str, np.ndarray]:
        model = adapted_model("moe", dropout=0.3, dora=dora)
        parallel.enable_recompute(model, recompute)
        model.train()
        set_dropout_key(model, *key)
        loss(model, ids).backward()
        return {n: p.grad.numpy() for n, p in trained_parameters(model).items()}

    plain = gradients(False, 5, 0)
    assert_same(gradients(False, 5, 0), plain)
    assert_same(gradients(True, 5, 0), plain)
    other = gradients(False, 6, 0)
    assert not any(np.array_equal(other[name], plain[name]) for name in plain if "down" not in name)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_keeps_the_mean_and_rests_in_evaluation(dora: bool) -> None:
    model = adapted_model("dense", dropout=0.5, dora=dora)
    layer = model.model.layers[0].self_attn.q_proj
    x = paddle.ones([1, 32])
    model.eval()
    expected = layer(x).numpy()
    np.testing.assert_allclose(expected, (x.numpy() @ merged_weight(layer)), atol=1e-5)
    model.train()
    drawn = []
    for step in range(400):
        set_dropout_key(model, step)
        drawn.append(layer(x).numpy())
    spread = np.std(drawn, 0) / np.sqrt(len(drawn))
    assert (np.abs(np.mean(drawn, 0) - expected) < 5 * spread + 1e-6).all()


def test_with_dropout_magnitudes_too_act_on_what_the_pair_sees() -> None:
    """As in peft: y = x W + (m / |V| - 1) x' W + m / |V| s x' A B, x' with inputs dropped."""
    model = adapted_model("dense", dropout=0.5, dora=True)
    layer = model.model.layers[0].self_attn.q_proj
    model.train()
    x, weight = paddle.eye(32), layer.weight.numpy()  # a row a dropped input: x' W has its rows
    set_dropout_key(model, 1)
    found = layer(x).numpy()
    set_dropout_key(model, 1)
    seen = layer.pair.drop(x).numpy()
    assert set(np.diag(seen)) == {0, 2}
    whole = sums(model)["model.layers.0.self_attn.q_proj.weight"]
    magnitude, norm = lengths(layer.pair, whole)
    low = 1.5 * as_float64(layer.pair.a) @ as_float64(layer.pair.b)
    ratio = magnitude / norm
    expected = weight + (ratio - 1) * (seen @ weight) + ratio * (seen @ low)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_magnitudes_of_a_bfloat16_model_are_exact_and_do_not_decay() -> None:
    model = parallel.new_model(make_config(), "bfloat16")
    lora = LoraConfig(rank=3, dora=True)
    selection = select(parameter_shapes(model.config), lora, [], [])
    begin_partial_training(model, selection, lora, NOWHERE, seed=3)
    pair = adapter_of(model).pairs["model.layers.1.mlp.experts.up_proj"]
    stack = dict(model.named_parameters())["model.layers.1.mlp.experts.up_proj"]
    expected = np.linalg.norm(as_float64(stack.astype("float32")), axis=-2)
    np.testing.assert_allclose(pair.lengths.magnitude.numpy(), expected, rtol=1e-6)
    assert pair.lengths.magnitude.dtype == pair.lengths.squares.dtype == paddle.float32
    decayed = {n for n, p in trained_parameters(model).items() if decays(n, p)}
    assert decayed == {n for n in trained_parameters(model) if not n.endswith("magnitude_vector")}


def test_dora_refuses_columns_without_a_direction() -> None:
    """Their share m / |V| would be 0 / 0, and the first loss not a number."""
    model = make_model()
    stack = model.model.layers[1].mlp.experts.down_proj
    stack.set_value(np.concatenate([stack.numpy()[:3], np.zeros((1, *stack.shape[1:]), "f4")]))
    lora = LoraConfig(rank=3, dora=True)
    selection = select(parameter_shapes(model.config), lora, [], [])
    with pytest.raises(ConfigError, match=r"lora.dora: 32 of the 128 columns of .*down_proj are"):
        begin_partial_training(model, selection, lora, NOWHERE, seed=3)


def test_native_kernels_and_plain_operations_agree_on_dora(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, found = tokens(), []
    for usable in (kernels.usable, lambda *tensors: False):
        monkeypatch.setattr(kernels, "usable", usable)
        model = adapted_model("moe", dora=True)
        loss(model, ids).backward()
        found.append({n: p.grad.numpy() for n, p in trained_parameters(model).items()})
    for name, grad in found[0].items():
        np.testing.assert_allclose(grad, found[1][name], atol=1e-4, err_msg=name)


def test_frozen_experts_and_frozen_neighbours_take_no_gradient_and_change_none() -> None:
    """Gradients of what trains are those of a model in which everything does."""
    ids, whole = tokens(), make_model()
    loss(whole, ids).backward()
    expected = {n: p.grad.numpy() for n, p in whole.named_parameters() if p.grad is not None}
    for keys in ({"freeze": ["experts.*.up_proj"]}, {"freeze": ["self_attn"]}, {"train": ["mlp"]}):
        model = make_model()
        shapes = parameter_shapes(model.config)
        selection = select(shapes, None, keys.get("train", []), keys.get("freeze", []))
        begin_partial_training(model, selection, None, NOWHERE, seed=0)
        loss(model, ids).backward()
        found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        assert set(found) == set(selection.whole) < set(expected)
        for name, grad in found.items():
            np.testing.assert_allclose(grad, expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["q_proj"], 3), (["self_attn"], 12), (["layers.0"], 9), (["*norm*"], 7), (["norm"], 1),
        (["embed_tokens"], 1), (["mlp.gate"], 2), (["experts"], 6), (["shared_experts"], 6),
        (["experts.*.up_proj"], 2), (["model.layers.[12].self_attn.q_proj.weight"], 2),
        ([".*q_proj.*"], 3), (["q_proj", "layers.0.self_attn"], 6),
    ],
)  # fmt: skip
def test_patterns_match_whole_parts_of_names(patterns: list[str], count: int) -> None:
    shapes = parameter_shapes(make_config())
    assert len(select(shapes, None, patterns, []).whole) == count
    frozen = select(shapes, None, [], patterns).whole
    assert len(frozen) == len([n for n in shapes if "correction_bias" not in n]) - count


def test_lora_with_train_and_freeze() -> None:
    shapes = parameter_shapes(make_config())
    lora = LoraConfig(rank=2, targets="self_attn")
    selection = select(shapes, lora, ["norm", "mlp.gate"], ["layers.2"])
    assert len(selection.adapted) == 8
    assert selection.whole == ("model.layers.1.mlp.gate.weight", "model.norm.weight")
    assert selection.trains_routers
    sizes = trained_sizes(shapes, selection, lora)
    assert sizes["model.layers.0.self_attn.k_proj.lora_B"] == 2 * 16
    assert sum(sizes.values()) == 2 * 2 * (4 * 32 + 2 * 32 + 2 * 16) + 32 * 4 + 32
    more = trained_sizes(shapes, selection, LoraConfig(rank=2, targets="self_attn", dora=True))
    assert sum(more.values()) - sum(sizes.values()) == 2 * (2 * 32 + 2 * 16)


def test_the_router_takes_no_pair_by_a_wider_pattern() -> None:
    selection = select(parameter_shapes(make_config()), LoraConfig(rank=2, targets="mlp"), [], [])
    assert not selection.whole
    assert not [name for name in selection.adapted if ".gate." in name]


@pytest.mark.parametrize("name", ["lora_alpha", "target_modules", "use_rslora", "lora_r"])
def test_keys_of_other_kits_are_told_ours(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is called (alpha|targets|rslora|rank)"):
        parse_config(LoraConfig, {"rank": 4, name: 1}, "recipe")
