"""On every rank: trains under each grid that is named `expert,data,sharding,recompute`.

sharding: 1 shards the optimizer's state, 2 gradients too.
"""

import sys
from pathlib import Path

import numpy as np

import ernie_train  # noqa: F401
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from tests.parallel.scenario import train

out = Path(sys.argv[1])
for text in sys.argv[2:]:
    *numbers, recompute = text.split(",")
    expert, data, sharding = map(int, numbers)
    grid = Grid(expert, data, sharding > 0)
    result = train(grid, recompute=recompute, shards_gradients=sharding == 2)
    np.savez(out / f"{text}-rank{process_group.rank()}.npz", **result)
