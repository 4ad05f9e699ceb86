"""Native kernels and their plain twins beside the formula in float64, forward and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from numba.core.dispatcher import Dispatcher
from paddle import Tensor

from ernie_train import kernels
from ernie_train.core.errors import UserError
from ernie_train.kernels import compiled, compiled_steps, loading
from ernie_train.losses import linear_cross_entropy, token_logprobs
from ernie_train.model.attention import attention_block as fused_attention
from ernie_train.model.attention import document_attention
from ernie_train.model.batch_layout import AttentionLayout, Document
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.layers import MLP, RMSNorm
from ernie_train.model.moe import LOCAL_PLACEMENT, Experts
from ernie_train.model.moe import moe_block as fused_moe
from ernie_train.model.rope import RopeTables
from ernie_train.model.token_dispatcher import LocalDispatcher, make_routing
from ernie_train.model.transformer import DecoderLayer
from ernie_train.run.pipeline import change_of_kernels

TOKENS, HIDDEN, WIDTH, VOCAB = 150, 24, 12, 37
PROMPT = Document(70, 20)
# A document beyond a block of queries, a short one, a prompt with two completions, one token.
DOCUMENTS = [Document(0, 67), Document(67, 3), PROMPT, Document(90, 30, PROMPT),
             Document(120, 29, PROMPT), Document(149, 1)]  # fmt: skip
LAYOUT = AttentionLayout(DOCUMENTS, TOKENS, 4, 2)
COUNTS = [40, 0, 85, 25]  # an expert without rows
CONFIG = Ernie4_5_MoeConfig(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, moe_num_experts=4, moe_intermediate_size=WIDTH,
    moe_k=2, moe_layer_start_index=1, moe_num_shared_experts=1,
)  # fmt: skip
LABELS = np.random.default_rng(2).integers(0, VOCAB, TOKENS)
CHOSEN = np.random.default_rng(3).integers(0, 4, (TOKENS, 2))


def with_parameters(layer: paddle.nn.Layer, *parameters: Tensor) -> paddle.nn.Layer:
    """The layer under other parameters, through which gradients flow, in their order."""
    owners = [(sub, name) for sub in layer.sublayers(include_self=True) for name in sub._parameters]
    named = [(sub, name) for sub, name in owners if sub._parameters[name] is not None]
    for (sub, name), parameter in zip(named, parameters, strict=True):
        del sub._parameters[name]
        object.__setattr__(sub, name, parameter)
    return layer


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return with_parameters(RMSNorm(HIDDEN, 1e-5), weight)(x)


def rms_norm_64(x: Tensor, weight: Tensor) -> Tensor:
    return x / paddle.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def rope(x: Tensor) -> Tensor:
    table = RopeTables.build(paddle.arange(TOKENS), 1e4, 6)
    return table.rotate(x.reshape([TOKENS * 4, 6]))


def rope_64(x: Tensor) -> Tensor:
    heads = x.shape[-1] // 6
    angle = paddle.arange(TOKENS, dtype="float64").unsqueeze(1) * 1e4 ** (
        -paddle.arange(0, 6, 2, dtype="float64") / 6
    )
    cos, sin = (f(angle).unsqueeze(1) for f in (paddle.cos, paddle.sin))
    pairs = x.reshape([TOKENS, heads, 3, 2])
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape([TOKENS * heads, 6])


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return with_parameters(MLP(CONFIG, WIDTH), gate, up, down)(x)


def mlp_64(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return paddle.matmul(F.silu(x @ gate) * (x @ up), down)


def experts(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    layer = with_parameters(Experts(CONFIG, range(4)), gate, up, down)
    return layer(x, weights, COUNTS)


def experts_64(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    parts = zip(x.split(COUNTS_OR_NONE), weights.split(COUNTS_OR_NONE), (0, 2, 3), strict=True)
    return paddle.concat([w * mlp_64(rows, gate[e], up[e], down[e]) for rows, w, e in parts])


COUNTS_OR_NONE = [count for count in COUNTS if count]


def dispatch(x: Tensor, weights: Tensor) -> Tensor:
    dispatcher = LocalDispatcher()
    routing = make_routing(paddle.to_tensor(CHOSEN), 4, 60)  # some rows are dropped
    assert routing.dropped
    arrived = dispatcher.dispatch_wait(dispatcher.dispatch_start(x, weights, routing), None)
    return dispatcher.combine(arrived.rows * arrived.rows * arrived.weights, arrived)


def dispatch_64(x: Tensor, weights: Tensor) -> Tensor:
    kept, counts = np.zeros((TOKENS, 2)), [0] * 4
    for choice in range(2):
        for token in range(TOKENS):
            expert = CHOSEN[token, choice]
            kept[token, choice] = counts[expert] < 60
            counts[expert] += 1
    return x * x * (weights * paddle.to_tensor(kept)).sum(-1, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return document_attention(*(x.reshape([-1, 6]) for x in (q, k, v)), LAYOUT)


def attention_64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape([TOKENS, -1, 6]).transpose([1, 0, 2]) for x in (q, k, v))
    k, v = (x.repeat_interleave(2, axis=0) for x in (k, v))
    allowed = np.zeros((TOKENS, TOKENS), bool)
    for document in DOCUMENTS:
        own = slice(document.start, document.start + document.length)
        allowed[own, own] = np.tril(np.ones((document.length, document.length), bool))
        if (before := document.continues) is not None:
            allowed[own, before.start : before.start + before.length] = True
    scores = q @ k.transpose([0, 2, 1]) / 6**0.5 + paddle.to_tensor(np.where(allowed, 0, -1e300))
    return (F.softmax(scores) @ v).transpose([1, 0, 2]).reshape([-1, 6])


def head(hidden: Tensor, weight: Tensor) -> Tensor:
    weights = paddle.linspace(0, 1, TOKENS)
    return linear_cross_entropy(hidden, weight, None, paddle.to_tensor(LABELS), weights)[0]


def head_64(hidden: Tensor, weight: Tensor) -> Tensor:
    labels = paddle.to_tensor(LABELS)
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return (losses.reshape([-1]) * paddle.linspace(0, 1, TOKENS, dtype="float64")).sum()


def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logprobs and entropies, whose gradients come back together."""
    pair = token_logprobs(
        hidden, weight, None, paddle.to_tensor(LABELS), temperature=0.7, with_entropy=True
    )
    return paddle.stack(pair)


