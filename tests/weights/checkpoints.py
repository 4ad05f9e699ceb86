"""A small model, its optimizer and its checkpoints, for the tests of `CheckpointStore`."""

from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.weights.checkpoint import (
    CheckpointConfig,
    CheckpointStore,
)
from ernie_train.weights.layout import tensor_mappings, to_stored

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 8,
    "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
}  # fmt: skip


def make_model(seed: int = 0, **keys: Any) -> Ernie4_5_MoeForCausalLM:
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**TINY, **keys}))
    random = np.random.default_rng(seed)
    for tensor in model.state_dict().values():
        tensor.set_value(random.standard_normal(tensor.shape).astype(np.float32))
    return model


def weights(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def moments(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    return {
        f"m/{name}": array * 2
        for name, array in to_stored(tensor_mappings(model.config), weights(model))
    }


def save(store: CheckpointStore, step: int, **metrics: float) -> Path:
    model = make_model(step)
    return store.save(
        step, model=model, optimizer=moments(model), state={"seen": step * 10}, metrics=metrics
    )


def make_store(directory: Path, **keys: Any) -> CheckpointStore:
    return CheckpointStore(directory, CheckpointConfig(max_shard_size="10KB", **keys))


def check(store: CheckpointStore, path: Path, step: int) -> None:
    """The checkpoint in `path` holds exactly what `save` wrote at `step`."""
    saved = store.load(path)
    assert (saved.step, saved.state) == (step, {"seen": step * 10})
    model, expected = make_model(99), make_model(step)
    saved.load_model(model)
    for name, array in weights(expected).items():
        np.testing.assert_array_equal(weights(model)[name], array)
    assert saved.optimizer.keys() == moments(expected).keys()
    for name, array in moments(expected).items():
        np.testing.assert_array_equal(saved.optimizer[name], array)
