"""Turn a dense model into a mixture of experts that computes the same: sparse upcycling.

The D neurons of each dense MLP are dealt to the shared experts and to one routed expert, of which
all routed experts are copies (arXiv:2212.05055). Their weights sum to one after ERNIE's
normalization, so that their mixture is that one expert. Where D cannot be dealt evenly, neurons
are repeated with a zero column in `down_proj`, which adds nothing and still receives gradients.

Shapes: E experts, I width of an expert, D width of the dense MLP, H hidden size.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from ernie_train.core.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.weights.llama import Source

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp)\.(shared_experts|experts\.\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Upcycling:
    """Set the experts that a dense model gets.

    experts, top_k: routed experts of a layer, and how many of them a token uses.
    shared: shared experts.
    noise: standard deviation of noise on routed experts, relative to that of each tensor; above 0
        the first logits differ from the dense model's.
    seed: of routers and noise.
    """

    experts: int
    top_k: int
    shared: int = 0
    noise: float = 0.0
    seed: int = 0

    def config(self, dense: Ernie4_5_MoeConfig) -> Ernie4_5_MoeConfig:
        """Return the configuration of the mixture; its first layer stays dense, as in ERNIE 4.5.

        Raises:
            ConfigError: the numbers of experts are impossible, or the model has biases.
        """
        if dense.use_bias:
            raise ConfigError("use_bias = true: routed experts have no biases", source="--experts")
        return dense.with_overrides({
            "moe_num_experts": self.experts, "moe_k": self.top_k,
            "moe_num_shared_experts": self.shared,
            "moe_intermediate_size": -(-dense.intermediate_size // (self.shared + 1)),
            "moe_layer_start_index": min(1, dense.num_hidden_layers - 1),
            "moe_layer_end_index": -1,
        })  # fmt: skip


@dataclass(frozen=True)
class UpcycledSource:
    """Read the tensors of the mixture, by their names on disk, out of a dense model."""

    source: Source
    settings: Upcycling
    config: Ernie4_5_MoeConfig

    def origin(self, name: str) -> str | None:
        """Return the dense tensor that a stored one is made from; None for routers."""
        if match := _EXPERT.fullmatch(name):
            return f"{match[1]}.{match[3]}.weight"
        return name if name in self.source.shapes else None

    def read(self, name: str) -> np.ndarray:
        """Return a tensor of the mixture."""
        match, experts = _EXPERT.fullmatch(name), self.config.moe_num_experts
        if name.endswith(".mlp.gate.weight"):
            shape = (experts, self.config.hidden_size)
            return self._random(name, shape) * np.float32(self.config.initializer_range)
        if name.endswith("e_score_correction_bias"):
            return np.zeros((1, experts), np.float32)
        if match is None:
            return self.source.read(name)
        return self._neurons(name, match[2] == "shared_experts", match[3])

    def _neurons(self, name: str, shared: bool, part: str) -> np.ndarray:
        dense = self.source.read(self.origin(name) or name)
        axis = 1 if part == "down_proj" else 0
        width, held = dense.shape[axis], self.config.moe_num_shared_experts
        each = self.config.moe_intermediate_size
        mine = np.arange(held * each) if shared else np.arange(held * each, (held + 1) * each)
        array = dense.take(mine % width, axis=axis)
        if part == "down_proj":
            array[:, mine >= width] = 0
        if self.settings.noise and not shared:
            scale = np.float32(self.settings.noise * float(dense.std(dtype=np.float64)))
            array = array.astype(np.float32) + self._random(name, array.shape) * scale
        return array

    def _random(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Draw normal numbers that depend on seed and name alone."""
        key = [self.settings.seed, zlib.crc32(name.encode())]
        return np.random.default_rng(key).standard_normal(shape, np.float32)
