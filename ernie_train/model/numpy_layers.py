"""The layers of the model in numpy, forward only, for sampling on a CPU.

A decoding step is many small operations. Calling one costs numpy a microsecond and Paddle 20 to 40
(Paddle 3.3.1), which is more than most of them compute. Each layer copies the weights of its Paddle
counterpart when it is built; projections of the same input are fused into one product.

Shapes: T tokens, H hidden size, D head dimension, E experts, k experts per token, I expert width,
R = T*k routed rows, P column blocks of w columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_train.kernels.packed import PackedWeight, packs
from ernie_train.model.layers import ACTIVATIONS, MLP, RMSNorm
from ernie_train.model.lora import merged_weight
from ernie_train.model.moe import MoE
from ernie_train.model.rope import inverse_frequencies

# The OpenBLAS of numpy 1.26 (0.3.23) has a kernel for small products, where there is AVX-512. It
# packs no operands and reads the weight in order if that is stored in narrow blocks of columns.
# Measured on one thread of an AMD EPYC, with a weight [256,256]: 103 instead of 51 GFLOP/s at 16
# rows, 109 instead of 69 at 32. Without the kernel more blocks would only mean more packing, so
# there a weight is one block.
_SMALL_PRODUCT = 1_000_000  # the most multiplications that it takes
_BLOCK_COLUMNS = 32
_MIN_SMALL_ROWS = 16  # a weight stays one block if fewer rows of x than this are a small product
# numpy 1.26 has no public name for this; `np.show_runtime()` only prints it.
_HAS_SMALL_KERNEL = bool(np.core._multiarray_umath.__cpu_features__.get("AVX512_SKX"))


def column_blocks(weight: np.ndarray) -> np.ndarray:
    """Copy a weight [...,n,m] as blocks of its columns [...,P,n,w]; zeros fill up the last one."""
    *outer, size, columns = weight.shape
    if _rows_of_small_product(size, _BLOCK_COLUMNS) < _MIN_SMALL_ROWS:
        return np.ascontiguousarray(weight)[..., None, :, :]
    if columns % _BLOCK_COLUMNS:
        weight = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -columns % _BLOCK_COLUMNS)])
    return np.ascontiguousarray(weight.reshape(*outer, size, -1, _BLOCK_COLUMNS).swapaxes(-2, -3))


def matmul_blocks(x: np.ndarray, blocks: np.ndarray, output: np.ndarray) -> None:
    """Write x [T,n] times the column blocks [P,n,w] of a weight into `output` [P,T,w]."""
    _, size, width = blocks.shape
    rows = _rows_of_small_product(size, width)
    if rows < _MIN_SMALL_ROWS or len(x) <= rows:
        np.matmul(x, blocks, out=output)
        return
    for start in range(0, len(x), rows):
        end = start + rows
        np.matmul(x[start:end], blocks, out=output[:, start:end])


def _rows_of_small_product(size: int, width: int) -> int:
    """Return the most rows of x whose product with [size,width] is small; 0 without the kernel."""
    return _SMALL_PRODUCT // (size * width) if _HAS_SMALL_KERNEL else 0


def as_blocks(rows: np.ndarray, width: int) -> np.ndarray:
    """View [T,P*w] as [P,T,w]."""
    return rows.reshape(len(rows), -1, width).swapaxes(0, 1)


def softmax_(scores: np.ndarray) -> np.ndarray:
    """Apply softmax over the last axis in place."""
    exponentials = shifted_exp_(scores)
    exponentials /= exponentials.sum(-1, keepdims=True)
    return exponentials


def shifted_exp_(scores: np.ndarray) -> np.ndarray:
    """Compute exp(scores - maximum over the last axis) in place."""
    scores -= scores.max(-1, keepdims=True)
    return np.exp(scores, out=scores)


def silu(x: np.ndarray) -> np.ndarray:
    """Compute x / (1 + exp(-x))."""
    denominator = np.negative(x)
    with np.errstate(over="ignore"):  # x / infinity is 0, the right limit
        np.exp(denominator, out=denominator)
    denominator += 1
    return np.divide(x, denominator, out=denominator)


NUMPY_ACTIVATIONS = {"silu": silu, "swish": silu}


def _with_paddle(act: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: act(paddle.to_tensor(x)).numpy()


def gated_activation(hidden_act: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that computes act(gate) * up.

    It takes column blocks [2P,T,w], those of gate before those of up, and returns [T,P*w].
    """
    act = NUMPY_ACTIVATIONS.get(hidden_act) or _with_paddle(ACTIVATIONS[hidden_act])

    def gated(gate_up: np.ndarray) -> np.ndarray:
        count, rows, width = gate_up.shape
        inner = act(gate_up[: count // 2])
        inner *= gate_up[count // 2 :]
        return inner.swapaxes(0, 1).reshape(rows, count // 2 * width)

    return gated


class NumpyRMSNorm:
    """RMSNorm of x [T,H]."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.numpy(), np.float32(norm.eps)
        size = len(self.weight)
        # x @ mean averages over H, in a third of the time of numpy's own mean over the last axis.
        self.mean = np.full((size, 1), 1 / size, np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rms = np.matmul(x * x, self.mean)  # [T,1]
        rms += self.eps
        normalized = x / np.sqrt(rms, out=rms)
        normalized *= self.weight
        return normalized


class ColumnBlocks:
    """A copy of a weight [n,m] in column blocks."""

    def __init__(self, weight: np.ndarray) -> None:
        self.columns, self.weight = weight.shape[1], column_blocks(weight)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return x [T,n] times the weight, [T,m]."""
        count, _, width = self.weight.shape
        output = np.empty((len(x), count * width), np.float32)
        matmul_blocks(x, self.weight, as_blocks(output, width))
        return output[:, : self.columns]


class NumpyLinear:
    """x W + b."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.bias = bias
        self.product = PackedWeight(weight) if packs(len(weight)) else ColumnBlocks(weight)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = self.product(x)
        if self.bias is not None:
            y += self.bias
        return y


def fuse_linears(*layers: nn.Linear) -> tuple[np.ndarray, np.ndarray | None]:
    """Concatenate copies of the weights, adapters merged, and biases of layers with one input."""
    biases = [layer.bias.numpy() for layer in layers if layer.bias is not None]
    weight = np.concatenate([merged_weight(layer) for layer in layers], 1)
    return weight, np.concatenate(biases) if biases else None


class NumpyRope:
    """Rotary embedding of pairs (2i, 2i+1), as a product of complex numbers.

    The table grows with the positions that are looked up.
    """

    def __init__(self, theta: float, head_dim: int) -> None:
        self.frequencies = inverse_frequencies(theta, head_dim)
        self.table = np.zeros((0, head_dim // 2), np.complex64)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the rotations [T,1,D/2] of `positions` [T]."""
        needed = int(positions.max()) + 1
        if needed > len(self.table):
            angles = np.arange(2 * needed, dtype=np.float32)[:, None] * self.frequencies
            self.table = np.cos(angles) + np.complex64(1j) * np.sin(angles)
        return self.table[positions, None]


def apply_rope_(x: np.ndarray, rotations: np.ndarray) -> None:
    """Rotate the heads of x [T,heads*D] in place."""
    pairs = x.view(np.complex64).reshape(len(x), -1, rotations.shape[-1])
    pairs *= rotations


class _PackedGate:
    """act(gate(x)) * up(x), the two weights packed as one."""

    def __init__(self, mlp: MLP, hidden_act: str) -> None:
        self.gate_up = NumpyLinear(*fuse_linears(mlp.gate_proj, mlp.up_proj))
        self.act = NUMPY_ACTIVATIONS.get(hidden_act) or _with_paddle(ACTIVATIONS[hidden_act])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        gate, up = np.split(self.gate_up(x), 2, 1)
        inner = self.act(gate)
        inner *= up
        return inner


class _BlockGate:
    """act(gate(x)) * up(x), in column blocks."""

    def __init__(self, mlp: MLP, hidden_act: str) -> None:
        # Gate and up are fused, but their blocks stay apart: act(gate) * up needs no copies then.
        both = [fuse_linears(projection) for projection in (mlp.gate_proj, mlp.up_proj)]
        self.width = both[0][0].shape[1]
        self.gate_up = np.concatenate([column_blocks(weight) for weight, _ in both])  # [2P,n,w]
        count, _, width = self.gate_up.shape
        padding = (0, count // 2 * width - self.width)
        biases = [np.pad(bias, padding) for _, bias in both if bias is not None]
        self.bias = np.concatenate(biases).reshape(count, 1, width) if biases else None
        self.gated = gated_activation(hidden_act)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        count, _, width = self.gate_up.shape
        gate_up = np.empty((count, len(x), width), np.float32)
        matmul_blocks(x, self.gate_up, gate_up)
        if self.bias is not None:
            gate_up += self.bias
        return self.gated(gate_up)[:, : self.width]


class NumpyMLP:
    """`MLP`: down(act(gate(x)) * up(x)) for x [T,H]."""

    def __init__(self, mlp: MLP, hidden_act: str) -> None:
        gate = _PackedGate if packs(mlp.gate_proj.weight.shape[0]) else _BlockGate
        self.inner = gate(mlp, hidden_act)
        self.down = NumpyLinear(*fuse_linears(mlp.down_proj))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.down(self.inner(x))


class NumpyMoE:
    """`MoE` with all experts in this process and no capacity limit."""

    def __init__(self, moe: MoE) -> None:
        config, experts = moe.config, moe.experts
        self.top_k, self.norm_min = config.moe_k, config.moe_norm_min
        self.router = NumpyLinear(moe.gate.weight.numpy(), None)
        self.bias = moe.moe_statics.e_score_correction_bias.numpy()
        # [E,2P,n,w], [E,P,n,w]
        stacks = ("gate_proj", "up_proj", "down_proj")
        gate, up, self.down = (column_blocks(merged_weight(experts, name)) for name in stacks)
        self.gate_up = np.concatenate([gate, up], 1)
        self.width, self.size = config.moe_intermediate_size, config.hidden_size
        self.gated = gated_activation(config.hidden_act)
        shared = moe.shared_experts
        self.shared = None if shared is None else NumpyMLP(shared, config.hidden_act)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute x [T,H] -> output [T,H] and the ids of the chosen experts [T,k]."""
        chosen, weights = self.route(x)
        pairs = chosen.reshape(-1)
        order = pairs.argsort(kind="stable")  # [R] (token, choice) pairs sorted by expert
        ends = np.bincount(pairs, minlength=len(self.down)).cumsum().tolist()
        rows = x.take(order // self.top_k, 0)
        _, count, _, width = self.gate_up.shape
        gate_up = np.empty((count, len(rows), width), np.float32)
        _grouped_matmul(rows, self.gate_up, ends, gate_up)
        inner = self.gated(gate_up)[:, : self.width]
        _, count, _, width = self.down.shape
        rows = np.empty((len(rows), count * width), np.float32)
        _grouped_matmul(inner, self.down, ends, as_blocks(rows, width))
        rows = rows.take(order.argsort(), 0)[:, : self.size]  # back in the order of tokens
        # [T,1,k] @ [T,k,H] -> [T,1,H]
        output = np.matmul(weights[:, None], rows.reshape(*chosen.shape, -1))[:, 0]
        if self.shared is not None:
            output += self.shared(x)
        return output, chosen

    def route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the experts [T,k] of x [T,H] and their weights [T,k]."""
        probs = softmax_(self.router(x))
        # The bias picks experts, raw probabilities weigh them (arXiv:2408.15664).
        chosen = (probs + self.bias).argpartition(-self.top_k, -1)[:, -self.top_k :]
        weights = probs[np.arange(len(x))[:, None], chosen]
        weights /= np.maximum(weights.sum(-1, keepdims=True), self.norm_min)
        return chosen, weights


def _grouped_matmul(
    rows: np.ndarray, weights: np.ndarray, ends: list[int], output: np.ndarray
) -> None:
    """Write the products of rows [R,n] with their experts' column blocks [E,P,n,w] into [P,R,w].

    Rows are sorted by expert; those of expert e end at `ends[e]`.
    """
    start = 0
    for weight, end in zip(weights, ends, strict=True):
        if end > start:
            matmul_blocks(rows[start:end], weight, output[:, start:end])
        start = end
