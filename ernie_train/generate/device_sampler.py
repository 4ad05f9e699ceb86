"""Sample on the device that computes the logits, as `Sampler` does on the host.

The logits of 256 sequences over a vocabulary of 100,000 are 100 MB a token: to copy them from a GPU
and take numpy's exponentials would last ten times as long as the model's own pass.

Shapes: B sequences whose next token is sampled, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from ernie_train.generate.sampler import Sampler


class DeviceSampler(Sampler):
    """Draws with the same random numbers from the same distribution; sums differ by rounding."""

    def __call__(
        self, logits: Tensor, lanes: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Sample token number `steps` [B] of the sequences in `lanes` [B]; logits [B,V] float32.

        Returns tokens [B] and logprobs [B] float32 as `Sampler` does, by one copy from the device.
        """
        config = self.config
        if config.temperature not in (0.0, 1.0):
            logits = logits / config.temperature
        shifted = logits - logits.max(-1, keepdim=True)
        mass = paddle.exp(shifted)
        total = mass.sum(-1, keepdim=True)
        if config.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            if config.top_p < 1 or config.top_k:
                mass = _truncated(mass / total, config.top_p, config.top_k)
            tokens = _drawn(mass, paddle.to_tensor(self.uniform[lanes, steps][:, None]))
        logprobs = paddle.take_along_axis(shifted, tokens, 1) - paddle.log(total)
        both = paddle.concat([tokens.astype("float64"), logprobs.astype("float64")], 1).numpy()
        return both[:, 0].astype(np.int64), both[:, 1].astype(np.float32)


def _truncated(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return probs [B,V] with the tail beyond top-k and top-p at zero."""
    order = paddle.argsort(probs, axis=-1, descending=True, stable=True)
    sorted_probs = paddle.take_along_axis(probs, order, 1)
    wide = sorted_probs.astype("float64")
    # A token stays while the mass before it is below top_p, so the first always stays.
    kept = (paddle.cumsum(wide, -1) - wide) < top_p
    if top_k:
        kept = paddle.logical_and(kept, paddle.arange(probs.shape[1]) < top_k)
    kept_probs = sorted_probs * kept.astype(probs.dtype)
    return paddle.put_along_axis(paddle.zeros_like(probs), order, kept_probs, 1)


def _drawn(mass: Tensor, uniform: Tensor) -> Tensor:
    """Return a token per row [B,1] by inverting its cumulative distribution.

    mass [B,V] need not sum to 1; uniform [B,1] float64 in [0, 1). None has a mass of zero.
    """
    sums = paddle.cumsum(mass.astype("float64"), -1)
    total = sums[:, -1:]
    below_total = paddle.minimum(uniform * total, total * (1 - 1e-15))
    return (sums <= below_total).astype("int64").sum(-1, keepdim=True)
