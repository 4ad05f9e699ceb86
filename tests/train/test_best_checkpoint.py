"""Validation is measured when nobody says how often, and stages hand their best checkpoint on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.core.config import parse_config
from ernie_train.core.errors import CheckpointError, ConfigError
from ernie_train.io.run_dir import read_done
from ernie_train.train import supervised
from ernie_train.train.supervised_data import SftConfig
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.model_directory import find_model
from tests.workspace import make_workspace, metrics_without_time

BEST = {"every_steps": 2, "keep_last": 1, "best_metric": "validation_loss"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("best")
    make_workspace(root)
    return root


def stage(root: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "name": "sft", "kind": "sft", "data": [{"path": f"{root}/train.jsonl"}],
        "validation": [{"path": f"{root}/validation.jsonl"}], "seq_len": 128,
        "micro_batch_size": 1, "steps": 6, "optim": {"lr": 1e-3}, "checkpoint": {"every_steps": 4},
    } | changes  # fmt: skip
    return {key: value for key, value in values.items() if value is not None}


def run(
    root: Path,
    directory: Path,
    *stages: dict[str, Any],
    options: tuple[str, ...] = (),
    **changes: Any,
) -> int:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"stages": list(stages), "evaluation": None, "export": None} | changes
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(path), "--run-dir", str(directory), *options])
    return int(stopped.value.code or 0)


def measured_at(directory: Path) -> list[int]:
    return [m["step"] for m in metrics_without_time(directory) if "validation_loss" in m]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, [4, 6]),  # with each checkpoint, and at the end
        ({"checkpoint": {"every_steps": 200}}, [6]),
        ({"validate_every_steps": 3}, [3, 6]),
        ({"validation": None}, []),
    ],
)
def test_validation_is_measured_without_being_asked(workspace, tmp_path, capsys, changes, steps):
    assert run(workspace, tmp_path / "run", stage(workspace, **changes)) == 0
    assert measured_at(tmp_path / "run") == steps
    last_line = next(line for line in capsys.readouterr().out.splitlines() if "step 6/6" in line)
    assert ("validation loss" in last_line) == bool(steps)


def weights(directory: Path) -> dict[str, bytes]:
    """The weights of a model directory or checkpoint, that of an adapter with its base."""
    model = load_pretrained(directory)
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("load_best", "part"), [(True, {}), (False, {}), (True, {"lora": {"rank": 4}})], ids=str
)
def test_the_best_checkpoint_is_handed_on(workspace, tmp_path, monkeypatch, load_best, part):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    directory = tmp_path / "run"
    first = stage(workspace, **part, checkpoint={**BEST, "load_best_at_end": load_best})
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "validation_loss", lambda *arguments: next(losses))
        assert run(workspace, directory, first, export={"dtype": "float32"}) == 0
    chosen = 4 if load_best else 6
    checkpoint = directory / f"01-sft/checkpoints/step_{chosen:06d}"
    done = read_done(directory / "01-sft")
    assert done is not None and done.result == {"steps": 6, "checkpoint": checkpoint.name}
    assert weights(directory / "export") == weights(checkpoint)
    assert find_model(directory).weights == find_model(directory / "01-sft").weights == checkpoint
    best = directory / "01-sft/checkpoints/step_000004"
    assert find_model(directory, best=True).weights == best
    assert find_model(directory / "01-sft", best=True).weights == best
    with pytest.raises(CheckpointError, match="one of a run's or a stage's"):
        find_model(best, best=True)
    # A later stage starts from it, also when the first one is found done.
    more = stage(workspace, name="more", steps=1, optim={"lr": 1e-12}, validation=None)
    assert run(workspace, directory, first, more) == 0
    after = load_pretrained(directory / "02-more/checkpoints/step_000001").state_dict()
    before = load_pretrained(checkpoint).state_dict()
    assert all(float((after[name] - before[name]).abs().max()) < 1e-6 for name in before)


def test_a_stage_ends_when_its_patience_is_over(workspace, tmp_path, monkeypatch, capsys):
    """Scores 3, 1, 2, 1.5: two checkpoints in a row are no better than that of step 4."""
    scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5}
    settings = {**BEST, "load_best_at_end": True, "early_stopping_patience": 2}

    def scored(config: Any, stage: Any, *rest: Any) -> float:
        return scores[len(metrics_without_time(stage.directory.parent)) + 1]

    monkeypatch.setattr(supervised, "validation_loss", scored)
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    directory, patient = tmp_path / "run", tmp_path / "patient"
    assert run(workspace, directory, stage(workspace, steps=10, checkpoint=settings)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "validation_loss was not better in 2 checkpoints: the stage ends after step 8" in told
    ended = {"steps": 8, "checkpoint": "step_000004"}
    assert (done := read_done(directory / "01-sft")) and done.result == ended
    # One that is killed between its last checkpoint and its mark does not train on.
    (directory / "01-sft/DONE").unlink()
    assert run(workspace, directory, stage(workspace, steps=10, checkpoint=settings)) == 0
    assert (done := read_done(directory / "01-sft")) and done.result == ended
    # With more patience the third of them is the best; until then both train alike.
    settings["early_stopping_patience"] = 3
    longer = stage(workspace, steps=10, checkpoint=settings)
    assert run(workspace, patient, longer) == 0
    assert (done := read_done(patient / "01-sft")) and done.result["checkpoint"] == "step_000010"
    short, long = metrics_without_time(directory), metrics_without_time(patient)
    assert short == long[:8] and len(long) == 10
    # --extend goes on from there with more patience, and refuses more steps without it.
    impatient = {**settings, "early_stopping_patience": 2}
    more = stage(workspace, steps=12, checkpoint=impatient)
    assert run(workspace, directory, more, options=("--extend",)) == 2
    assert "early_stopping_patience says: raise that" in " ".join(capsys.readouterr().err.split())
    assert run(workspace, directory, longer, options=("--extend",)) == 0
    assert metrics_without_time(directory) == long
    assert weights(directory / "01-sft/checkpoints/step_000010") == weights(
        patient / "01-sft/checkpoints/step_000010"
    )


def test_an_equal_score_is_no_better_one(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(supervised, "validation_loss", lambda *given: 1.0)
    settings = {**BEST, "early_stopping_patience": 2}
    assert run(workspace, tmp_path / "run", stage(workspace, steps=10, checkpoint=settings)) == 0
    done = read_done(tmp_path / "run/01-sft")
    assert done is not None and done.result["steps"] == 6
    assert find_model(tmp_path / "run", best=True).weights.name == "step_000002"


def test_the_best_one_of_verbs(workspace, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(supervised, "validation_loss", lambda *arguments: next(losses))
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    directory = tmp_path / "run"
    assert run(workspace, directory, stage(workspace, checkpoint=BEST)) == 0
    for number, (flags, step) in enumerate([(["--best"], 4), ([], 6)]):
        out = tmp_path / f"out{number}"
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(directory), str(out), "--dtype", "float32", *flags])
        assert not stopped.value.code
        assert weights(out) == weights(directory / f"01-sft/checkpoints/step_{step:06d}")
    shutil.rmtree(directory / "01-sft/checkpoints/step_000004")
    manifest = directory / "01-sft/stage.json"
    manifest.write_text(manifest.read_text().replace('"validation_loss"', "null"))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(directory), "--best", "--data", f"{workspace}/test.jsonl"])
    assert stopped.value.code == 2
    assert "has no checkpoint.best_metric" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": {**BEST, "best_metric": "loss"}}, "'loss' is not measured in this stage"),
        ({"checkpoint": BEST, "validation": None}, "best_metric needs validation data"),
        (
            {"checkpoint": {**BEST, "every_steps": 3}, "validate_every_steps": 2},
            "every_steps=3 must be a multiple of validate_every_steps=2",
        ),
    ],
)
def test_a_best_metric_that_checkpoints_do_not_have_is_refused(workspace, changes, says):
    with pytest.raises(ConfigError, match=says):
        parse_config(SftConfig, stage(workspace, **changes), "recipe")
