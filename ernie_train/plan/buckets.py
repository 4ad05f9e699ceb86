"""Gradients on their way to other ranks while the backward pass goes on.

Buckets leave as in parallel/reduction.py, each with a buffer of its own, here on sizes alone.
"""

from __future__ import annotations

import math
import re
from heapq import nlargest

from ernie_train.model import is_expert_parameter
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.layout import Layout, moe_layers
from ernie_train.weights.layout import parameter_shapes

# Those of parallel/gradients.py and parallel/reduction.py, which load Paddle.
BUCKET_NUMBERS, IN_FLIGHT = 2**23, 4

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(?!mlp\.gate\.|mlp\.moe_statics\.)")
_AFTER_LAYERS = ("model.norm.", "lm_head.")

_known: dict[tuple[str, int, int], list[int]] = {}  # a plan asks a thousand times


def numbers_in_flight(config: Ernie4_5_MoeConfig, layout: Layout) -> list[int]:
    """For each layer, the most numbers that are on their way while it goes back.

    Gradients of what comes after it, in as many buckets as may be under way; in the last backward
    pass of a step, so at its peak. What leaves after the pass is not in it.
    """
    key = (repr(config), layout.expert, layout.data)
    if key not in _known:
        _known[key] = _in_flight(config, layout)
    return _known[key]


def _in_flight(config: Ernie4_5_MoeConfig, layout: Layout) -> list[int]:
    *layers, leaving = _sizes(config, layout)
    total, largest, found = 0, [0] * IN_FLIGHT, []
    for own in reversed(layers):
        total += sum(leaving)
        buckets = [max(size, BUCKET_NUMBERS) for size in leaving]
        largest = nlargest(IN_FLIGHT, [*largest, *buckets])
        found.append(min(total, sum(largest)))
        leaving = own
    return found[::-1]


def _sizes(config: Ernie4_5_MoeConfig, layout: Layout) -> list[list[int]]:
    """Of each layer, and of what comes after them: parameters that other ranks hold too."""
    shapes = parameter_shapes(config, range(1) if moe_layers(config) else None)
    sizes: list[list[int]] = [[] for _ in range(config.num_hidden_layers + 1)]
    for name, shape in shapes.items():
        spread = is_expert_parameter(name)
        here = config.moe_num_experts // layout.expert if spread else 1
        if (layout.data if spread else layout.ranks) == 1:
            continue
        if layer := _IN_LAYER.match(name):
            sizes[int(layer.group(1))].append(here * math.prod(shape))
        elif name.startswith(_AFTER_LAYERS):
            sizes[-1].append(here * math.prod(shape))
    return sizes
