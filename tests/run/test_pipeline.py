"""Whole runs: what they leave, and that a run cut off anywhere continues to the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

import ernie_train
from ernie_train import kernels
from ernie_train.cli.main import main
from ernie_train.core import devices, environment
from ernie_train.report import write_report
from ernie_train.train.trainer import Trainer
from tests.workspace import (
    final_files,
    make_workspace,
    metrics_without_time,
    start,
    write_recipe,
    write_rows,
)


@pytest.fixture(autouse=True)
def _own_reader(monkeypatch):
    """Exports are read back by this toolkit alone: test_export lets transformers do it."""
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    make_workspace(root)
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def whole(workspace):
    """An uninterrupted run, in a process of its own: those that are interrupted share this one."""
    directory = workspace / "whole"
    process = start("run", workspace / "recipe.yaml", "--run-dir", directory)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return directory, out


def test_a_run_leaves_everything_that_the_design_names(whole):
    directory, out = whole
    for name in (
        "recipe.yaml", "environment.json", "tokenizer/tokenizer.model", "evaluation.json",
        "evaluation_samples.jsonl", "01-sft/metrics.jsonl", "01-sft/DONE",
        "01-sft/data_report.json", "01-sft/checkpoints/step_000012/MANIFEST.json",
        "01-sft/checkpoints/step_000012/model.safetensors",
        "01-sft/checkpoints/step_000012/optimizer.safetensors",
        "export/model.safetensors", "export/config.json", "export/tokenizer.json",
        "export/chat_template.jinja", "export/generation_config.json", "export/README.md",
    ):  # fmt: skip
        assert (directory / name).exists(), name
    recorded = json.loads((directory / "environment.json").read_text())
    assert recorded["ernie_train"] == ernie_train.__version__
    assert recorded["code"]["commit"] == environment.code_version()["commit"]
    assert recorded["kernels"] == kernels.describe_kernels()
    receipt = json.loads((directory / "export/export_receipt.json").read_text())
    assert receipt["passed"]
    assert receipt["max_logit_difference"] <= 2e-5
    assert list(directory.glob("01-sft/visualdl/*"))
    steps = [line["step"] for line in metrics_without_time(directory)]
    assert steps == list(range(1, 13))
    assert "stage 1 of 1: sft (sft)\n" in out
    assert "held-out problems  20/20" in out
    assert "untrained model  5/5" in out
    assert "most frequent answer" in " ".join(out.split())


def test_the_report_of_a_run_misses_nothing(whole, tmp_path):
    path, (read,) = write_report([whole[0]], tmp_path / "report.html")
    assert read.remarks == [] and read.is_complete
    page = path.read_text()
    for told in ("12 of 12", "validation_loss", ">end<", "What is", "train.jsonl"):
        assert told in page


def test_the_loss_falls(whole):
    losses = [line["loss"] for line in metrics_without_time(whole[0])]
    assert losses[-1] < 0.9 * losses[0]
    validations = [line for line in metrics_without_time(whole[0]) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [4, 8, 12]


def test_running_again_changes_nothing(whole, workspace):
    directory, _ = whole
    before = final_files(directory)
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 0
    assert final_files(directory) == before


def test_slow_matrix_products_are_told_once(whole, workspace, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    shutil.copytree(whole[0], directory)
    line = "Paddle's matrix products run at 9 GFLOP/s a core"
    monkeypatch.setattr(devices, "slow_products", lambda processor: [line])
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 0
    assert capsys.readouterr().out.count(line) == 1


def test_sigterm_saves_exits_3_and_continues_bit_for_bit(workspace, whole, monkeypatch, tmp_path):
    original = Trainer.train_step

    def step_with_signal(self, *arguments):
        result = original(self, *arguments)
        if result.step in (3, 7):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "train_step", step_with_signal)
    directory = tmp_path / "run"
    for step in (3, 7):
        assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 3
        assert (directory / f"01-sft/checkpoints/step_{step:06d}/MANIFEST.json").exists()
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 0
    assert_same_run(directory, whole[0])


def test_a_later_stage_continues_bit_for_bit(workspace, monkeypatch, tmp_path):
    """In one process all stages update the same parameters, each by an optimizer of its own."""
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    (first,) = recipe["stages"]
    first |= {"steps": 4, "validation": []}
    del first["validate_every_steps"]
    first["checkpoint"] = {"every_steps": 4}
    recipe |= {"evaluation": None, "export": None, "stages": [first, {**first, "name": "more"}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert run("run", path, "--run-dir", tmp_path / "whole") == 0
    original = Trainer.train_step

    def step_with_signal(self, *arguments):
        result = original(self, *arguments)
        second_stage = (tmp_path / "cut" / "02-more").exists()
        if result.step == 2 and second_stage:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_with_signal)
        assert run("run", path, "--run-dir", tmp_path / "cut") == 3
    checkpoint = tmp_path / "cut/02-more/checkpoints/step_000002"
    assert (checkpoint / "optimizer.safetensors").exists()
    assert run("run", path, "--run-dir", tmp_path / "cut") == 0
    found, wanted = (final_files(tmp_path / d, "02-more") for d in ("cut", "whole"))
    assert found == wanted


def assert_same_run(directory: Path, expected: Path) -> None:
    assert metrics_without_time(directory) == metrics_without_time(expected)
    found, wanted = final_files(directory), final_files(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], name


def kill_after(recipe: Path, directory: Path, step: int, delay_s: float) -> None:
    """Kills a run `delay_s` after the metrics of `step` have been written.

    It is a fork of this process, which has imported Paddle already.
    """
    metrics = directory / "01-sft/metrics.jsonl"
    command = ["run", str(recipe), "--run-dir", str(directory)]
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
    process.start()
    while process.is_alive():
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= step:
            break
        time.sleep(0.005)
    time.sleep(delay_s)
    assert process.is_alive(), "the run ended before it could be killed"
    process.kill()
    process.join()


def test_kill_9_continues_bit_for_bit(workspace, whole, tmp_path):
    # Before the first checkpoint, at one, and behind one.
    for step, delay_s in ((2, 0.0), (4, 0.01), (7, 0.0)):
        kill_after(workspace / "recipe.yaml", tmp_path / "run", step, delay_s)
    assert run("run", workspace / "recipe.yaml", "--run-dir", tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_among_them_while_saving(tmp_path):
    """A checkpoint at every step, so that a good share of the time is spent saving."""
    make_workspace(tmp_path)
    text = (tmp_path / "recipe.yaml").read_text()
    text = text.replace("every_steps: 4", "every_steps: 1").replace("steps: 12", "steps: 130")
    (tmp_path / "recipe.yaml").write_text(text)
    assert run("run", tmp_path / "recipe.yaml", "--run-dir", tmp_path / "expected") == 0
    rng = random.Random(1)
    directory, saving = tmp_path / "run", 0
    for number in range(24):
        kill_after(tmp_path / "recipe.yaml", directory, 5 * (number + 1), rng.uniform(0, 0.06))
        saving += bool(list(directory.glob("01-sft/checkpoints/*.tmp")))
    assert saving >= 1, "no kill hit a checkpoint that was being written"
    assert run("run", tmp_path / "recipe.yaml", "--run-dir", directory) == 0
    assert_same_run(directory, tmp_path / "expected")


def test_changed_settings_are_refused_and_listed(workspace, whole, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(whole[0], directory)
    assert run("run", workspace / "recipe.yaml", "stages.sft.optim.lr=0.01", "--run-dir",
               directory) == 2  # fmt: skip
    message = " ".join(capsys.readouterr().err.split())
    assert "optim.lr: 0.003 -> 0.01" in message
    assert (directory / "recipe.yaml").read_bytes() == (whole[0] / "recipe.yaml").read_bytes()
    assert metrics_without_time(directory) == metrics_without_time(whole[0])


def test_changed_data_is_refused(workspace, whole, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(whole[0], directory)
    train = workspace / "train.jsonl"
    content = train.read_bytes()
    try:
        train.write_bytes(content.replace(b"What is", b"Tell me", 1))
        assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 2
    finally:
        train.write_bytes(content)
    assert "input.data" in capsys.readouterr().err


def test_a_run_directory_of_another_recipe_is_refused(workspace, whole, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(whole[0], directory)
    recipe = (workspace / "recipe.yaml").read_text().replace("name: sft", "name: other")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert run("run", tmp_path / "recipe.yaml", "--run-dir", directory) == 2
    assert "belongs to another recipe" in " ".join(capsys.readouterr().err.split())


def test_from_sets_the_old_stage_aside_and_until_stops(workspace, whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole[0], directory)
    (directory / "evaluation.json").unlink()
    arguments = ("run", workspace / "recipe.yaml", "--run-dir", directory)
    assert run(*arguments, "--from", "sft", "--until", "sft") == 0
    assert (directory / "01-sft.before-1/DONE").exists()
    assert (directory / "01-sft/DONE").exists()
    assert not (directory / "evaluation.json").exists()


def test_a_non_finite_loss_stops_before_the_update(workspace, tmp_path, capsys):
    status = run("run", workspace / "recipe.yaml", "--run-dir", tmp_path / "run",
                 "stages.sft.optim.lr=1e18", "stages.sft.optim.clip_grad_norm=null",
                 "stages.sft.optim.warmup_steps=0")  # fmt: skip
    assert status == 4
    assert "nothing was updated" in " ".join(capsys.readouterr().err.split())


def test_pretraining_then_sft(workspace, tmp_path, capsys):
    texts = [{"text": f"the sum of {a} and {b} is {a + b}"} for a in range(10) for b in range(10)]
    write_rows(tmp_path / "text.jsonl", texts)
    shutil.copytree(workspace / "tokenizer", tmp_path / "tokenizer")
    shutil.copy(workspace / "train.jsonl", tmp_path / "train.jsonl")
    common = {"seq_len": 64, "micro_batch_size": 2, "optim": {"lr": 1e-3}}
    stages = [
        {"name": "pretrain", "kind": "pretrain", "epochs": 1,
         "data": [{"path": str(tmp_path / "text.jsonl")}], **common},
        {"name": "sft", "kind": "sft", "steps": 3, "normalization": "token_balanced",
         "data": [{"path": str(tmp_path / "train.jsonl")}], **common},
    ]  # fmt: skip
    write_recipe(tmp_path, stages=stages, evaluation=None, export=None,
                 parallel={"recompute": True})  # fmt: skip
    assert run("run", tmp_path / "recipe.yaml", "--run-dir", tmp_path / "run") == 0
    assert (tmp_path / "run/01-pretrain/DONE").exists()
    assert (tmp_path / "run/02-sft/DONE").exists()
    assert run("status", tmp_path / "run") == 0
    assert "the run is complete" in capsys.readouterr().out
