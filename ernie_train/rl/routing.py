"""The experts that sampling chose, which `policy.router_replay` takes again in the update.

Shapes: T tokens of prompt and completion, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from ernie_train.core.errors import UserError
from ernie_train.generate.prompt_experts import expert_dtype
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import TokenizedCompletion


def require_experts(
    completions: Iterable[TokenizedCompletion], model: Ernie4_5_MoeForCausalLM, source: str
) -> None:
    """Raise `UserError`, which names `source`, for experts that are not known or fit no `model`."""
    layers = sum(layer.is_moe for layer in model.model.layers)
    shape, count = (layers, model.config.moe_k), model.config.moe_num_experts
    for completion in completions:
        known = completion.routing
        if known is None or known.min() < 0:
            raise UserError(
                f"{source} gives no experts for policy.router_replay to take again: sample or dump "
                "rollouts under policy.router_replay: true, or leave it out"
            )
        if known.shape[1:] != shape or known.max() >= count:
            raise UserError(
                f"{source} gives experts of another model: of {known.shape[1]} layers, "
                f"{known.shape[2]} a token, up to number {known.max()}; this one has {layers} "
                f"MoE layers of {count} experts and takes {shape[1]}"
            )


def packed_experts(routing: np.ndarray) -> dict[str, Any]:
    """Return experts [T-1,L,K] as values of JSON: int16, compressed, in base64."""
    data = routing.astype("<i2").tobytes()
    packed = base64.b64encode(zlib.compress(data, 1)).decode()
    return {"experts": packed, "experts_shape": list(routing.shape[1:])}


def unpacked_experts(row: dict[str, Any], prompt: int, completion: int) -> list[np.ndarray]:
    """Return the experts of `prompt` and of `completion` tokens; the inverse of `packed_experts`.

    Raises `ValueError` for experts of another number of tokens, or what are none.
    """
    layers, per_token = (int(size) for size in row["experts_shape"])
    size = (prompt + completion) * layers * per_token * 2
    try:
        packed = base64.b64decode(row["experts"])
        data = zlib.decompressobj().decompress(packed, max(size, 0) + 1)
    except zlib.error as error:
        raise ValueError(f"experts: {error}") from None
    if len(data) != size or not size:
        raise ValueError(f"experts are not those of {prompt} + {completion} tokens")
    table = np.frombuffer(data, "<i2").reshape(-1, layers, per_token)
    if table.min() < 0:
        raise ValueError(f"experts: {table.min()} is none")
    table = table.astype(expert_dtype(int(table.max()) + 1))
    return [table[:prompt], table[prompt:]]
