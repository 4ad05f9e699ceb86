"""Paddle's launcher: the devices that its ranks get, and what its log says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ernie_train.launch import LaunchSettings, launcher
from ernie_train.launch.console import SafeConsole
from ernie_train.launch.logs import RankLogs
from ernie_train.launch.rank_files import restore_proxies
from ernie_train.launch.rank_group import RankGroup
from tests.launch.launched import wait_for

# Stands in for the interpreter that runs the launcher. CUDA counts up to the first wrong number.
MACHINE = """#!{python}
import os, runpy, sys
from paddle.base import core
def visible():
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(i) for i in range({gpus})]
    if named is None:
        return len(numbers)
    known = [name.strip() in numbers for name in named.split(",")]
    return (known + [False]).index(False)
core.is_compiled_with_cuda = lambda: True
core.get_cuda_device_count = visible
sys.argv = sys.argv[sys.argv.index("-m") + 1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


RANK = """
import json, os, pathlib, sys
path = pathlib.Path(sys.argv[1], f"rank_{os.environ['PADDLE_TRAINER_ID']}")
path.with_suffix(".tmp").write_text(json.dumps(dict(os.environ)))
path.with_suffix(".tmp").replace(path.with_suffix(".json"))
"""


def stand_in(tmp_path: Path, gpus: int) -> Path:
    """An interpreter that finds so many GPUs."""
    machine = tmp_path / "machine"
    machine.write_text(MACHINE.format(python=sys.executable, gpus=gpus))
    machine.chmod(0o755)
    return machine


def environments(
    tmp_path: Path, patch: pytest.MonkeyPatch, *, gpus: int, hide_gpus: bool = False
) -> list[dict[str, str]]:
    """What two ranks find in their environment on a machine with so many GPUs."""
    machine, rank = stand_in(tmp_path, gpus), tmp_path / "rank.py"
    rank.write_text(RANK)
    command = [sys.executable, "-u", str(rank), str(tmp_path)]
    with patch.context() as pretended:
        pretended.setattr(launcher.sys, "executable", str(machine))
        pretended.setattr(launcher, "has_gpu_build", lambda: True)
        started = launcher.Launcher(command, LaunchSettings(2, hide_gpus=hide_gpus), tmp_path)
    try:
        found = [tmp_path / f"rank_{number}.json" for number in range(2)]

        def over() -> bool:
            return started.process.poll() is not None or all(path.exists() for path in found)

        wait_for(over, "the launcher did nothing")
        assert all(path.exists() for path in found), started.log.read_text()
    finally:
        started.process.kill()
        started.process.wait()
    return [json.loads(path.read_text()) for path in found]


@pytest.mark.parametrize(
    ("hide_gpus", "visible", "gpu_build"),
    [
        (True, None, True),
        (True, "0", True),
        (False, "", True),
        (False, "NoDevFiles", True),
        (False, "0", False),  # Paddle's launcher goes by the variable alone
    ],
)
def test_paddle_s_launcher_is_told_to_use_no_gpu(
    tmp_path, monkeypatch, hide_gpus, visible, gpu_build
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launcher, "has_gpu_build", lambda: gpu_build)
    with monkeypatch.context() as pretended:
        pretended.setattr(launcher.subprocess, "Popen", lambda command, env, **_: env)
        settings = LaunchSettings(2, hide_gpus=hide_gpus)
        told = launcher.Launcher(["never"], settings, tmp_path).process
    assert (told["CUDA_VISIBLE_DEVICES"], told["PADDLE_DISTRI_BACKEND"]) == ("-1,-1", "gloo")


@pytest.mark.parametrize("gpus", [8, 1])
def test_on_a_gpu_machine_ranks_stay_on_the_cpu_and_keep_the_proxies_of_their_user(
    tmp_path, monkeypatch, gpus
):
    """Also with fewer GPUs than ranks, which Paddle's launcher would deal out.

    It takes proxies away, for the sake of NCCL.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    proxies = {"http_proxy": "http://proxy:1", "https_proxy": "http://proxy:2"}
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    for found in environments(tmp_path, monkeypatch, gpus=gpus, hide_gpus=True):
        assert found.get("PADDLE_DISTRI_BACKEND") == "gloo"
        assert found["CUDA_VISIBLE_DEVICES"].split(",")[0] == "-1", "CUDA shows it no GPU"
        assert not proxies.keys() & found.keys()
        restore_proxies(found)
        assert proxies.items() <= found.items()
        assert not any(name.endswith("_original") for name in found)


def test_each_rank_gets_its_gpu_where_it_may_have_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    found = environments(tmp_path, monkeypatch, gpus=8)
    assert [rank["FLAGS_selected_gpus"] for rank in found] == ["0", "1"]
    assert all(rank["CUDA_VISIBLE_DEVICES"] == "2,5" for rank in found)
    assert not any("PADDLE_DISTRI_BACKEND" in rank for rank in found)


def test_fewer_gpus_than_ranks_are_the_user_s_mistake(tmp_path, monkeypatch):
    """Paddle's launcher ends with `list index out of range`."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launcher.sys, "executable", str(stand_in(tmp_path, gpus=1)))
    monkeypatch.setattr(launcher, "has_gpu_build", lambda: True)
    logs = RankLogs(None, "2 ranks", SafeConsole(Console()))
    with RankGroup([str(tmp_path / "never")], LaunchSettings(2), logs) as ranks:
        wait_for(lambda: ranks.exit_report() is not None, "the launcher did not end")
        report = ranks.exit_report()
    assert report is not None and report.status == 2 and not report.restartable
    assert report.message.startswith("--nproc 2: there are fewer GPUs here")


def test_the_launcher_s_log_tells_how_a_rank_died(tmp_path):
    log = tmp_path / "launcher.log"
    log.write_text(
        "LAUNCH ERROR 2026-01-01 Container failed !!!\n"
        "Container rank 1 status failed cmd ['python', '-u'] code -9 log /tmp/x/workerlog.1\n\n"
    )
    assert launcher.failed_ranks(log) == {1: -9}
    assert launcher.last_line(log).endswith("workerlog.1")
    assert launcher.last_line(tmp_path / "nowhere") == ""
