"""Parts of the supervisor on their own, and what the command line makes of them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from ernie_train.cli.main import main
from ernie_train.cli.run import RunCommand
from ernie_train.core.errors import ConfigError
from ernie_train.io.run_dir import RunLock
from ernie_train.launch import LaunchSettings
from ernie_train.launch.console import SafeConsole
from ernie_train.launch.launcher import Launcher, last_line
from ernie_train.launch.logs import RankLogs
from ernie_train.launch.rank_group import delete_abandoned_directories
from ernie_train.launch.supervise import check_settings, last_launch
from tests.launch.launched import REPOSITORY, SUPERVISOR, TOY
from tests.workspace import make_workspace


def call(recipe: Path | str = "r.yaml", **changes: object) -> RunCommand:
    options = {"run_dir": None, "first": None, "last": None, "referee": None, **changes}
    return RunCommand(Path(recipe), ["seed=-1"], **options)  # type: ignore[arg-type]


# ---- logs and records ----------------------------------------------------------------------------


def test_what_is_said_keeps_paths_whole():
    path = f"/{'long' * 20}/[b]run/logs/rank_1.log"
    heard = io.StringIO()
    console = SafeConsole(Console(file=heard, width=40))
    console.print(f"printed last ({path}):")
    console.error(f"no {path}")
    assert heard.getvalue() == f"printed last ({path}):\nerror: no {path}\n"


def test_logs_wait_for_the_run_directory_and_keep_ranks_apart(tmp_path, capsysbinary):
    run_dir = tmp_path / "run"
    logs = RankLogs(run_dir, "2 ranks", SafeConsole(Console(stderr=True)))
    sources = [tmp_path / "workerlog.0", tmp_path / "workerlog.1"]
    for rank, source in enumerate(sources):
        source.write_text(f"a line of rank {rank}\n")
        logs.follow(rank, source)
    logs.forward()
    assert capsysbinary.readouterr().out == b"a line of rank 0\n"
    assert not run_dir.exists()
    run_dir.mkdir()
    logs.forward()
    with sources[1].open("a") as stream:
        stream.write("half a ")
        stream.flush()
        logs.forward()
        stream.write("line\n\n")
    assert logs.last_lines(1) == ["a line of rank 1", "half a line"]
    logs.close()
    written = (run_dir / "logs/rank_1.log").read_text().splitlines()
    assert written[0].startswith("---- 2")
    assert written[1:] == ["a line of rank 1", "half a line", ""]
    assert not (run_dir / "logs/rank_0.log").exists()


def test_the_launcher_s_log_tells_how_a_rank_died(tmp_path):
    launcher = object.__new__(Launcher)
    launcher._log = tmp_path / "launcher.log"
    launcher._log.write_text(
        "LAUNCH ERROR 2026-01-01 Container failed !!!\n"
        "Container rank 1 status failed cmd ['python', '-u'] code -9 log /tmp/x/workerlog.1\n\n"
    )
    assert launcher.failed_ranks() == {1: -9}
    assert launcher.last_line().endswith("workerlog.1")
    assert last_line(tmp_path / "nowhere") == ""


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


# ---- what is asked for ---------------------------------------------------------------------------


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


def test_a_restart_does_not_do_stages_anew_twice():
    wanted = call(first="sft", last="rl", run_dir=Path("d"))
    assert wanted.rank_arguments(stages_set_aside=False) == [
        "--run-dir=d", "--from=sft", "--until=rl", "--", "r.yaml", "seed=-1",
    ]  # fmt: skip
    assert "--from=sft" not in wanted.rank_arguments(stages_set_aside=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-restarts", "2"], "--nproc"),
        (["--nnodes", "2", "--master", "a:1"], "--nproc"),
        (["--nproc", "0"], ""),
        (["--nproc", "2", "--nnodes", "2"], "--master"),
    ],
)
def test_usage(tmp_path, capsys, arguments, message):
    recipe = make_workspace(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--run-dir", str(tmp_path / "run"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_second_command_on_a_directory_in_use_leaves_its_logs_alone(tmp_path, capsys):
    recipe, run_dir = make_workspace(tmp_path), tmp_path / "run"
    with RunLock(run_dir):
        (run_dir / "logs").mkdir()
        for name in ("rank_1.log", "launches.jsonl"):
            (run_dir / "logs" / name).write_text("of the first\n")
        before = contents(run_dir)
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(recipe), "--run-dir", str(run_dir), "--nproc", "2"])
        assert contents(run_dir) == before
    assert stopped.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"in use by another run (process {os.getpid()}" in told


# ---- the whole command ---------------------------------------------------------------------------


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
    assert b"rank 0 terminal True width 77" in os.read(ours, 4096)
    assert "rank 1 terminal False" in (tmp_path / "logs/rank_1.log").read_text()


def test_a_mistake_in_a_recipe_is_told_once_and_nothing_is_written(tmp_path):
    recipe = make_workspace(tmp_path)
    command = [sys.executable, "-m", "ernie_train", "run", recipe, "--run-dir", tmp_path / "run"]
    done = subprocess.run(
        [*command, "--nproc", "2", "stages.sft.optim.lr=-1"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("stages.0.optim.lr") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_rank_under_supervision_runs_a_recipe(tmp_path):
    recipe = make_workspace(tmp_path)
    command = [sys.executable, "-m", "ernie_train", "run", recipe, "--run-dir", tmp_path / "run"]
    changes = ["stages.sft.steps=3", "evaluation=null", "export=null"]
    done = subprocess.run(
        [*command, "--nproc", "1", *changes],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3" in done.stdout
    assert (tmp_path / "run/01-sft/DONE").exists()
    assert last_launch(tmp_path / "run") == "1 rank, ended with status 0"
