"""Ranks under supervision: real processes through Paddle's launcher, over gloo.

Each launch takes some seconds, most of them for Paddle's own start.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from ernie_train.core import processes
from tests.launch.launched import Launch, left_behind, wait_for


@pytest.fixture
def launch(tmp_path):
    """Starts toy ranks; afterwards no process of theirs may be left."""
    started: list[Launch] = []

    def start(behaviour: str, **settings: Any) -> Launch:
        started.append(Launch(behaviour, tmp_path, **settings))
        return started[-1]

    yield start
    for found in started:
        if found.process.poll() is None:
            found.process.kill()
            found.process.wait()
    wait_for(lambda: not left_behind(tmp_path), "processes were left behind", 5)


# ---- statuses and messages -----------------------------------------------------------------------


def test_ranks_that_finish_also_where_one_is_stopped_for_a_while(launch, tmp_path):
    started = launch("alone", steps=40, hang_timeout_s=6)
    started.wait_for_step(2)
    os.kill(started.rank(1), signal.SIGSTOP)
    time.sleep(3)
    os.kill(started.rank(1), signal.SIGCONT)
    status, out, err = started.end()
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "rank 0 has begun"
    assert "step 40 of rank 0" in out
    assert "of rank 1" not in out, "only rank 0 is shown"
    assert "step 40 of rank 1" in (tmp_path / "logs/rank_1.log").read_text()


def test_a_mistake_of_the_user_is_reported_once(launch):
    status, out, err = launch("mistake", max_restarts=3).end()
    assert status == 2
    assert err == "error: the recipe is wrong, in every rank"
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("behaviour", "status", "message"),
    [
        ("not_finite", 4, "error: step 7 would not be finite"),
        ("elsewhere", 2, "error: rank 1 sees no data"),
    ],
)
def test_the_first_failing_rank_gives_the_status(launch, behaviour, status, message):
    assert launch(behaviour, max_restarts=3).end() == (status, "rank 0 has begun\n", message)


def test_a_defect_in_one_rank_ends_all_and_shows_what_it_printed(launch, tmp_path):
    status, out, err = launch("defect").end()
    assert status == 1
    assert err.startswith("error: rank 1: ValueError: boom (a defect")
    assert f"rank 1 printed last ({tmp_path}/logs/rank_1.log):" in err
    assert err.endswith("what rank 1 was doing")
    assert "what rank 1 was doing" not in out


# ---- signals -------------------------------------------------------------------------------------


def test_a_signal_reaches_every_rank_once_and_they_agree(launch, tmp_path):
    started = launch("together", steps=500)
    started.wait_for_step(2)
    started.process.send_signal(signal.SIGINT)
    status, _, err = started.end()
    assert status == 3, err
    assert "stopped on a signal after step" in err and "error:" not in err
    assert err.count("stopped") == 1
    for rank in (0, 1):
        assert (tmp_path / f"signals_{rank}").read_text().split() == ["SIGTERM"]


def test_a_signal_during_the_start_is_kept(launch):
    started = launch("together", steps=500)
    time.sleep(1.0)  # the launcher is loading Paddle
    started.process.send_signal(signal.SIGTERM)
    status, _, err = started.end()
    assert status == 3, err
    assert "stopped on a signal after step 1" in err


# ---- deaths and hangs ----------------------------------------------------------------------------


def test_a_killed_rank_ends_the_job_and_is_named_not_its_peer(launch):
    started = launch("together", steps=500)
    started.wait_for_step(2)
    began = time.monotonic()
    os.kill(started.rank(1), signal.SIGKILL)
    status, _, err = started.end()
    assert status == 1
    assert err.startswith("error: rank 1: was killed (SIGKILL)")
    assert "rank 0" not in err
    assert time.monotonic() - began < 15


def test_a_stopped_rank_is_a_hang(launch):
    started = launch("alone", steps=500, hang_timeout_s=4)
    started.wait_for_step(2)
    os.kill(started.rank(0), signal.SIGSTOP)
    status, _, err = started.end()
    assert status == 1
    assert err.startswith("error: rank 0: gave no sign of life for 4 s")


def test_restarts_after_a_death(launch, tmp_path):
    status, out, err = launch("dies_once", max_restarts=1).end()
    assert status == 0
    assert "rank 1: was killed" in err
    assert "starting the ranks again (1 of 1)" in err
    assert out.count("rank 0 has begun") == 2
    assert (tmp_path / "logs/rank_1.log").read_text().count("----") == 2


# ---- the supervisor's own output -----------------------------------------------------------------


def test_a_job_goes_on_where_neither_its_logs_nor_what_it_prints_can_be_written(launch, tmp_path):
    (tmp_path / "logs").mkdir()
    for name in ("rank_1.log", "launches.jsonl"):
        (tmp_path / "logs" / name).symlink_to("/dev/full")
    with open("/dev/full", "w") as full:
        status, _, err = launch("alone", steps=20, stdout=full).end()
    assert status == 0, err
    assert err.count("No space left on device") == 3, "once for each, not at every step"
    assert "rank_1.log" in err
    assert "launches.jsonl" in err


@pytest.mark.parametrize(("behaviour", "status"), [("alone", 0), ("mistake", 2)])
def test_a_job_ends_with_its_status_where_all_readers_have_gone(launch, behaviour, status):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        assert launch(behaviour, stdout=gone, stderr=gone).end()[0] == status


# ---- nothing is left -----------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["supervisor", "launcher", "rank"])
def test_no_process_outlives_the_job(launch, tmp_path, victim):
    started = launch("grandchildren")
    ranks = [started.rank(0), started.rank(1)]
    paths = [tmp_path / "grandchild_0", tmp_path / "grandchild_1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in paths), "no grandchildren")
    from ernie_train.core.processes import process_state

    pids = {"supervisor": started.process.pid, "launcher": process_state(ranks[0]).parent,
            "rank": ranks[1]}  # fmt: skip
    os.kill(pids[victim], signal.SIGKILL)
    status, _, err = started.end()
    if victim == "supervisor":
        # Nobody is there to adopt what left its rank's session: those two are the test's own.
        for path in paths:
            os.kill(int(path.read_text()), signal.SIGKILL)
    else:
        assert status == 1
        assert ("Paddle's launcher was killed" in err) == (victim == "launcher")


# ---- several machines ----------------------------------------------------------------------------


def test_machines_find_each_other_by_the_master_s_name(launch, tmp_path):
    (port,) = processes.free_ports(1)
    machines = [
        launch("together", nproc=1, nnodes=2, master=f"localhost:{port}", node_rank=number)
        for number in range(2)
    ]
    ends = [machine.end() for machine in machines]
    assert [(status, err) for status, _, err in ends] == [(0, ""), (0, "")]
    assert "step 3 of rank 0" in ends[0][1]
    assert "step 3 of rank 1" in (tmp_path / "logs/rank_1.log").read_text()
