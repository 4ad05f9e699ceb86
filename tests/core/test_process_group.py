"""Ranks, barrier and sums, on one process and on two."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_train.core import process_group
from ernie_train.core.errors import ConfigError
from tests.parallel.ranks import start_on_ranks

REPOSITORY = Path(__file__).resolve().parents[2]

TWO_RANKS = """
import json, sys
from pathlib import Path
from ernie_train.core import process_group as d
out = Path(sys.argv[1])
d.barrier()
sums = d.all_reduce_sum([1.0 + d.rank(), 2.0**53 * (1 - d.rank()) + 2 * d.rank(), 1e-300])
if d.is_main():
    (out / "written_by_main").touch()
d.barrier()
seen = (out / "written_by_main").exists()
result = {"rank": d.rank(), "world": d.world_size(), "sums": sums, "seen": seen}
(out / f"rank{d.rank()}.json").write_text(json.dumps(result))
"""

FROM_RANK_0 = """
import sys
from pathlib import Path
import numpy as np
import paddle
from ernie_train.core import consensus
from ernie_train.core import process_group as d
from ernie_train.core.errors import ConfigError, EngineError, FailedElsewhere
d._BROADCAST_BYTES = 1000
sent, broadcast = [], paddle.distributed.broadcast
paddle.distributed.broadcast = lambda t, src: sent.append(t.size) or broadcast(t, src=src)
def gather(*arguments): raise AssertionError("every rank would hold the parts of all")
gather_object, paddle.distributed.all_gather_object = paddle.distributed.all_gather_object, gather
table = np.arange(1300, dtype=np.int16)
own = lambda: {"table": table, "again": [table], "rank": d.rank()}
found = consensus.run_on_main(own)
np.testing.assert_array_equal(found["table"], table)
assert found["again"][0] is found["table"] and found["rank"] == 0
assert len(sent) == 3 and max(sent) == 1000 and 2600 < sum(sent) < 3000, sent
assert consensus.run_on_main(lambda: None) is None
paddle.distributed.all_gather_object = gather_object  # of the error alone
def fail(error): raise error
for error, elsewhere in ((ConfigError("no"), FailedElsewhere), (EngineError("no"), EngineError)):
    expected = elsewhere if d.rank() else type(error)
    try:
        consensus.run_on_main(lambda: fail(error))
    except expected as raised:
        assert type(raised) is expected
    else:
        raise AssertionError("nothing was raised")
(Path(sys.argv[1]) / f"passed{d.rank()}").touch()
"""


def test_numbers_of_all_ranks_are_one_copy_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of experts waits for its counts: with a copy a rank it would wait eight times."""
    import paddle

    copies: list[int] = []
    numpy = paddle.Tensor.numpy
    monkeypatch.setattr(process_group, "world_size", lambda: 8)
    monkeypatch.setattr(process_group, "sync", lambda: None)
    monkeypatch.setattr(
        paddle.distributed, "all_gather", lambda parts, own: parts.extend(own + n for n in range(8))
    )
    monkeypatch.setattr(paddle.Tensor, "numpy", lambda t: copies.append(t.size) or numpy(t))
    found = process_group.all_gather_ints([2, 5])
    assert found.tolist() == [[2 + n, 5 + n] for n in range(8)] and found.dtype == "int64"
    assert copies == [16]
    assert process_group.sum_over_ranks([1, 7], 0.5) == 9.0
    assert copies == [16, 8]


def test_a_single_process_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    monkeypatch.setenv("PADDLE_TRAINER_ID", "3")  # left over from somewhere else
    assert (process_group.rank(), process_group.world_size()) == (0, 1)
    assert process_group.is_main()
    assert process_group.all_reduce_sum([0.1, 3]) == [0.1, 3.0]
    process_group.barrier()


def test_a_single_process_does_not_load_paddle() -> None:
    code = (
        "import sys; from ernie_train.core import process_group as d; "
        "d.barrier(); d.init_process_group(); d.all_reduce_sum([1.0]); "
        "print('paddle' in sys.modules)"
    )
    environ = {k: v for k, v in os.environ.items() if k != "PADDLE_TRAINERS_NUM"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_the_launcher_s_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "2")
    assert (process_group.rank(), process_group.world_size()) == (2, 4)
    assert not process_group.is_main()


def test_two_ranks_wait_and_add_up(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    start_on_ranks(2, str(script), tmp_path)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    # In float32 the second would lose its 2 and the third would be 0.
    expected = {"world": 2, "sums": [3.0, 2.0**53 + 2, 2e-300], "seen": True}
    assert results == [{"rank": rank, **expected} for rank in (0, 1)]


def test_what_rank_0_found_reaches_the_others_in_parts_and_so_do_its_errors(tmp_path: Path) -> None:
    script = tmp_path / "from_rank_0.py"
    script.write_text(FROM_RANK_0)
    start_on_ranks(3, str(script), tmp_path)
    assert len(list(tmp_path.glob("passed*"))) == 3


def test_sums_of_what_is_not_finite_are_left_to_those_who_look_at_them():
    assert math.isnan(process_group._sum([math.inf, -math.inf]))
    assert process_group._sum([0.1] * 10) == 1.0


@pytest.mark.parametrize(("device", "backend"), [("cpu", "NCCL"), ("gpu", "GLOO")])
def test_ranks_that_others_started_for_another_device_are_told(monkeypatch, device, backend):
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr("paddle.distributed.get_backend", lambda: backend)
    with pytest.raises(ConfigError, match="PADDLE_DISTRI_BACKEND"):
        process_group.require_backend(device)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "GLOO"), ("gpu", "NCCL")])
def test_a_device_goes_with_its_backend(monkeypatch, device, backend):
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr("paddle.distributed.get_backend", lambda: backend)
    process_group.require_backend(device)
