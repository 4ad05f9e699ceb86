"""What a run needs to continue, what may change in between, and what it says of itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.eval import evaluation
from ernie_train.io import files
from ernie_train.run import export, lineage
from ernie_train.train import supervised_data
from ernie_train.train.trainer import Trainer
from ernie_train.weights import adapters
from tests.workspace import final_files, make_workspace, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_workspace(root)
    return root


@pytest.fixture(autouse=True)
def _own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)


def write_recipe(root: Path, name: str, stages: list[dict[str, Any]], **changes: Any) -> Path:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"stages": stages, "evaluation": None, "export": None, **changes}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def stage(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "kind": "sft", "data": [{"path": str(root / "train.jsonl")}],
        "seq_len": 128, "micro_batch_size": 2, "steps": 2, "optim": {"lr": 3e-3}, **changes,
    }  # fmt: skip


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def start_over(root: Path, name: str, first: dict[str, Any], second: dict[str, Any]) -> int:
    """Return the status of a second recipe in the directory of a first that must fail."""
    directory = root / name
    assert run("run", write_recipe(root, f"{name}-1", [first]), "--run-dir", directory) == 2
    return run("run", write_recipe(root, f"{name}-2", [second]), "--run-dir", directory)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_recipe_that_fails_at_its_data_binds_nothing(root, renamed):
    write_rows(root / "bad.jsonl", [{"nothing": "known"}])
    broken = stage(root, "sft", data=[{"path": str(root / "bad.jsonl")}])
    mended = stage(root, "other" if renamed else "sft", optim={"lr": 1e-3})
    assert start_over(root, f"failed-{renamed}", broken, mended) == 0


def test_a_stage_without_a_checkpoint_begins_anew_under_another_recipe(root, capsys):
    directory = root / "begun"
    assert (
        run("run", write_recipe(root, "begun", [stage(root, "sft")]), "--run-dir", directory) == 0
    )
    (directory / "01-sft/DONE").unlink()
    shutil.rmtree(directory / "01-sft/checkpoints")
    other = write_recipe(root, "begun-2", [stage(root, "sft", steps=1)])
    assert run("run", other, "--run-dir", directory) == 0
    assert (directory / "01-sft.before-1/stage.json").exists()
    assert "set aside" in capsys.readouterr().out


def test_harmless_changes_continue_a_run(root, capsys):
    directory, data = root / "harmless", root / "harmless.jsonl"
    shutil.copy(root / "train.jsonl", data)
    stages = [stage(root, "sft", data=[{"path": str(data)}])]
    assert run("run", write_recipe(root, "harmless", stages), "--run-dir", directory) == 0
    moved = data.rename(root / "moved.jsonl")
    stages = [
        stage(root, "sft", data=[{"path": str(moved)}], checkpoint={"every_steps": 1}),
        stage(root, "more"),
    ]
    assert run("run", write_recipe(root, "harmless", stages), "--run-dir", directory) == 0
    assert (directory / "02-more/DONE").exists()
    moved.write_bytes(moved.read_bytes().replace(b"What is", b"Tell me", 1))
    assert run("run", write_recipe(root, "harmless", stages), "--run-dir", directory) == 2
    assert "input.data" in capsys.readouterr().err


def test_a_later_stage_needs_the_last_finished_one_alone(root):
    given = [stage(root, "given", steps=1)]
    source = root / "source"
    assert run("run", write_recipe(root, "given", given), "--run-dir", source) == 0
    stages = [stage(root, name) for name in ("one", "two", "three")]
    recipe = write_recipe(root, "three", stages, model={"path": str(source)})
    assert run("run", recipe, "--run-dir", root / "whole") == 0
    cut = root / "cut"
    assert run("run", recipe, "--run-dir", cut, "--until", "two") == 0
    shutil.rmtree(cut / "01-one/checkpoints")
    source.rename(root / "elsewhere")
    try:
        assert run("run", recipe, "--run-dir", cut) == 0
    finally:
        (root / "elsewhere").rename(source)
    assert final_files(cut, "03-three") == final_files(root / "whole", "03-three")


# ---- optimizer state of earlier stages -----------------------------------------------------------


def states_of(directory: Path, stage_name: str) -> list[str]:
    return sorted(p.parent.name for p in (directory / stage_name).rglob("optimizer.safetensors"))


@pytest.mark.parametrize("trains", ["all", "a part"])
def test_a_finished_stage_is_hashed_once_when_the_run_goes_on(root, trains, monkeypatch, capsys):
    directory, partial = root / f"once, {trains}", trains == "a part"
    part = {"lora": {"rank": 2}} if partial else {}
    recipe = write_recipe(root, "once", [stage(root, "one", **part), stage(root, "two")])
    assert run("run", recipe, "--run-dir", directory, "--until", "one") == 0
    read: Counter[Path] = Counter()

    def counted(path: Path, *more: Any) -> files.FileDigest:
        read[path.resolve()] += 1
        return digest_file(path, *more)

    digest_file = files.digest_file
    for module in (files, adapters, lineage):
        monkeypatch.setattr(module, "digest_file", counted)
    left = directory / "01-one/checkpoints/step_000002"
    places = [left, directory / "initial"] if partial else [left]
    weights = [file for place in places for file in sorted(place.glob("*model*.safetensors"))]
    assert len(weights) == len(places)
    assert run("run", recipe, "--run-dir", directory, "--until", "one") == 0
    assert {read[file.resolve()] for place in places for file in listed(place)} == {1}
    for file in weights:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert run("run", recipe, "--run-dir", directory) == 2
        assert f"{file.name}: content differs from its hash: damaged" in told(capsys)
        file.write_bytes(content)
    assert run("run", recipe, "--run-dir", directory) == 0


def listed(directory: Path) -> list[Path]:
    """The files in a directory's manifest."""
    return [directory / name for name in files.read_manifest(directory)["files"]]


