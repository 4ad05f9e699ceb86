"""Settings, records and temporary files of a launch; test_launch.py runs real ranks."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile

import pytest

from ernie_train.core.errors import ConfigError
from ernie_train.launch import LaunchSettings
from ernie_train.launch.rank_group import delete_abandoned_directories
from ernie_train.launch.supervise import check_settings, last_launch
from tests.launch.launched import REPOSITORY, SUPERVISOR, TOY
from tests.terminal import read_terminal


def test_what_a_killed_supervisor_left_is_deleted_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [
        f"ernie_train_launch_{ended.pid}_x",
        f"ernie_train_launch_{os.getpid()}_x",
        "other_1_x",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    delete_abandoned_directories()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_status_tells_of_the_last_launch(tmp_path):
    assert last_launch(tmp_path) is None
    (tmp_path / "logs").mkdir()
    line = {"ranks": 4, "status": 1, "message": "rank 1: boom"}
    (tmp_path / "logs/launches.jsonl").write_text(json.dumps(line) + "\n")
    assert last_launch(tmp_path) == "4 ranks, ended with status 1: rank 1: boom"
    (tmp_path / "logs/launches.jsonl").write_text("[]\n")
    assert last_launch(tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LaunchSettings(2, nnodes=2), "--master"),
        (LaunchSettings(2, master="a:1"), "--nnodes"),
        (LaunchSettings(2, nnodes=2, master="a:1", max_restarts=1), "scheduler"),
        (LaunchSettings(2, nnodes=2, master="a:1", node_rank=2), "--node-rank"),
        (LaunchSettings(2, nnodes=2, master="http://a:1"), "ADDRESS:PORT"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(settings)


def test_rank_0_draws_for_the_terminal_that_the_user_has(tmp_path):
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    arguments = [TOY, "terminal", tmp_path, "1", "{'nproc': 2}"]
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *map(str, arguments)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=theirs,
    )  # fmt: skip
    os.close(theirs)
    assert process.wait(60) == 0
    assert b"rank 0 terminal True width 77" in read_terminal(ours)
    assert "rank 1 terminal False" in (tmp_path / "logs/rank_1.log").read_text()
