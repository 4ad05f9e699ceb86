"""Models on disk: the names and layouts of their tensors, Hugging Face directories, checkpoints.

Weights lie as Hugging Face safetensors everywhere, inside a checkpoint too, so any parallel layout
reads what any other wrote, by tensor name.
"""

from ernie_train.weights.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    CheckpointStore,
    ModelDirectory,
    find_model,
)
from ernie_train.weights.hf import (
    load_config,
    load_pretrained,
    load_weights,
    save_pretrained,
    write_weights,
)

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointStore",
    "ModelDirectory",
    "find_model",
    "load_config",
    "load_pretrained",
    "load_weights",
    "save_pretrained",
    "write_weights",
]
