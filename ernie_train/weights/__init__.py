"""Read and write models on disk: tensor names and layouts, Hugging Face directories, checkpoints.

Weights are stored as Hugging Face safetensors everywhere, inside a checkpoint too, so that any
parallel layout can read by tensor name what any other layout has written.
"""

from ernie_train.weights.checkpoint import Checkpoint, CheckpointStore
from ernie_train.weights.checkpoint_config import CheckpointConfig
from ernie_train.weights.hf import load_config, load_pretrained, load_weights
from ernie_train.weights.model_directory import ModelDirectory, find_model
from ernie_train.weights.saving import save_pretrained, write_weights

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
