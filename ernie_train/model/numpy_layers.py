"""The parts of the model in numpy, without a gradient: what sampling on a CPU is made of.

A step of sampling is many small operations, and numpy calls one in a microsecond, Paddle in twenty
to forty. Weights are copied when a part is made; those that read the same input lie side by side in
one product.

Shapes: T tokens, H hidden size, D head dimension, E experts, k experts per token, I expert width,
R = T*k pairs of a token and one of its experts, P panels of w columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_train.model.mlp import ACTIVATIONS, MLP
from ernie_train.model.moe import MoE
from ernie_train.model.norm import RMSNorm
from ernie_train.model.rope import inverse_frequencies

# OpenBLAS has a kernel for small products, of up to this many multiplications, where there is
# AVX-512. It packs nothing and reads a weight once, in order, if that is cut into narrow panels:
# measured at 64 rows, 115 GFLOP/s instead of 80; with the 8 to 32 rows of an expert twice to three
# times as fast. Elsewhere panels would only be packed more often.
_SMALL_PRODUCT = 1_000_000
_PANEL = 32
_LEAST_ROWS = 16  # a panel so long that fewer rows make a small product is none
_HAS_SMALL_KERNEL = bool(np.core._multiarray_umath.__cpu_features__.get("AVX512_SKX"))


def panels(weight: np.ndarray) -> np.ndarray:
    """A copy of a weight [...,n,m] as [...,P,n,w]; P*w may exceed m, by columns of zeros."""
    *outer, size, columns = weight.shape
    if _small_rows(size, _PANEL) < _LEAST_ROWS:
        return np.ascontiguousarray(weight)[..., None, :, :]
    if columns % _PANEL:
        weight = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -columns % _PANEL)])
    return np.ascontiguousarray(weight.reshape(*outer, size, -1, _PANEL).swapaxes(-2, -3))


def multiply(x: np.ndarray, weight: np.ndarray, output: np.ndarray) -> None:
    """Writes x [T,n] times the panels `weight` [P,n,w] into `output` [P,T,w]."""
    _, size, width = weight.shape
    block = _small_rows(size, width)
    if block < _LEAST_ROWS or len(x) <= block:
        np.matmul(x, weight, out=output)
        return
    for start in range(0, len(x), block):
        end = start + block
        np.matmul(x[start:end], weight, out=output[:, start:end])


def _small_rows(size: int, width: int) -> int:
    """How many rows a small product with [size,width] may have."""
    return _SMALL_PRODUCT // (size * width) if _HAS_SMALL_KERNEL else 0


def by_panel(rows: np.ndarray, width: int) -> np.ndarray:
    """A view of [T,P*w] as [P,T,w]."""
    return rows.reshape(len(rows), -1, width).swapaxes(0, 1)


def softmax_(scores: np.ndarray) -> np.ndarray:
    """Makes softmax over the last axis out of `scores`, in their memory."""
    exponentials = exp_(scores)
    exponentials /= exponentials.sum(-1, keepdims=True)
    return exponentials


def exp_(scores: np.ndarray) -> np.ndarray:
    """exp(scores - their maximum over the last axis), in their memory."""
    scores -= scores.max(-1, keepdims=True)
    return np.exp(scores, out=scores)


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-x))."""
    denominator = np.negative(x)
    with np.errstate(over="ignore"):  # infinity divides to the right zero
        np.exp(denominator, out=denominator)
    denominator += 1
    return np.divide(x, denominator, out=denominator)


ACTIVATIONS_IN_NUMPY = {"silu": silu, "swish": silu}


