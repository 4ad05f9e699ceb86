"""Compute a Llama's logits with numpy from the tensors as they are stored, layer by layer.

It knows nothing of ERNIE 4.5, so that an import can be proven where torch is not installed. Needs
memory for one tensor and the hidden states.

Shapes: S positions, H hidden size, N heads, G key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ernie_train.model import Ernie4_5_MoeConfig

Read = Callable[[str], np.ndarray]


def llama_logits(
    config: Ernie4_5_MoeConfig, read: Read, sequences: Sequence[Sequence[int]], interleaved: bool
) -> list[np.ndarray]:
    """Return the logits [S,V] of each sequence.

    Args:
        config: the sizes.
        read: returns a stored tensor by Hugging Face's name, in float32, Linear weights [out, in].
        sequences: token ids.
        interleaved: rotary pairs are (2i, 2i+1), not (i, i + D/2).
    """
    embedding = read("model.embed_tokens.weight")
    hidden = [embedding[np.asarray(sequence)] for sequence in sequences]  # [S,H]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        weight = {part: read(f"{name}.self_attn.{part}_proj.weight").T for part in "qkvo"}
        norm = read(f"{name}.input_layernorm.weight")
        for x in hidden:
            x += _attention(config, _norm(x, norm, config), weight, interleaved)
        mlp = {part: read(f"{name}.mlp.{part}_proj.weight").T for part in ("gate", "up", "down")}
        norm = read(f"{name}.post_attention_layernorm.weight")
        for x in hidden:
            y = _norm(x, norm, config)
            gate = y @ mlp["gate"]
            x += (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"]
    norm = read("model.norm.weight")
    head = embedding if config.tie_word_embeddings else read("lm_head.weight")
    return [_norm(x, norm, config) @ head.T for x in hidden]


def _norm(x: np.ndarray, weight: np.ndarray, config: Ernie4_5_MoeConfig) -> np.ndarray:
    mean_square = (x * x).mean(-1, keepdims=True, dtype=np.float32)
    normed: np.ndarray = x / np.sqrt(mean_square + np.float32(config.rms_norm_eps)) * weight
    return normed


def _attention(
    config: Ernie4_5_MoeConfig, x: np.ndarray, weight: dict[str, np.ndarray], interleaved: bool
) -> np.ndarray:
    length, dim = len(x), config.attention_head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    q, k, v = ((x @ weight[part]).reshape(length, -1, dim).swapaxes(0, 1) for part in "qkv")
    q, k = (_rotate(part, config.rope_theta, interleaved) for part in (q, k))  # [N,S,D], [G,S,D]
    scores = q @ k.repeat(groups, 0).swapaxes(1, 2) / np.float32(np.sqrt(dim))  # [N,S,S]
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ v.repeat(groups, 0)
    output: np.ndarray = mixed.swapaxes(0, 1).reshape(length, -1) @ weight["o"]
    return output


def _rotate(x: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """Rotate x [N,S,D] by its positions."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)  # [S,D/2]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    pairs = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (
        slice(0, half), slice(half, None)
    )  # fmt: skip
    first, second = (x[..., part] for part in pairs)
    rotated = np.empty_like(x)
    rotated[..., pairs[0]] = first * cos - second * sin
    rotated[..., pairs[1]] = second * cos + first * sin
    return rotated
