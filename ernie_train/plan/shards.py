"""What each rank updates: parameters are dealt out whole, so that one rank has more than its share.

The same dealing as in parallel/gradients.py, on sizes alone.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ernie_train import distributed
from ernie_train.hf_layout import LM_HEAD, parameter_shapes
from ernie_train.model import is_expert_parameter
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.layout import Layout, moe_layers


def updated_by_rank(
    config: Ernie4_5_MoeConfig, layout: Layout, *, critic: bool = False
) -> list[int]:
    """How many parameters each rank keeps optimizer state for; with `critic` those of a critic."""
    dense, experts = _sizes(config, layout, critic=critic)
    if not layout.sharding:
        return [sum(dense) + sum(experts)] * layout.ranks
    of_dense, of_experts = _loads(dense, layout.ranks), _loads(experts, layout.data)
    return [of_dense[rank] + of_experts[rank // layout.expert] for rank in range(layout.ranks)]


def _sizes(
    config: Ernie4_5_MoeConfig, layout: Layout, *, critic: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of each trained parameter that a rank holds: dense ones, and stacks of experts."""
    here = range(config.moe_num_experts // layout.expert) if moe_layers(config) else None
    shapes = parameter_shapes(config, here)
    sizes = {n: math.prod(s) for n, s in shapes.items() if not n.endswith("correction_bias")}
    if critic:
        sizes = {n: size for n, size in sizes.items() if not n.startswith(_HEAD)}
        sizes |= {"value_head.weight": config.hidden_size, "value_head.bias": 1}
    dense = tuple(size for name, size in sizes.items() if not is_expert_parameter(name))
    return dense, tuple(size for name, size in sizes.items() if is_expert_parameter(name))


_HEAD = LM_HEAD.partition(".")[0] + "."


@lru_cache(maxsize=4096)
def _loads(sizes: tuple[int, ...], hands: int) -> list[int]:
    dealt = distributed.deal(sizes, hands)
    return [sum(sizes[at] for at in hand) for hand in dealt]
