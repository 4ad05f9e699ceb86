"""The decoder of `generate` that computes with the model's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.model import Ernie4_5_MoeForCausalLM, KVCache
from ernie_train.model.dtypes import cast
from ernie_train.model.numpy_decoder import Prediction


class PaddleDecoder:
    """Decodes with the model's own forward pass, where `NumpyDecoder` cannot compute the model.

    On a GPU logits stay there, for a `DeviceSampler`. They are made in float32 by a copy of the
    head, as those of an update are (`losses.token_logprobs`): weights must not change meanwhile.
    """

    def __init__(self, model: Ernie4_5_MoeForCausalLM) -> None:
        self.model = model
        weight, bias = model.head()
        self.head = cast(weight, paddle.float32)
        self.bias = None if bias is None else cast(bias, paddle.float32)
        self.on_gpu = bool(model.model.norm.weight.place.is_gpu_place())

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """Return a cache for `batch` sequences of at most `slots` tokens, to be filled."""
        return self.model.new_cache(batch, slots)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KVCache,
        sequences: np.ndarray,
        recorded: list[np.ndarray] | None = None,
    ) -> Prediction:
        """Fill `sequences` of `cache` in one pass and predict, as `NumpyDecoder` does."""
        cache.start(sequences)
        input_ids, document_ids = _right_padded(prompts)
        output = self.model.model(input_ids, document_ids=document_ids, kv_cache=cache)
        ends = np.cumsum(output.layout.row_counts)
        if recorded is not None and output.router_stats:
            chosen = paddle.stack([stats.expert_ids for stats in output.router_stats], 1).numpy()
            recorded += [part[:-1] for part in np.split(chosen, ends[:-1])]
        last = paddle.to_tensor(ends - 1)
        experts = [paddle.gather(stats.expert_ids, last) for stats in output.router_stats]
        return self._prediction(paddle.gather(output.hidden, last), experts)

    def __call__(self, tokens: np.ndarray, cache: KVCache) -> Prediction:
        """Append `tokens` [B] to the sequences of `cache` and predict the next ones."""
        output = self.model.model(paddle.to_tensor(tokens[:, None]), kv_cache=cache)
        return self._prediction(output.hidden, [stats.expert_ids for stats in output.router_stats])

    def _prediction(self, hidden: Tensor, experts: list[Tensor]) -> Prediction:
        logits = paddle.matmul(cast(hidden, paddle.float32), self.head, transpose_y=True)
        logits = logits if self.bias is None else logits + self.bias
        logits = logits if self.on_gpu else logits.numpy()
        return logits, list(paddle.stack(experts).numpy()) if experts else []


def _right_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, np.ndarray]:
    """Return input ids and document ids, each [B, longest prompt]; document id 0 is padding."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), np.int64)
    document_ids = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        document_ids[row, : len(prompt)] = 1
    return paddle.to_tensor(ids), document_ids
