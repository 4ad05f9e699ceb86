"""Build a model for training: placement of its experts and parameter dtypes."""

from __future__ import annotations

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.model.dtypes import default_dtype, dtype_name
from ernie_train.parallel.expert import expert_placement


def new_model(
    config: Ernie4_5_MoeConfig, dtype: str, *, initialize: bool = True
) -> Ernie4_5_MoeForCausalLM:
    """Return a freshly initialized model of `dtype`; routers and selection biases stay float32.

    Without `initialize` its parameters are zeros, to be overwritten.

    It holds the experts that the grid gives to this rank, with the values that they have on a
    single rank; without MoE layers it is whole. Raises `ConfigError` where the grid does not fit
    the experts.
    """
    with default_dtype(dtype):
        return Ernie4_5_MoeForCausalLM(config, expert_placement(config), initialize=initialize)


def clone_model(model: Ernie4_5_MoeForCausalLM) -> Ernie4_5_MoeForCausalLM:
    """Return a frozen copy with the same weights, dtype and RoPE base, in eval mode."""
    with default_dtype(dtype_name(model.head()[0])):
        copy = Ernie4_5_MoeForCausalLM(model.config, model.model.placement, initialize=False)
    copy.set_state_dict(model.state_dict())
    copy.set_rope_theta(model.model.rope_theta)
    for parameter in copy.parameters():
        parameter.stop_gradient = True
    copy.eval()
    return copy


def reference_model(model: Ernie4_5_MoeForCausalLM) -> Ernie4_5_MoeForCausalLM:
    """Return the model as it is now, for use within `adapter_off` of it while `model` trains.

    With an adapter alone in training that is the model itself; else it is a frozen copy.
    """
    partial = model.partial
    return model if partial is not None and partial.adapter_alone else clone_model(model)