def logprobs_64(hidden: Tensor, weight: Tensor) -> Tensor:
    rows = F.log_softmax(hidden @ weight.T / 0.7)
    chosen = paddle.take_along_axis(rows, paddle.to_tensor(LABELS).unsqueeze(1), 1).squeeze(1)
    return paddle.stack([chosen, -(rows.exp() * rows).sum(-1)])


def logprobs_alone(hidden: Tensor, weight: Tensor) -> Tensor:
    """Without entropies: probabilities are kept, not computed again."""
    return token_logprobs(hidden, weight, None, paddle.to_tensor(LABELS), temperature=0.7)[0]


def logprobs_alone_64(hidden: Tensor, weight: Tensor) -> Tensor:
    return logprobs_64(hidden, weight)[0]


def attention_block(x: Tensor, norm: Tensor, *projections: Tensor) -> Tensor:
    layer = DecoderLayer(CONFIG, 0, LOCAL_PLACEMENT)
    with_parameters(layer.input_layernorm, norm)
    with_parameters(layer.self_attn, *(0.3 * w for w in projections))
    rope = RopeTables.build(paddle.arange(TOKENS), 1e4, 6)
    return layer.attn_block(x, SimpleNamespace(rope=rope, layout=LAYOUT), None)


def attention_block_64(x: Tensor, norm: Tensor, *projections: Tensor) -> Tensor:
    h = rms_norm_64(x, norm)
    q, k, v, o = (0.3 * w for w in projections)  # scores of moderate size
    turned = (rope_64(h @ w).reshape([TOKENS, -1]) for w in (q, k))
    return x + attention_64(*turned, h @ v).reshape([TOKENS, HIDDEN]) @ o


