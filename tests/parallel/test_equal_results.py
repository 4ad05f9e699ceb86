"""Real processes over gloo: every layout of ranks trains what one rank trains.

How far two correct runs may be apart is measured: by one rank whose micro-batches, and so its
gradients' sums, come in another order.
"""

from __future__ import annotations

import numpy as np
import pytest

from ernie_train.core.process_group import Grid
from tests.parallel.ranks import start_on_ranks
from tests.parallel.scenario import distance, train

# expert, data, sharding (1: of the optimizer's state, 2: of gradients too), recompute
ON_TWO = [
    "2,1,0,none", "2,1,1,layers", "1,2,0,none", "1,2,1,none", "1,2,2,layers", "2,1,2,none",
    "2,1,0,experts", "2,1,0,experts of 2", "2,1,1,chunks",
]  # fmt: skip
ON_FOUR = [
    "4,1,0,none", "4,1,1,layers", "2,2,0,none", "2,2,1,experts", "2,2,2,layers",
    "2,2,0,chunks of experts",
]  # fmt: skip
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def one():
    return train(Grid())


@pytest.fixture(scope="module")
def apart(one):
    """How far one rank is from itself when sums are taken in another order."""
    orders = ([3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1])
    return max(distance(one, train(Grid(), order=order), "weight") for order in orders)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every rank of every layout gave."""
    out = tmp_path_factory.mktemp("grids")
    start_on_ranks(2, "train_grids.py", out, *ON_TWO, timeout_s=300)
    start_on_ranks(4, "train_grids.py", out, *ON_FOUR, timeout_s=300)
    read = {path.stem: dict(np.load(path)) for path in sorted(out.glob("*.npz"))}
    return {grid: [r for name, r in read.items() if name.startswith(f"{grid}-rank")]
            for grid in (*ON_TWO, *ON_FOUR)}  # fmt: skip


@pytest.mark.parametrize("grid", [*ON_TWO, *ON_FOUR])
def test_a_layout_gives_the_results_of_one_rank(one, apart, found, grid):
    ranks = found[grid]
    assert len(ranks) == (2 if grid in ON_TWO else 4)
    for result in ranks:
        assert result.keys() - {"exchanged"} == one.keys()
        for name in (n for n in one if n.startswith("metric/")):
            np.testing.assert_allclose(result[name], one[name], rtol=RELATIVE, err_msg=name)
        for name in (n for n in one if n.startswith("gradient/")):
            assert distance(one, result, name) < RELATIVE, name
        np.testing.assert_array_equal(result["load"], one["load"])
        assert result["tokens"] == one["tokens"]
        for name in (n for n in one if n.startswith("bias/")):
            np.testing.assert_array_equal(result[name], one[name])
        assert distance(one, result, "weight") <= 3 * apart


@pytest.mark.parametrize("grid", [*ON_TWO, *ON_FOUR])
def test_ranks_hold_the_same_bits(found, grid):
    first, *others = found[grid]
    for other in others:
        for name in (n for n in first if n.startswith(("weight/", "metric/"))):
            np.testing.assert_array_equal(other[name], first[name], err_msg=name)


@pytest.mark.parametrize("recompute", ["experts", "experts of 2"])
def test_experts_that_run_again_exchange_once_more_to_the_same_bits(found, recompute):
    """Rows go out and home, then their gradients; run again, rows go out and home once more.

    Rows go out with their weight, so it is all ranks together that send half as much again.
    """
    kept, again = found["2,1,0,none"], found[f"2,1,0,{recompute}"]
    for one_rank, same_rank in zip(kept, again, strict=True):
        for name in (n for n in one_rank if n != "exchanged"):
            np.testing.assert_array_equal(same_rank[name], one_rank[name], err_msg=name)
    more = sum(r["exchanged"] for r in again) / sum(r["exchanged"] for r in kept)
    if recompute == "experts of 2":  # of which one has an exchange, of two in all
        assert 1.1 < more < 1.4
    else:
        assert more == 1.5
