"""What each rank updates: parameters are dealt out whole, so that one rank has more than its share.

The same dealing as in parallel/gradients.py, on sizes alone.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ernie_train.core import process_group
from ernie_train.model import is_expert_parameter
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.layout import Layout, moe_layers
from ernie_train.weights.layout import parameter_shapes

_Sizes = tuple[int, ...]


def updated_by_rank(
    config: Ernie4_5_MoeConfig, layout: Layout, *, critic: bool = False
) -> list[int]:
    """How many parameters each rank keeps optimizer state for; with `critic` those of a critic."""
    dense, expert = _sizes(config)
    if critic:
        dense = _sizes_of_critic(config)
    here = config.moe_num_experts // layout.expert
    experts = tuple(size * here for size in expert)
    if not layout.sharding:
        return [sum(dense) + sum(experts)] * layout.ranks
    of_dense, of_experts = _loads(dense, layout.ranks), _loads(experts, layout.data)
    return [of_dense[rank] + of_experts[rank // layout.expert] for rank in range(layout.ranks)]


_known: dict[str, tuple[_Sizes, _Sizes]] = {}  # by the configuration: a plan asks a thousand times


def _sizes(config: Ernie4_5_MoeConfig) -> tuple[_Sizes, _Sizes]:
    """Numbers of each trained parameter: dense ones, and stacks of experts with one expert each."""
    key = repr(config)
    if key not in _known:
        shapes = parameter_shapes(config, range(1) if moe_layers(config) else None)
        sizes = {n: math.prod(s) for n, s in shapes.items() if not n.endswith("correction_bias")}
        experts = tuple(size for name, size in sizes.items() if is_expert_parameter(name))
        _known[key] = (tuple(s for n, s in sizes.items() if not is_expert_parameter(n)), experts)
    return _known[key]


def _sizes_of_critic(config: Ernie4_5_MoeConfig) -> _Sizes:
    """Its dense parameters: a weight and a bias of the value instead of the vocabulary's head."""
    dense = list(_sizes(config)[0])
    if not config.tie_word_embeddings:
        dense.remove(config.vocab_size * config.hidden_size)
    if config.lm_head_has_bias:
        dense.remove(config.vocab_size)
    return (*dense, config.hidden_size, 1)


@lru_cache(maxsize=4096)
def _loads(sizes: _Sizes, hands: int) -> list[int]:
    """What is in each hand; for a single one nothing need be dealt."""
    if hands == 1:
        return [sum(sizes)]
    return [sum(sizes[at] for at in hand) for hand in process_group.partition_by_size(sizes, hands)]
