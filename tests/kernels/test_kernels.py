"""Native kernels and their plain twins beside the formula in float64, forward and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie_train import kernels
from ernie_train.losses import linear_cross_entropy
from ernie_train.model.attention import attention_block as fused_attention
from ernie_train.model.moe import LOCAL_PLACEMENT
from ernie_train.model.moe import moe_block as fused_moe
from ernie_train.model.rope import RopeTables
from ernie_train.model.transformer import DecoderLayer
from tests.kernels.cases import CASES, CONFIG, HIDDEN, LAYOUT, TOKENS, WIDTH, leaves, run


def with_hook(layer: DecoderLayer) -> None:
    layer.self_attn.q_proj.register_forward_post_hook(lambda *_: None)
    layer.mlp.gate.register_forward_post_hook(lambda *_: None)


def with_other_linear(layer: DecoderLayer) -> None:
    class Other(paddle.nn.Linear):
        pass

    layer.self_attn.v_proj = Other(HIDDEN, 12, bias_attr=False)
    layer.mlp.shared_experts.down_proj = Other(WIDTH, HIDDEN, bias_attr=False)


def with_bias(layer: DecoderLayer) -> None:
    layer.self_attn.k_proj = paddle.nn.Linear(HIDDEN, 12)
    layer.mlp.shared_experts.up_proj = paddle.nn.Linear(HIDDEN, WIDTH)


@pytest.mark.parametrize("change", [None, with_hook, with_other_linear, with_bias])
def test_a_block_is_fused_where_its_modules_are_ordinary(change: Callable | None) -> None:
    layer = DecoderLayer(CONFIG, 1, LOCAL_PLACEMENT)
    if change is not None:
        change(layer)
    x = paddle.randn([TOKENS, HIDDEN])
    rope = RopeTables.build(paddle.arange(TOKENS), 1e4, 6)
    tables = SimpleNamespace(rope=rope, layout=LAYOUT)
    made = (
        fused_attention(layer.input_layernorm, layer.self_attn, x, tables),
        fused_moe(layer.post_attention_layernorm, layer.mlp, x),
    )
    assert [m is not None for m in made] == [change is None] * 2
    with kernels.plain_operators():
        exact = layer.attn_block(x, tables, None), layer.mlp_block(x)[0]
    ours = layer.attn_block(x, tables, None), layer.mlp_block(x)[0]
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5)


def test_a_capacity_other_ranks_and_replayed_experts_are_not_fused() -> None:
    x = paddle.randn([TOKENS, HIDDEN])
    layer = DecoderLayer(CONFIG, 1, LOCAL_PLACEMENT)
    elsewhere = DecoderLayer(CONFIG, 1, LOCAL_PLACEMENT)
    elsewhere.mlp.dispatcher = SimpleNamespace()
    limited = DecoderLayer(CONFIG.with_overrides({"moe_capacity_factor": 1.0}), 1, LOCAL_PLACEMENT)
    for made in (elsewhere, limited):
        assert fused_moe(made.post_attention_layernorm, made.mlp, x) is None
    replayed = paddle.full([TOKENS, 2], 1, "int64")
    replayed[:, 1] = 3
    _, (_, ids, _) = layer.mlp_block(x, replayed)
    assert np.array_equal(ids.numpy(), replayed.numpy())


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(kernels, "usable", lambda *tensors: False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["native", "plain"])
def test_both_ways_equal_the_formula_in_float64(name: str, way: str, plain, monkeypatch) -> None:
    function, formula, shapes = CASES[name]
    arrays = leaves(shapes)
    if way == "plain":
        plain()
    else:
        assert kernels.usable(paddle.zeros([1])), kernels.describe_kernels()
    monkeypatch.setattr(sys.modules["ernie_train.kernels.rows"], "LEAST_ROWS", 32)
    monkeypatch.setattr(sys.modules["ernie_train.kernels.rows"], "CHUNK_ELEMENTS", 1)
    for ours, exact in zip(
        run(function, arrays, "float32"), run(formula, arrays, "float64"), strict=True
    ):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=3e-6 * np.abs(exact).max())


@pytest.mark.parametrize("name", CASES)
def test_the_same_input_gives_the_same_bits_and_a_frozen_one_no_gradient(name: str) -> None:
    function, _, shapes = CASES[name]
    arrays = leaves(shapes)
    first = run(function, arrays, "float32")
    for again in (run(function, arrays, "float32"), run(function, arrays, "float32")):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for frozen in range(len(shapes)):
        if name == "dispatch" or len(shapes) == 1:
            continue
        got = run(function, arrays, "float32", frozen)
        assert got.pop(frozen + 1) is None
        kept = [x for n, x in enumerate(first) if n != frozen + 1]
        assert all(np.array_equal(a, b) for a, b in zip(got, kept, strict=True))


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"mlp"}))
@pytest.mark.parametrize("way", ["native", "plain"])
def test_second_derivatives_are_refused_not_missing(name: str, way: str, plain) -> None:
    if way == "plain":
        plain()
    function, _, shapes = CASES[name]
    inputs = [paddle.to_tensor(a, stop_gradient=False) for a in leaves(shapes)]
    output = function(*inputs).sum()
    # Paddle wraps what a backward pass raises.
    with pytest.raises(OSError, match="RuntimeError: this backward pass has no derivative"):
        paddle.grad(output, inputs, create_graph=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(name: str, value: float) -> None:
    function, _, shapes = CASES[name]
    arrays = leaves(shapes)
    arrays[0][3, 5] = value
    output, *grads = run(function, arrays, "float32")
    assert not np.isfinite(output).all() or not all(np.isfinite(g).all() for g in grads)


def test_extreme_values_stay_finite() -> None:
    x = paddle.to_tensor(np.array([[-3e38, -200.0, -88.0, 0.0, 88.0, 200.0, 3e38]], np.float32))
    ones = paddle.ones_like(x)
    silu = kernels.swiglu(x, ones).numpy()
    np.testing.assert_allclose(silu[0, 3:], [0, 88, 200, 3e38], rtol=1e-6)
    assert np.abs(silu[0, 1:3]).max() < 1e-34 and abs(silu[0, 0]) < 10
    assert np.isfinite(kernels.swiglu_backward(x, ones, ones)[0].numpy()).all()


def test_strided_views_are_read_as_what_they_show() -> None:
    wide = paddle.to_tensor(np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32))
    part = wide[:, 4:10]
    assert not part.is_contiguous()
    y, _ = kernels.rms_norm(part, paddle.ones([6]), 1e-5)
    exact, _ = kernels.rms_norm(part.contiguous(), paddle.ones([6]), 1e-5)
    assert np.array_equal(y.numpy(), exact.numpy())


def test_results_lie_where_the_tensors_do_whatever_the_default_device(monkeypatch) -> None:
    """A machine with a GPU computes on it by default; a tensor on its processor stays there."""
    call = sys.modules["ernie_train.kernels.call"]
    places, empty = [], call._C_ops.empty

    def noted(shape: object, dtype: object, place: paddle.CPUPlace) -> Tensor:
        places.append(place)
        return empty(shape, dtype, place)

    monkeypatch.setattr(call, "_C_ops", SimpleNamespace(empty=noted))
    kernels.swiglu(paddle.ones([2, 3]), paddle.ones([2, 3]))
    assert [type(place) for place in places] == [paddle.CPUPlace]


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    hidden, weight = paddle.ones([2, 3]), paddle.ones([5, 3])
    for label in (-1, 5):
        with pytest.raises(ValueError, match=f"label {label} of token 1 is outside 5"):
            labels = paddle.to_tensor([0, label])
            linear_cross_entropy(hidden, weight, None, labels, paddle.ones([2]))
