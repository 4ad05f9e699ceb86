"""Ranks that sample together. Referee: one rank and one process."""

from __future__ import annotations

import json

import numpy as np

from tests.parallel import expert_sampling_ranks
from tests.parallel.ranks import start_on_ranks
from tests.parallel.sampling_ranks import sampled


def test_processes_of_two_ranks_sample_what_one_does(tmp_path):
    start_on_ranks(2, "sampling_ranks.py", tmp_path)
    expected = sampled()
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == {"ids": expected, "stopped": True, "forks": 2}


def test_ranks_of_an_expert_group_sample_what_one_does(tmp_path):
    """Lanes are refilled on one rank while others decode: each joins all passes of the others."""
    start_on_ranks(2, "expert_sampling_ranks.py", tmp_path)
    expected = expert_sampling_ranks.sampled()
    for rank in range(2):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
