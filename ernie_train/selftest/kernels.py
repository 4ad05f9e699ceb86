"""Checks of single kernels: attention, FlashMask, experts, and operators that only GPUs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_train.core.devices import compute_dtype
from ernie_train.kernels import describe_kernels, plain_operators, usable
from ernie_train.losses import linear_cross_entropy
from ernie_train.model.attention import (
    document_attention,
    flashmask_available,
    flashmask_document_attention,
)
from ernie_train.model.batch_layout import AttentionLayout, BatchLayout
from ernie_train.model.batched_experts import BatchedSwiGLU
from ernie_train.model.layers import MLP, RMSNorm
from ernie_train.model.moe import MoE, experts_by_autograd
from ernie_train.model.rope import RopeTables
from ernie_train.selftest.check import Figure, Result, Skip
from ernie_train.selftest.fixture import largest_error, relative_error, small_config
from ernie_train.selftest.graph import operators_by_inference

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 64
# Tokens; a kernel of its own serves each kind of length. No block divides their odd sum.
DOCUMENTS = (1, 7, 60, 200, 261)
EXACT, ROUNDED = 1e-4, 3e-2  # of the largest value: float32, and bfloat16 with 8 bits


def _layout(documents: tuple[int, ...] = DOCUMENTS) -> AttentionLayout:
    ids = np.repeat(np.arange(1, len(documents) + 1), documents)[None]
    return BatchLayout.from_document_ids(ids).attention(HEADS, KEY_HEADS)


def _inputs(tokens: int) -> list[np.ndarray]:
    """Return queries, keys, values and the gradient of the output, one row a token and head."""
    rng = np.random.default_rng(5)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    return [rng.normal(size=(tokens * n, HEAD_DIM)).astype(np.float32) for n in heads]


def reference_attention(arrays: list[np.ndarray], documents: tuple[int, ...]) -> list[np.ndarray]:
    """Return the output and the gradients of queries, keys and values, with dense float64 masks."""
    tokens = sum(documents)
    q, k, v, grad = (
        np.asarray(a, np.float64).reshape(tokens, -1, HEAD_DIM).swapaxes(0, 1) for a in arrays
    )  # [heads,T,D]
    k, v = (x.repeat(HEADS // KEY_HEADS, axis=0) for x in (k, v))
    document = np.repeat(np.arange(len(documents)), documents)
    seen = np.tril(document[:, None] == document)
    scale = HEAD_DIM**-0.5
    scores = np.where(seen, q @ k.swapaxes(1, 2) * scale, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    d_probs = grad @ v.swapaxes(1, 2)
    d_scores = probs * (d_probs - (d_probs * probs).sum(-1, keepdims=True)) * scale
    dk, dv = d_scores.swapaxes(1, 2) @ q, probs.swapaxes(1, 2) @ grad
    dk, dv = (x.reshape(KEY_HEADS, -1, tokens, HEAD_DIM).sum(1) for x in (dk, dv))
    found = (probs @ v, d_scores @ k, dk, dv)
    return [x.swapaxes(0, 1).reshape(-1, HEAD_DIM) for x in found]


def _attention_figures(kernel: Callable[..., Tensor], dtype: str, tolerance: float) -> list[Figure]:
    layout = _layout()
    rounded = [paddle.to_tensor(a).astype(dtype) for a in _inputs(layout.num_tokens)]
    expected = reference_attention([x.astype("float32").numpy() for x in rounded], DOCUMENTS)
    leaves = [x.detach() for x in rounded[:3]]
    for leaf in leaves:
        leaf.stop_gradient = False
    output = kernel(*leaves, layout)
    output.backward(rounded[3])
    found = [output, *(leaf.grad for leaf in leaves)]
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    return [
        Figure(name, relative_error(ours.astype("float32").numpy(), theirs), tolerance)
        for name, ours, theirs in zip(names, found, expected, strict=True)
    ]


def attention(device: str) -> Result:
    """Compare attention within documents in float32 with dense masks in float64."""
    figures = _attention_figures(document_attention, "float32", EXACT)
    return Result(figures, f"documents of {', '.join(map(str, DOCUMENTS))} tokens, float32")


def flashmask_attention(device: str) -> Result:
    """Compare the FlashMask kernel in bfloat16 with dense masks in float64."""
    if device != "gpu":
        raise Skip("FlashMask has kernels for GPUs alone")
    if compute_dtype(device) != "bfloat16":
        raise Skip(
            "FlashMask takes bfloat16, which this GPU does not compute: it trains in float32"
        )
    if not flashmask_available(paddle.zeros([1, HEAD_DIM], "bfloat16")):
        raise Skip("this Paddle has no FlashMask kernel: other kernels, in float32, replace it")
    figures = _attention_figures(flashmask_document_attention, "bfloat16", ROUNDED)
    return Result(figures, f"documents of {', '.join(map(str, DOCUMENTS))} tokens, bfloat16")


def experts(device: str) -> Result:
    """Compare batched products of experts with one expert after another, in float32."""
    figures = []
    for load, rows in (("even", [40] * 8), ("uneven", [90, 0, 3, 57, 1, 0, 130, 39])):
        ours, theirs = (_experts_outcome(run, rows) for run in (BatchedSwiGLU.apply, _one_by_one))
        error = largest_error(ours, theirs)
        figures.append(Figure(f"outputs and gradients, {load} load", error, EXACT))
    return Result(figures, "320 rows, 8 experts, float32")


def _one_by_one(x: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    *stacks, rows = rest
    return experts_by_autograd(x, weights, tuple(stacks), rows, F.silu)


def _experts_outcome(run: Callable[..., Tensor], rows: list[int]) -> list[np.ndarray]:
    hidden, width, experts_held = 64, 96, len(rows)
    shapes = [
        [sum(rows), hidden], [sum(rows), 1], [experts_held, hidden, width],
        [experts_held, hidden, width], [experts_held, width, hidden],
    ]  # fmt: skip
    return _outcome(lambda *leaves: run(*leaves, rows), [], shapes)


def native(device: str) -> Result:
    """Compare the passes that native kernels fuse with plain operators, in float32."""
    if device != "cpu":
        raise Skip("native kernels serve processors alone")
    if not usable(paddle.zeros([1])):
        raise Skip(describe_kernels())
    figures = []
    for name, (run, parameters, shapes) in _fused_passes().items():
        ours = _outcome(run, parameters, shapes)
        with plain_operators():
            theirs = _outcome(run, parameters, shapes)
        error = largest_error(ours, theirs)
        figures.append(Figure(f"{name}: output and gradients", error, EXACT))
    return Result(figures, f"{sum(DOCUMENTS)} tokens, float32, beside plain operators")


def _fused_passes() -> dict[str, tuple[Callable[..., Tensor], list[Tensor], list[list[int]]]]:
    """Return what computes each, its parameters and the shapes of its inputs."""
    config, layout = small_config(), _layout()
    tokens, hidden, vocab = layout.num_tokens, config.hidden_size, config.vocab_size
    paddle.seed(0)
    norm, mlp = RMSNorm(hidden, 1e-5), MLP(config, 96)
    moe = MoE(small_config(moe_num_shared_experts=0))  # they would outweigh what is routed
    rope = RopeTables.build(paddle.arange(tokens), 1e4, HEAD_DIM)
    labels, weights = paddle.arange(tokens) % vocab, paddle.linspace(0, 1, tokens)
    x, heads = [tokens, hidden], [[tokens * n, HEAD_DIM] for n in (HEADS, KEY_HEADS, KEY_HEADS)]

    def head(states: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(states, weight, None, labels, weights)[0]

    return {
        "RMSNorm": (norm, norm.parameters(), [x]),
        "RoPE": (rope.rotate, [], heads[:1]),
        "MLP": (mlp, mlp.parameters(), [x]),
        "MoE": (lambda rows: moe(rows)[0], moe.parameters(), [x]),
        "attention": (lambda q, k, v: document_attention(q, k, v, layout), [], heads),
        "LM head": (head, [], [x, [vocab, hidden]]),
    }


def _outcome(
    run: Callable[..., Tensor], parameters: list[Tensor], shapes: list[list[int]]
) -> list[np.ndarray]:
    """Return the output, and the gradients of inputs and parameters that have one."""
    rng = np.random.default_rng(6)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    leaves = [paddle.to_tensor(a, stop_gradient=False) for a in arrays]
    output = run(*leaves)
    output.backward(paddle.to_tensor(rng.normal(size=output.shape).astype(np.float32)))
    found = [output.numpy()]
    for leaf in (*leaves, *parameters):
        if leaf.grad is not None:
            found.append(leaf.grad.numpy())
            leaf.clear_gradient()
    return found


def operators(device: str) -> Result:
    """Infer types and shapes of the operators that only GPUs run, without running them."""
    layout = _layout((3, 5))
    q, k, v = (paddle.to_tensor(a).astype("bfloat16") for a in _inputs(8)[:3])
    names = ("flashmask_attention", "flashmask_attention_v2")
    figures = []
    for version, name in zip((2, 3), names, strict=True):
        flags: dict[str, Any] = {
            "FLAGS_flash_attn_version": version,
            "FLAGS_cudnn_deterministic": False,
        }
        with operators_by_inference(names, flags) as called:
            output = flashmask_document_attention(q, k, v, layout)
        right = called == [name] and output.shape == q.shape and output.dtype == q.dtype
        figures.append(Figure(name, float(right), least=1))
    return Result(figures, "names, arguments, types and shapes, by Paddle's own inference")
