"""How a model is laid over devices: dtypes and recomputation now."""

from ernie_train.parallel.wrap import clone_model, enable_recompute, new_model

__all__ = ["clone_model", "enable_recompute", "new_model"]
