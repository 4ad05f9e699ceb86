"""AdamW written down a second time, for `iteration_referee.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


class AdamW:
    """AdamW after clipping to a norm, with decay on matrices (arXiv:1711.05101)."""

    def __init__(self, config: Any) -> None:
        self.config, self.moments, self.steps = config, {}, 0

    def update(self, weights: dict[str, Array], grads: dict[str, Array]) -> float:
        c, norm = self.config, np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = c.clip_grad_norm / norm if c.clip_grad_norm and norm > c.clip_grad_norm else 1.0
        self.steps += 1
        for name, grad in grads.items():
            m, v = self.moments.get(name, (0.0, 0.0))
            m = c.beta1 * m + (1 - c.beta1) * grad * scale
            v = c.beta2 * v + (1 - c.beta2) * (grad * scale) ** 2
            self.moments[name] = m, v
            if grad.ndim > 1:
                weights[name] = weights[name] * (1 - c.lr * c.weight_decay)
            above, below = m / (1 - c.beta1**self.steps), v / (1 - c.beta2**self.steps)
            weights[name] = weights[name] - c.lr * above / (np.sqrt(below) + c.eps)
        return float(norm)
