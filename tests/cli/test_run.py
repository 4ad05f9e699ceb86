"""The verb run as a command that launches ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_train.cli.main import _run, main
from ernie_train.cli.run import RunCommand
from ernie_train.io.run_dir import RunLock
from ernie_train.launch import LaunchSettings, last_launch
from tests.workspace import REPOSITORY, make_workspace


def test_a_restart_does_not_repeat_stages_twice():
    wanted = RunCommand(Path("r.yaml"), ["seed=-1"], Path("d"), "sft", "rl", False, None)
    assert wanted.rank_arguments(stages_set_aside=False) == [
        "--run-dir=d", "--from=sft", "--until=rl", "--", "r.yaml", "seed=-1",
    ]  # fmt: skip
    assert "--from=sft" not in wanted.rank_arguments(stages_set_aside=True)
    longer = RunCommand(Path("r.yaml"), [], None, None, None, True, None)
    assert longer.rank_arguments(stages_set_aside=True) == ["--extend", "--", "r.yaml"]


@pytest.mark.parametrize(
    ("device", "hidden"), [("cpu", True), ("auto", False), ("gpu", False), (None, False)]
)
def test_the_recipe_s_device_decides(tmp_path, monkeypatch, device, hidden):
    seen: list[LaunchSettings] = []
    monkeypatch.setattr(
        "ernie_train.cli.run.supervise", lambda command, settings, *rest: seen.append(settings)
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\ndevice: cpu\n" if device == "cpu" else "name: x\n")
    overrides = [f"device={device}"] if device in ("auto", "gpu") else []
    call = RunCommand(recipe, overrides, tmp_path / "run", None, None, False, None)
    call.launch(LaunchSettings(2), None, debug=False)
    assert [settings.hide_gpus for settings in seen] == [hidden]


def test_a_recipe_that_comes_along_runs_as_ranks_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen: list[Path] = []
    monkeypatch.setattr(
        "ernie_train.cli.run.supervise",
        lambda command, settings, place, console: seen.append(place),
    )
    call = RunCommand(Path("tiny"), ["name=small"], None, None, None, False, None)
    call.launch(LaunchSettings(2), None, debug=False)
    assert seen == [Path("runs/small")]


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


@pytest.mark.parametrize("ranks", [[], ["--nproc", "2"]])
def test_a_second_command_on_a_directory_in_use_leaves_its_files_alone(tmp_path, capsys, ranks):
    recipe, run_dir = make_workspace(tmp_path), tmp_path / "run"
    with RunLock(run_dir):
        (run_dir / "logs").mkdir()
        for name in ("rank_1.log", "launches.jsonl"):
            (run_dir / "logs" / name).write_text("of the first\n")
        before = contents(run_dir)
        with pytest.raises(SystemExit) as stopped:
            main(["run", str(recipe), "--run-dir", str(run_dir), *ranks])
        assert contents(run_dir) == before
    assert stopped.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"in use by another run (process {os.getpid()}" in told


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


FULL = """

Out of memory error on GPU 0. Cannot allocate 1.500000GB memory on GPU 0, 78.1GB memory has been \
allocated and available memory is only 0.9GB.

Please check whether there is any other process using GPU 0.
"""


@pytest.mark.parametrize("error", [MemoryError(f"-- C++ Traceback --{FULL}"),
                                   OSError(f"(External) MemoryError: {FULL}")])  # fmt: skip
def test_a_full_gpu_is_told_in_a_sentence(monkeypatch, error):
    """Within a backward pass of our own, which recomputation is, Paddle wraps the error."""

    def fails(*given: object, **named: object) -> int:
        raise error

    monkeypatch.setattr(RunCommand, "run_on_cores", fails)
    status, message = _run(["run", "tiny"])
    assert status == 1
    assert message.startswith("Out of memory error on GPU 0. Cannot allocate 1.500000GB memory")
    assert "a defect" not in message and "smaller micro_batch_size" in message
    assert "Please check" not in message
