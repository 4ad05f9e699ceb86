"""Draws single items from reasoning-gym (Apache-2.0)."""

import random
from typing import Any

_SEED_RANGE = 2**31


def draw(name: str, rng: random.Random, **config: Any) -> dict[str, Any]:
    """Return one item `{question, answer, metadata}` of the named reasoning-gym data set.

    Item i of seed s is made from `Random(s + i)` there, so neighbouring seeds share items. Each
    draw here takes item 0 of a seed of its own; repeats are dropped by the caller, who splits by
    the problem and not by the seed.
    """
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=rng.randrange(_SEED_RANGE), size=1, **config)[0]
