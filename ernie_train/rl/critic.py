"""Decoders with a scalar head; of them the critic of PPO, which predicts returns.

Shapes: B rows, S positions, T real tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_train.core.errors import WeightsError
from ernie_train.io.safetensors import TensorFiles, to_bfloat16
from ernie_train.model import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5_MoeModel,
    HiddenOutput,
)
from ernie_train.model.dtypes import default_dtype, dtype_name, zero_parameters
from ernie_train.parallel import owned_names
from ernie_train.weights.adapters import from_disk, to_disk
from ernie_train.weights.layout import TensorMapping


class ScalarModel(nn.Layer):
    """A decoder with a scalar head [H] instead of its vocabulary.

    The head starts at zeros, so that the first values are 0. It is float32 beside a bfloat16
    decoder too: eight bits of a value would hardly tell two completions apart.
    """

    def __init__(
        self, config: Ernie4_5_MoeConfig, decoder: Ernie4_5_MoeModel, *, bias: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.model = decoder
        with default_dtype("float32"), zero_parameters():
            self.value_head = nn.Linear(config.hidden_size, 1, bias_attr=None if bias else False)

    def forward(self, input_ids: Tensor, document_ids: Any) -> tuple[Tensor, HiddenOutput]:
        """input_ids, document_ids [B,S] -> values [T] of the real tokens, and the hidden states."""
        output = self.model(input_ids, document_ids=document_ids)
        return self.value_head(output.hidden.astype("float32")).squeeze(-1), output

    def to_disk(self, named: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Parameters, or their moments, under the names that a model directory has for them."""
        return to_disk(self, named, self._head())

    def from_disk(self, stored: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The inverse of `to_disk`, read on access; `WeightsError` for arrays of another model."""
        return from_disk(self, stored, self._head())

    def _head(self) -> list[TensorMapping]:
        """Return the mappings of the head, which is stored as it is."""
        shapes = {f"value_head.{n}": tuple(p.shape) for n, p in self.value_head.named_parameters()}
        return [TensorMapping(name, shape, name, shape) for name, shape in shapes.items()]


class Critic(ScalarModel):
    """A copy of a policy's decoder; its value at a token is the return expected after it."""

    def __init__(self, policy: Ernie4_5_MoeForCausalLM) -> None:
        with default_dtype(dtype_name(policy.head()[0])), zero_parameters():
            decoder = Ernie4_5_MoeModel(policy.config, policy.model.placement)
        super().__init__(policy.config, decoder, bias=True)
        decoder.rope_theta = policy.model.rope_theta
        decoder.run_layer = policy.model.run_layer
        decoder.set_state_dict(policy.model.state_dict())

    def load_directory(self, directory: Path) -> None:
        """Starts from the `critic/` directory of a checkpoint; `WeightsError` for a misfit."""
        if not directory.is_dir():
            raise WeightsError(f"{directory}: no such directory with a critic")
        try:
            self.load(TensorFiles(directory, "model"))
        except WeightsError as error:
            raise WeightsError(f"{directory}: {error}") from None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The weights that this rank writes, under their names on disk."""
        state = self.state_dict()
        mine = owned_names(state)
        return self.to_disk({n: t.numpy() for n, t in state.items() if n in mine})

    def load(self, stored: Mapping[str, np.ndarray]) -> None:
        """Fills the critic with what `arrays` gave on all ranks.

        Raises `WeightsError` if it was of another size.
        """
        arrays = self.from_disk(stored)
        own = self.state_dict()
        if missing := [name for name in own if name not in arrays]:
            raise WeightsError(
                f"the critic is of another size than the policy: {', '.join(missing[:5])}"
            )
        for name, tensor in own.items():
            try:
                array = arrays[name]
            except WeightsError as error:
                raise WeightsError(
                    f"the critic is of another size than the policy: {error}"
                ) from None
            # Arrays are float32 from the disk, and bits of bfloat16 (uint16) from `arrays`.
            is_low = tensor.dtype == paddle.bfloat16 and array.dtype != np.uint16
            tensor.set_value(to_bfloat16(array) if is_low else array)
