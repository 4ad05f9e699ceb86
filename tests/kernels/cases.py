"""Operators with native kernels: by the public call, and by their formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_train.losses import linear_cross_entropy, token_logprobs
from ernie_train.model.attention import document_attention
from ernie_train.model.batch_layout import AttentionLayout, Document
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.layers import MLP, RMSNorm
from ernie_train.model.moe import LOCAL_PLACEMENT, Experts
from ernie_train.model.rope import RopeTables
from ernie_train.model.token_dispatcher import LocalDispatcher, make_routing
from ernie_train.model.transformer import DecoderLayer

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
