"""The ERNIE 4.5 model: configuration, layers, key/value cache."""

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.kv_cache import KVCache
from ernie_train.model.moe import RouterStats
from ernie_train.model.token_dispatcher import (
    Dispatcher,
    LocalDispatcher,
    Placement,
    is_expert_parameter,
)
from ernie_train.model.transformer import (
    CausalLMOutput,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5_MoeModel,
    HiddenOutput,
)

__all__ = [
    "CausalLMOutput",
    "Dispatcher",
    "Ernie4_5_MoeConfig",
    "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_MoeModel",
    "HiddenOutput",
    "KVCache",
    "LocalDispatcher",
    "Placement",
    "RouterStats",
    "is_expert_parameter",
]
