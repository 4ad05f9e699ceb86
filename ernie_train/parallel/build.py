"""Making a model for training: its experts' place and parameter dtypes."""

from __future__ import annotations

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.pylayer import default_dtype, dtype_name
from ernie_train.parallel.expert import experts_placed


def new_model(config: Ernie4_5_MoeConfig, dtype: str) -> Ernie4_5_MoeForCausalLM:
    """A freshly initialized model with parameters of `dtype`; router and its bias stay float32.

    It holds the experts that the grid gives to this rank, with the numbers that they have on one.
    Raises `ConfigError` where the grid does not fit the experts.
    """
    with default_dtype(dtype):
        return Ernie4_5_MoeForCausalLM(config, experts_placed(config))


def clone_model(model: Ernie4_5_MoeForCausalLM) -> Ernie4_5_MoeForCausalLM:
    """A model of its own with the same weights, dtype and RoPE base, in eval mode, not trained."""
    with default_dtype(dtype_name(model.head()[0])):
        copy = Ernie4_5_MoeForCausalLM(model.config, model.model.placement)
    copy.set_state_dict(model.state_dict())
    copy.set_rope_theta(model.model.rope_theta)
    for parameter in copy.parameters():
        parameter.stop_gradient = True
    copy.eval()
    return copy