def told(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_optimizer_state_goes_when_the_next_stage_begins(root, capsys):
    often = {"every_steps": 1, "keep_last": 5}
    kept = {"keep_optimizer": True}
    stages = [
        stage(root, "one", checkpoint=often),
        stage(root, "two", checkpoint=kept),
        stage(root, "three"),
    ]
    recipe, directory = write_recipe(root, "states", stages), root / "states"
    assert run("run", recipe, "--run-dir", directory, "--until", "one") == 0
    assert states_of(directory, "01-one") == ["step_000001", "step_000002"]
    assert run("run", recipe, "--run-dir", directory, "--until", "two") == 0
    told = capsys.readouterr().out
    assert states_of(directory, "01-one") == [] and "stage one: its optimizer state, " in told
    assert len(list((directory / "01-one").rglob("model.safetensors"))) == 2
    assert run("run", recipe, "--run-dir", directory) == 0
    assert "its optimizer state" not in capsys.readouterr().out
    assert states_of(directory, "02-two") == states_of(directory, "03-three") == ["step_000002"]
    before = final_files(directory, "03-three")
    assert run("run", recipe, "--run-dir", directory, "--from", "two") == 0
    assert states_of(directory, "02-two") == ["step_000002"]
    assert final_files(directory, "03-three") == before


def test_a_stage_without_optimizer_state_is_not_trained_on(root, capsys):
    stages, directory = [stage(root, "one"), stage(root, "two")], root / "without"
    recipe = write_recipe(root, "without", stages)
    assert run("run", recipe, "--run-dir", directory) == 0
    done = (directory / "01-one/DONE").read_bytes()
    (directory / "02-two").rename(directory / "02-two.before-1")
    longer = write_recipe(root, "longer", [stage(root, "one", steps=4)])
    capsys.readouterr()
    assert run("run", longer, "--run-dir", directory, "--extend") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--extend: stage one cannot be trained on: its optimizer state was removed" in told
    assert "checkpoint.keep_optimizer" in told and "--from one to repeat it" in told
    assert (directory / "01-one/DONE").read_bytes() == done
    assert run("run", longer, "--run-dir", directory) == 2
    assert "--extend" not in capsys.readouterr().err
    (directory / "01-one/DONE").unlink()
    assert run("run", recipe, "--run-dir", directory) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the stage cannot be trained on: its optimizer state was removed" in told
    assert "--from repeats it" in told
    assert run("run", recipe, "--run-dir", directory, "--from", "one") == 0


def test_a_run_that_began_from_a_stage_goes_on_after_its_state_is_gone(root):
    stages, source = [stage(root, "one"), stage(root, "two")], root / "giving"
    assert run("run", write_recipe(root, "giving", stages[:1]), "--run-dir", source) == 0
    taken = {"path": str(source / "01-one/checkpoints/step_000002")}
    recipe = write_recipe(root, "taking", stages, model=taken)
    assert run("run", recipe, "--run-dir", root / "taking", "--until", "one") == 0
    assert run("run", write_recipe(root, "giving", stages), "--run-dir", source) == 0
    assert states_of(source, "01-one") == []
    assert run("run", recipe, "--run-dir", root / "taking") == 0


def test_an_emptied_export_is_made_again_and_starts_are_recorded(root, capsys):
    recipe = write_recipe(root, "exported", [stage(root, "sft")], export={"dtype": "float32"})
    directory = root / "exported"
    assert run("run", recipe, "--run-dir", directory) == 0
    (directory / "export/model.safetensors").unlink()
    assert run("status", directory) == 0
    assert "next: export" in capsys.readouterr().out
    assert run("run", recipe, "--run-dir", directory) == 0
    assert (directory / "export/model.safetensors").exists()
    weights = bytearray((directory / "export/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "export/model.safetensors").write_bytes(weights)
    assert run("run", recipe, "--run-dir", directory) == 0
    assert (directory / "export/model.safetensors").read_bytes() != bytes(weights)
    starts = json.loads((directory / "environment.json").read_text())["starts"]
    assert len(starts) == 3 and all({"commit", "dirty"} <= set(s["code"]) for s in starts)


def test_status_tells_of_a_missed_gate_and_of_speed(root, capsys):
    gate = {"metric": "eval/mean", "at_least": 0.99}
    test = {"path": str(root / "test.jsonl"), "max_new_tokens": 2, "after_each_stage": True,
            "max_examples": 2}  # fmt: skip
    recipe = write_recipe(root, "gated", [stage(root, "sft", gate=gate)], evaluation=test)
    assert run("run", recipe, "--run-dir", root / "gated") == 5
    capsys.readouterr()
    assert run("status", root / "gated") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "gate missed" in out and "the run is complete" not in out
    assert "missed its gate" in out and "tokens/s" in out.replace(" ", "")


# ---- stops ---------------------------------------------------------------------------------------


MOMENTS = {
    "data": (supervised_data, "load_sources", "nothing was to be saved yet"),
    "training": (Trainer, "train_step", "step_000001 is saved"),
    "evaluation": (evaluation, "generate_sharded", "step_000002 is saved"),
    "proof": (export, "trace", "step_000002 is saved"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_says_what_is_saved_and_how_to_go_on(root, monkeypatch, capfd, moment):
    test = {"path": str(root / "test.jsonl"), "max_new_tokens": 2, "max_examples": 2}
    recipe = write_recipe(
        root, moment, [stage(root, "sft")], evaluation=test, export={"dtype": "float32"}
    )
    owner, name, kept = MOMENTS[moment]
    original = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    assert run("run", recipe, "--run-dir", root / moment) == 3
    err = " ".join(capfd.readouterr().err.split())
    assert "SIGINT: stopping" in err
    assert "stopped on a signal" in err and kept in err and "error:" not in err
    assert "The same command goes on from there" in err
    assert not (root / moment / "export.json").exists()
    assert run("run", recipe, "--run-dir", root / moment) == 0
    assert ("saved at step 1" in capfd.readouterr().out) == (moment == "training")
    assert (root / moment / "export/export_receipt.json").exists()


def test_a_run_without_an_export_ends_with_where_the_model_is(root, capsys):
    recipe = write_recipe(root, "plain", [stage(root, "sft")])
    assert run("run", recipe, "--run-dir", root / "plain") == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "01-sft/checkpoints/step_000002" in out
    assert "ernie-train generate" in out and "ernie-train export" in out


@pytest.mark.parametrize(
    ("lr", "kept"), [(1e18, "step_000001 is saved"), (1e39, "nothing was to be saved yet")]
)
def test_a_loss_that_is_not_finite_says_what_is_kept(root, tmp_path, capsys, lr, kept):
    """The second rate makes weights infinite, which no run could go on from."""
    broken = stage(root, "sft", optim={"lr": lr, "clip_grad_norm": None})
    assert run("run", write_recipe(root, "nan", [broken]), "--run-dir", tmp_path / "nan") == 4
    assert kept in " ".join(capsys.readouterr().err.split())
