"""Settings, records and temporary files of a launch; test_launch.py runs real ranks."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile

import pytest
from rich.console import Console

from ernie_train.core import processes
from ernie_train.core.errors import ConfigError
from ernie_train.core.signals import StopFlag
from ernie_train.launch import LaunchSettings
from ernie_train.launch.console import SafeConsole
from ernie_train.launch.logs import RankLogs
from ernie_train.launch.rank_group import RankGroup, delete_abandoned_directories
from ernie_train.launch.supervise import _wait, check_settings, last_launch
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


def test_a_machine_that_waits_for_others_says_so(monkeypatch):
    """Paddle's launcher tells its log alone."""
    monkeypatch.setattr(sys.modules[_wait.__module__], "NOTICE_AFTER_S", 0.0)
    (port,) = processes.free_ports(1)
    settings = LaunchSettings(1, nnodes=3, master=f"127.0.0.1:{port}", node_rank=0)

    class Said(Exception):
        pass

    class Listener(SafeConsole):
        def print(self, text: str) -> None:
            raise Said(text)

    console = Listener(Console())
    with RankGroup(["never"], settings, RankLogs(None, "", console)) as ranks:  # noqa: SIM117
        with pytest.raises(Said, match=rf"waiting for 2 other machines at 127.0.0.1:{port}"):
            _wait(ranks, StopFlag(), console)


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
