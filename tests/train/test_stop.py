"""A stop at any moment of a supervised stage saves its last step, also while it validates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ernie_train.core.errors import Interrupted
from ernie_train.train import step_loop, supervised, supervised_data
from ernie_train.train.supervised_data import SftConfig
from tests.moments import Moments, stage_run
from tests.workspace import make_workspace, metrics_without_time

STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stop")
    make_workspace(root)
    return root


def run_stage(root: Path, directory: Path, stop: Moments) -> None:
    values = {
        "name": "sft", "kind": "sft", "data": [{"path": "train.jsonl"}], "seq_len": 128,
        "validation": [{"path": "validation.jsonl"}], "validate_every_steps": 2,
        "micro_batch_size": 2, "steps": STEPS, "optim": {"lr": 3e-3},
        "checkpoint": {"every_steps": 4, "best_metric": "validation_loss", "best_is": "lower"},
    }  # fmt: skip
    config = TypeAdapter(SftConfig).validate_python(values)
    stage = stage_run(root, directory / "01-sft", stop)
    prepared = supervised_data.prepare(config, stage.data)
    with stop.watching_lines(supervised.__file__, step_loop.__file__):
        supervised.run(config, stage, prepared)


def bits(directory: Path) -> dict[str, Any]:
    saved = directory / f"01-sft/checkpoints/step_{STEPS:06d}"
    return {
        "metrics": metrics_without_time(directory),
        **{path.name: path.read_bytes() for path in saved.iterdir()},
    }


@pytest.fixture(scope="module")
def whole(root: Path) -> tuple[dict[str, Any], int]:
    stop = Moments()
    run_stage(root, root / "whole", stop)
    return bits(root / "whole"), stop.passed


def stop_at(root: Path, directory: Path, at: int, expected: dict[str, Any]) -> None:
    try:
        run_stage(root, directory, Moments(at))
    except Interrupted:
        assert list(directory.glob("01-sft/checkpoints/step_*")), "the step is lost"
        run_stage(root, directory, Moments())
    assert bits(directory) == expected, f"stopped at moment {at}"


@pytest.mark.parametrize("part", range(3))
def test_a_stop_at_some_moments_loses_no_step(root, whole, tmp_path, part):
    expected, moments = whole
    stop_at(root, tmp_path / "run", (2 * part + 1) * moments // 6, expected)


def test_a_stop_while_validating_leaves_only_that_to_do(root, whole, tmp_path, monkeypatch):
    stop, original = Moments(), supervised.validation_loss

    def stopped(*arguments: Any) -> float:
        stop.at = 0
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "validation_loss", stopped)
        with pytest.raises(Interrupted, match="in a forward pass"):
            run_stage(root, tmp_path / "run", stop)
    assert [p.name for p in (tmp_path / "run/01-sft/checkpoints").iterdir()] == ["step_000002"]
    assert [line["step"] for line in metrics_without_time(tmp_path / "run")] == [1]
    run_stage(root, tmp_path / "run", Moments())
    assert bits(tmp_path / "run") == whole[0]


def test_a_checkpoint_between_validations_has_no_metric(root, tmp_path, monkeypatch):
    stop, original = Moments(), supervised.validation_loss

    def stopped_afterwards(*arguments: Any) -> float:
        loss = original(*arguments)
        # This step is logged; the next one asks for the stop, after its update.
        monkeypatch.setattr(step_loop.MoeHealth, "observe", ask)
        return loss

    def ask(*arguments: Any) -> dict[str, float]:
        stop.at = 0
        return {}

    monkeypatch.setattr(supervised, "validation_loss", stopped_afterwards)
    with pytest.raises(Interrupted):
        run_stage(root, tmp_path / "run", stop)
    (saved,) = (tmp_path / "run/01-sft/checkpoints").iterdir()
    assert saved.name == "step_000003"
    assert json.loads((saved / "MANIFEST.json").read_text())["metrics"] == {}


@pytest.mark.slow
def test_a_stop_at_every_moment_loses_no_step(root, whole, tmp_path):
    expected, moments = whole
    for at in range(1, moments + 1):
        stop_at(root, tmp_path / f"run-{at}", at, expected)