def mlp_block(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
    layer = DecoderLayer(CONFIG, 0, LOCAL_PLACEMENT)
    with_parameters(layer.post_attention_layernorm, norm)
    with_parameters(layer.mlp, *weights)
    return layer.mlp_block(x)[0]


def mlp_block_64(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
    return x + mlp_64(rms_norm_64(x, norm), *weights)


def moe_block(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
    """The output with a share of the router's logits, as balance losses read them."""
    layer = DecoderLayer(CONFIG, 1, LOCAL_PLACEMENT)
    with_parameters(layer.post_attention_layernorm, norm)
    with_parameters(layer.mlp, *weights)
    layer.mlp.moe_statics.e_score_correction_bias.set_value(BIAS)
    y, (logits, ids, dropped) = layer.mlp_block(x)
    assert ids.shape == [TOKENS, 2] and dropped == 0
    return y + 0.1 * logits.square().sum(-1, keepdim=True)


def moe_block_64(x: Tensor, norm: Tensor, router: Tensor, *weights: Tensor) -> Tensor:
    h = rms_norm_64(x, norm)
    logits = h @ router
    probs = F.softmax(logits)
    _, ids = paddle.topk(probs.detach() + paddle.to_tensor(BIAS.astype(np.float64)), 2)
    chosen = probs * F.one_hot(ids, 4).sum(1).astype("float64")
    share = chosen / chosen.sum(-1, keepdim=True)
    gate, up, down = weights[:3]
    y = x + mlp_64(h, *weights[3:]) + 0.1 * logits.square().sum(-1, keepdim=True)
    for e in range(4):
        y = y + share[:, e : e + 1] * mlp_64(h, gate[e], up[e], down[e])
    return y


BIAS = np.array([[0.2, 0.0, -0.1, 0.05]], np.float32)
STACKS = ((4, HIDDEN, WIDTH), (4, HIDDEN, WIDTH), (4, WIDTH, HIDDEN))
MLP_SHAPES = tuple(shape[1:] for shape in STACKS)
ATTENTION = ((HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN, 12), (HIDDEN, 12), (HIDDEN, HIDDEN))
CASES: dict[str, tuple[Callable, Callable, tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (rms_norm, rms_norm_64, ((TOKENS, HIDDEN), (HIDDEN,))),
    "rope": (rope, rope_64, ((TOKENS, HIDDEN),)),
    "mlp": (mlp, mlp_64, ((TOKENS, HIDDEN), *(shape[1:] for shape in STACKS))),
    "experts": (experts, experts_64, ((TOKENS, HIDDEN), (TOKENS, 1), *STACKS)),
    "dispatch": (dispatch, dispatch_64, ((TOKENS, HIDDEN), (TOKENS, 2))),
    "attention": (attention, attention_64, ((TOKENS, HIDDEN), (TOKENS, 12), (TOKENS, 12))),
    "head": (head, head_64, ((TOKENS, HIDDEN), (VOCAB, HIDDEN))),
    "logprobs": (logprobs, logprobs_64, ((TOKENS, HIDDEN), (VOCAB, HIDDEN))),
    "logprobs alone": (logprobs_alone, logprobs_alone_64, ((TOKENS, HIDDEN), (VOCAB, HIDDEN))),
    "attention block": (attention_block, attention_block_64, ((TOKENS, HIDDEN), *ATTENTION)),
    "mlp block": (mlp_block, mlp_block_64, ((TOKENS, HIDDEN), (HIDDEN,), *MLP_SHAPES)),
    "moe block": (
        moe_block, moe_block_64,
        ((TOKENS, HIDDEN), (HIDDEN,), (HIDDEN, 4), *STACKS, *MLP_SHAPES),
    ),
}  # fmt: skip


def leaves(shapes: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def run(
    function: Callable, arrays: list[np.ndarray], dtype: str, frozen: int | None = None
) -> list[np.ndarray | None]:
    """The output, and the gradients of a weighted sum of its elements."""
    inputs = [
        paddle.to_tensor(a.astype(dtype), stop_gradient=n == frozen) for n, a in enumerate(arrays)
    ]
    output = function(*inputs)
    spread = np.random.default_rng(8).standard_normal(output.shape).astype(dtype)
    (output * paddle.to_tensor(spread)).sum().backward()
    return [output.numpy(), *(None if x.grad is None else x.grad.numpy() for x in inputs)]


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


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """`load_kernels` asked anew, and again after the test."""
    loading.load_kernels.cache_clear()
    yield monkeypatch
    loading.load_kernels.cache_clear()


def test_the_kernels_can_be_switched_off_and_a_wrong_word_is_named(fresh) -> None:
    fresh.setenv(loading.KERNELS, "plain")
    assert not kernels.usable(paddle.zeros([1]))
    assert (
        kernels.describe_kernels() == "plain operators: switched off by ERNIE_TRAIN_KERNELS=plain"
    )
    fresh.setenv(loading.KERNELS, "fast")
    loading.load_kernels.cache_clear()
    with pytest.raises(UserError, match="KERNELS=fast: it must be one of native, plain"):
        kernels.usable(paddle.zeros([1]))


def no_numba() -> None:
    raise ImportError("No module named 'numba'")


def no_words() -> None:
    raise EOFError


COMPILED = {name: made for name, made in {**vars(compiled), **vars(compiled_steps)}.items()
            if isinstance(made, Dispatcher) and not name.startswith("_")}  # fmt: skip
NAMES = list(COMPILED)


def test_no_kernel_is_compiled_or_loaded_within_training(fresh) -> None:
    called = []

    def recorded(name: str) -> Callable:
        return lambda *a: called.append((name, tuple(map(type, a)))) or COMPILED[name](*a)

    loading._check(SimpleNamespace(**{name: recorded(name) for name in NAMES}))
    at_load = set(called)
    assert {name for name, _ in called} == set(NAMES) and len(NAMES) == 18
    module = SimpleNamespace(QUERY_BLOCK=64, **{name: recorded(name) for name in NAMES})
    fresh.setattr(loading, "_import_compiled", lambda: module)
    for function, _, shapes in CASES.values():
        run(function, leaves(shapes), "float32")
    assert len(called) > 2 * len(NAMES) and set(called) == at_load


@pytest.mark.slow
def test_a_damaged_cache_is_told_and_done_without(tmp_path) -> None:
    """Every kernel is compiled twice in a process of its own."""
    code = (
        "import sys, paddle; from ernie_train import kernels\n"
        "print(kernels.usable(paddle.zeros([1])), kernels.swiglu(*[paddle.ones([1])] * 2).item())"
    )
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for damage in (False, True):
        if damage:
            for file in tmp_path.rglob("compiled.rms_norm_backward-*.nbi"):
                file.write_bytes(file.read_bytes()[:20])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
        )
        assert done.stdout.startswith("True 0.731"), done.stderr
        assert ("cannot be used: compiled again" in done.stderr) == damage


def wrong(*arguments: object) -> int:
    return -1


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("_import_compiled", no_numba, "ImportError: No module named 'numba'"),
        ("_import_compiled", no_words, "EOFError"),
        (
            "_import_compiled",
            lambda: SimpleNamespace(**dict.fromkeys(NAMES, wrong)),
            "WrongResultError: a result by the kernels is wrong on this processor",
        ),
    ],
)
def test_where_they_cannot_be_had_training_goes_on_and_one_line_says_so(
    name: str, found: Callable, said: str, fresh, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh.setattr(loading, name, found)
    for _ in range(3):
        assert not kernels.usable(paddle.zeros([1]))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"native kernels cannot be loaded ({said}): plain operators, slower"]
    function, formula, shapes = CASES["mlp"]
    arrays = leaves(shapes)
    ours, exact = run(function, arrays, "float32"), run(formula, arrays, "float64")
    np.testing.assert_allclose(ours[0], exact[0], atol=1e-4)


def test_nothing_is_loaded_before_the_first_tensor_asks() -> None:
    code = "import sys, ernie_train.model, ernie_train.train; print('numba' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False"]


def test_ranks_take_plain_operators_together_and_a_resume_by_others_is_told(monkeypatch) -> None:
    monkeypatch.setattr(loading, "_switched_off", False)
    native = kernels.agree_over_ranks()
    assert native == "native, by numba" and kernels.usable(paddle.zeros([1]))
    monkeypatch.setattr(loading.process_group, "any_rank", lambda flag: True)
    plain = kernels.agree_over_ranks()
    assert plain == "plain operators: another rank has no native kernels"
    assert not kernels.usable(paddle.zeros([1]))
    assert change_of_kernels(None, plain) is None
    assert change_of_kernels({"kernels": "plain operators: x"}, plain) is None
    assert "by native, by numba: figures differ" in change_of_kernels({"kernels": native}, plain)