def _by_paddle(act: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: act(paddle.to_tensor(x)).numpy()


def gating(hidden_act: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function of [2P,T,w], panels of gate and then of up, that gives act(gate)*up [T,P*w]."""
    act = ACTIVATIONS_IN_NUMPY.get(hidden_act) or _by_paddle(ACTIVATIONS[hidden_act])

    def gated(gate_up: np.ndarray) -> np.ndarray:
        count, rows, width = gate_up.shape
        inner = act(gate_up[: count // 2])
        inner *= gate_up[count // 2 :]
        return inner.swapaxes(0, 1).reshape(rows, count // 2 * width)

    return gated


class Norm:
    """RMSNorm of x [T,H]."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.numpy(), np.float32(norm.eps)
        size = len(self.weight)
        self.mean = np.full((size, 1), 1 / size, np.float32)  # a product with it is a mean over H

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rms = np.matmul(x * x, self.mean)  # [T,1]
        rms += self.eps
        normalized = x / np.sqrt(rms, out=rms)
        normalized *= self.weight
        return normalized


class Product:
    """x W + b."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self.columns = weight.shape[1]
        self.weight, self.bias = panels(weight), bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        count, _, width = self.weight.shape
        output = np.empty((len(x), count * width), np.float32)
        multiply(x, self.weight, by_panel(output, width))
        y = output[:, : self.columns]
        if self.bias is not None:
            y += self.bias
        return y


def side_by_side(*layers: nn.Linear) -> tuple[np.ndarray, np.ndarray | None]:
    """Copies of the weights and biases of layers that read the same x, as those of one."""
    biases = [layer.bias.numpy() for layer in layers if layer.bias is not None]
    weight = np.concatenate([layer.weight.numpy() for layer in layers], 1)
    return weight, np.concatenate(biases) if biases else None


class Rope:
    """Rotates pairs (2i, 2i+1) as complex numbers; the table grows with the positions asked for."""

    def __init__(self, theta: float, head_dim: int) -> None:
        self.frequencies = inverse_frequencies(theta, head_dim)
        self.table = np.zeros((0, head_dim // 2), np.complex64)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The rotations [T,1,D/2] of `positions` [T]."""
        needed = int(positions.max()) + 1
        if needed > len(self.table):
            angles = np.arange(2 * needed, dtype=np.float32)[:, None] * self.frequencies
            self.table = np.cos(angles) + np.complex64(1j) * np.sin(angles)
        return self.table[positions, None]


def rotate_(x: np.ndarray, rotations: np.ndarray) -> None:
    """Rotates the heads of x [T,heads*D] in its memory."""
    pairs = x.view(np.complex64).reshape(len(x), -1, rotations.shape[-1])
    pairs *= rotations


class Mlp:
    """A gated `MLP`: x [T,H] -> [T,H]."""

    def __init__(self, mlp: MLP, hidden_act: str) -> None:
        both = [side_by_side(projection) for projection in (mlp.gate_proj, mlp.up_proj)]
        self.width = both[0][0].shape[1]
        self.gate_up = np.concatenate([panels(weight) for weight, _ in both])  # [2P,n,w]
        count, _, width = self.gate_up.shape
        room = (0, count // 2 * width - self.width)
        biases = [np.pad(bias, room) for _, bias in both if bias is not None]
        self.bias = np.concatenate(biases).reshape(count, 1, width) if biases else None
        self.down = Product(*side_by_side(mlp.down_proj))
        self.gated = gating(hidden_act)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        count, _, width = self.gate_up.shape
        gate_up = np.empty((count, len(x), width), np.float32)
        multiply(x, self.gate_up, gate_up)
        if self.bias is not None:
            gate_up += self.bias
        return self.down(self.gated(gate_up)[:, : self.width])


class Experts:
    """A `MoE` layer whose experts are all here and take every token."""

    def __init__(self, moe: MoE) -> None:
        config, experts = moe.config, moe.experts
        self.top_k, self.norm_min = config.moe_k, config.moe_norm_min
        self.router = Product(moe.gate.weight.numpy(), None)
        self.bias = moe.moe_statics.e_score_correction_bias.numpy()
        # [E,2P,n,w], [E,P,n,w]
        both = [panels(projection.numpy()) for projection in (experts.gate_proj, experts.up_proj)]
        self.gate_up, self.down = np.concatenate(both, 1), panels(experts.down_proj.numpy())
        self.width, self.size = config.moe_intermediate_size, config.hidden_size
        self.gated = gating(config.hidden_act)
        shared = moe.shared_experts
        self.shared = None if shared is None else Mlp(shared, config.hidden_act)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [T,H] -> output [T,H] and the experts chosen [T,k]."""
        chosen, weights = self._route(x)
        pairs = chosen.reshape(-1)
        order = pairs.argsort(kind="stable")  # [R] pairs sorted by expert
        ends = np.bincount(pairs, minlength=len(self.down)).cumsum().tolist()
        rows = x.take(order // self.top_k, 0)
        _, count, _, width = self.gate_up.shape
        gate_up = np.empty((count, len(rows), width), np.float32)
        _by_expert(rows, self.gate_up, ends, gate_up)
        inner = self.gated(gate_up)[:, : self.width]
        _, count, _, width = self.down.shape
        rows = np.empty((len(rows), count * width), np.float32)
        _by_expert(inner, self.down, ends, by_panel(rows, width))
        place = order.argsort()
        rows = rows.take(place, 0)[:, : self.size]
        # [T,1,k] @ [T,k,H] -> [T,1,H]
        output = np.matmul(weights[:, None], rows.reshape(*chosen.shape, -1))[:, 0]
        if self.shared is not None:
            output += self.shared(x)
        return output, chosen

    def _route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The experts [T,k] of x [T,H] and their weights [T,k]."""
        probs = softmax_(self.router(x))
        # The bias picks experts, raw probabilities weigh them (arXiv:2408.15664).
        chosen = (probs + self.bias).argpartition(-self.top_k, -1)[:, -self.top_k :]
        weights = probs[np.arange(len(x))[:, None], chosen]
        weights /= np.maximum(weights.sum(-1, keepdims=True), self.norm_min)
        return chosen, weights


def _by_expert(rows: np.ndarray, weights: np.ndarray, ends: list[int], output: np.ndarray) -> None:
    """Writes the products of rows [R,n], sorted by expert, with panels [E,P,n,w] into [P,R,w].

    `ends` tell where the rows of each expert end.
    """
    start = 0
    for weight, end in zip(weights, ends, strict=True):
        if end > start:
            multiply(rows[start:end], weight, output[:, start:end])
        start = end
