"""The experts that sampling chose, which `policy.router_replay` takes again in the update.

Shapes: S tokens of the prompt, N sampled tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from ernie_train.core.errors import UserError
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import TokenizedCompletion


def require_experts(
    completions: Iterable[TokenizedCompletion], model: Ernie4_5_MoeForCausalLM, source: str
) -> None:
    """Raise `UserError`, which names `source`, for experts that are not known or fit no `model`."""
    layers = sum(layer.is_moe for layer in model.model.layers)
    shape, count = (layers, model.config.moe_k), model.config.moe_num_experts
    for completion in completions:
        prompt, sampled = completion.prompt_expert_ids, completion.expert_ids
        if prompt is None or sampled is None:
            raise UserError(
                f"{source} gives no experts for policy.router_replay to take again: sample or dump "
                "rollouts under policy.router_replay: true, or leave it out"
            )
        if not prompt.shape[1:] == sampled.shape[1:] == shape or sampled.max() >= count:
            raise UserError(
                f"{source} gives experts of another model: of {sampled.shape[1]} layers, "
                f"{sampled.shape[2]} a token, up to number {sampled.max()}; this one has {layers} "
                f"MoE layers of {count} experts and takes {shape[1]}"
            )


def packed_experts(prompt: np.ndarray, sampled: np.ndarray) -> dict[str, Any]:
    """Return experts [S-1,L,K] and [N,L,K] as values of JSON: int16, compressed, in base64."""
    joined = np.concatenate([prompt, sampled]).astype("<i2")
    packed = base64.b64encode(zlib.compress(joined.tobytes(), 1)).decode()
    return {"experts": packed, "experts_shape": list(joined.shape[1:])}


def unpacked_experts(row: dict[str, Any], prompt: int, sampled: int) -> list[np.ndarray]:
    """Return the experts of `prompt` and of `sampled` tokens; the inverse of `packed_experts`.

    Raises `ValueError` for experts of another number of tokens, or what are none.
    """
    layers, per_token = (int(size) for size in row["experts_shape"])
    size = (prompt + sampled) * layers * per_token * 2
    try:
        packed = base64.b64decode(row["experts"])
        data = zlib.decompressobj().decompress(packed, max(size, 0) + 1)
    except zlib.error as error:
        raise ValueError(f"experts: {error}") from None
    if len(data) != size or not size:
        raise ValueError(f"experts are not those of {prompt} + {sampled} tokens")
    table = np.frombuffer(data, "<i2").reshape(-1, layers, per_token).astype(np.int16)
    if table.min() < 0:
        raise ValueError(f"experts: {table.min()} is none")
    return [table[:prompt], table[prompt:]]
