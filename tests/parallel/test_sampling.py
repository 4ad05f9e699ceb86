"""Ranks whose shares are sampled by several processes each. Referee: one rank and one process."""

from __future__ import annotations

import json

from tests.parallel.ranks import start_on_ranks
from tests.parallel.sampling_ranks import sampled


def test_processes_of_two_ranks_sample_what_one_does(tmp_path):
    start_on_ranks(2, "sampling_ranks.py", tmp_path)
    expected = sampled()
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result == {"ids": expected, "stopped": True, "forks": 2}
