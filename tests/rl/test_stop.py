"""A stop at any moment of an RL stage loses no update, and a resumed run has the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ernie_train.core.errors import Interrupted, StorageError
from ernie_train.eval import evaluation
from ernie_train.rewards.score import Score
from ernie_train.rewards.scoring import ComposedScore
from ernie_train.rl import data as rl_data
from ernie_train.rl import loop
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.learner import Learner
from ernie_train.rl.rollout import Rollout, RolloutSampler
from tests.moments import Moments, stage_run
from tests.workspace import make_workspace, metrics_without_time, rows, write_rows

ITERATIONS = 3


class Parity:
    """A reward in this process, which untrained completions get half of the time."""

    def close(self) -> None: ...

    def check_excluded(self, scores: Any) -> None: ...

    def score_batch(self, rows: Any, texts: list[str], *_: Any, **__: Any) -> Any:
        class Batch:
            scores = [composed(score(text)) for text in texts]

        return Batch


def score(text: str) -> Score:
    even = sum(map(ord, text)) % 2 == 0
    return Score(1.0, "correct") if even else Score(0.0, "wrong")


def composed(found: Score) -> ComposedScore:
    return ComposedScore(found.value, found, {"parity": found.value})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stop")
    make_workspace(root)
    made = rows(8, 7)
    for row in made:
        row["messages"] = row["messages"][:1]
    write_rows(root / "prompts.jsonl", made)
    return root


@pytest.fixture(autouse=True, scope="module")
def _graded_here() -> Iterator[None]:
    def grade(items: Any, **_: Any) -> list[Score]:
        return [score(text) for _, _, text in items]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_reward", lambda *_: Parity())
        patch.setattr(evaluation, "score_batch", grade)
        yield


def config(root: Path) -> UpoConfig:
    path = str(root / "prompts.jsonl")
    values = {
        "name": "rl", "kind": "upo", "data": [{"path": path, "max_examples": 4}],
        "reward": {"name": "exact"},
        "canaries": 0, "iterations": ITERATIONS, "micro_batch_size": 8,
        "rollout": {"prompts_per_iteration": 3, "group_size": 3, "max_new_tokens": 4,
                    "skip_solved": {"rate": 0.6, "after": 1}},
        "evaluation": {"path": path, "every_iterations": 2, "max_examples": 3},
        "preference": {"coef": 0.2, "pairs": "online"},
        "optim": {"lr": 3e-3}, "checkpoint": {"every_steps": 100},
    }  # fmt: skip
    return TypeAdapter(UpoConfig).validate_python(values)


def run_stage(root: Path, directory: Path, stop: Moments) -> dict[str, Any]:
    settings, stage = config(root), stage_run(root, directory / "01-rl", stop)
    prepared = rl_data.prepare(settings, stage.data)
    with stop.watching_lines(loop.__file__):
        return loop.run(settings, stage, prepared)


def bits(directory: Path) -> dict[str, Any]:
    """Return everything that a run leaves and that must not depend on when it was stopped."""
    saved = directory / f"01-rl/checkpoints/step_{ITERATIONS:06d}"
    found: dict[str, Any] = {
        path.name: path.read_bytes() for path in saved.iterdir() if path.name != "MANIFEST.json"
    }
    found["samples"] = (directory / "01-rl/samples.jsonl").read_bytes()
    found["metrics"] = metrics_without_time(directory, "01-rl")
    return found


@pytest.fixture(scope="module")
def whole(root: Path, _graded_here: None) -> tuple[dict[str, Any], int]:
    """The bits of an uninterrupted run, and how many moments it has."""
    directory, stop = root / "whole", Moments()
    run_stage(root, directory, stop)
    found = bits(directory)
    assert [line["step"] for line in found["metrics"] if "eval/mean" in line] == [2, 3]
    return found, stop.passed


def finished_updates(directory: Path) -> int:
    """The iterations whose update had been made, by the samples that are written behind it."""
    samples = directory / "01-rl/samples.jsonl"
    lines = samples.read_text().splitlines() if samples.exists() else []
    return max((int(line.split('"step": ')[1].split(",")[0]) for line in lines), default=0)


def filled(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return `found` with a metric that is lost where a kept rollout is taken up.

    Without router replay the experts of few completions are known, and are not kept.
    """
    pairs = zip(expected["metrics"], found["metrics"], strict=True)
    return {**found, "metrics": [{"experts_changed": a["experts_changed"], **b} for a, b in pairs]}


def stop_at(root: Path, directory: Path, at: int, expected: dict[str, Any]) -> None:
    try:
        run_stage(root, directory, Moments(at))
    except Interrupted:
        saved = sorted((directory / "01-rl/checkpoints").glob("step_*"))
        newest = int(saved[-1].name.removeprefix("step_")) if saved else 0
        assert newest == finished_updates(directory), "an update was made and is lost"
        run_stage(root, directory, Moments())
    assert filled(bits(directory), expected) == expected, f"stopped at moment {at}"


@pytest.mark.parametrize("part", range(4))
def test_a_stop_at_some_moments_loses_no_update(root, whole, tmp_path, part):
    expected, moments = whole
    stop_at(root, tmp_path / "run", (2 * part + 1) * moments // 8, expected)


def test_a_stop_in_the_evaluation_saves_the_update_before_it(root, whole, tmp_path, monkeypatch):
    expected, _ = whole
    stop, original = Moments(), loop.evaluate_held_out

    def stopped(*arguments: Any) -> Any:
        stop.at = 0
        return original(*arguments)

    monkeypatch.setattr(loop, "evaluate_held_out", stopped)
    with pytest.raises(Interrupted):
        run_stage(root, tmp_path / "run", stop)
    assert [p.name for p in (tmp_path / "run/01-rl/checkpoints").iterdir()] == ["step_000002"]
    assert len(metrics_without_time(tmp_path / "run", "01-rl")) == 1
    # Again in the evaluation that was outstanding, then to the end.
    stop.at = None
    with pytest.raises(Interrupted):
        run_stage(root, tmp_path / "run", stop)
    monkeypatch.setattr(loop, "evaluate_held_out", original)
    run_stage(root, tmp_path / "run", Moments())
    assert bits(tmp_path / "run") == expected


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stop_before_the_update_keeps_the_rollout(
    root, whole, tmp_path, monkeypatch, caplog, damaged
):
    expected, _ = whole
    stop, kept = Moments(), tmp_path / "run/01-rl/kept_rollout"
    sampled: list[int] = []
    rollout, prepare = RolloutSampler.rollout, Learner.prepare

    def counted(sampler: RolloutSampler, iteration: int) -> Rollout:
        sampled.append(iteration)
        return rollout(sampler, iteration)

    def stopped(*arguments: Any) -> Any:
        stop.at = 0 if sampled[-1] == 2 else None
        return prepare(*arguments)

    monkeypatch.setattr(RolloutSampler, "rollout", counted)
    monkeypatch.setattr(Learner, "prepare", stopped)
    for _ in range(1 if damaged else 2):  # the second start stops at the same place
        with pytest.raises(Interrupted):
            run_stage(root, tmp_path / "run", stop)
        assert sampled == [1, 2] and kept.exists()
    if damaged:
        for file in kept.iterdir():
            file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setattr(Learner, "prepare", prepare)
    run_stage(root, tmp_path / "run", Moments())
    assert sampled == ([1, 2, 2, 3] if damaged else [1, 2, 3])
    assert ("the kept rollout is sampled again" in caplog.text) == damaged
    found = bits(tmp_path / "run")
    assert ("experts_changed" in found["metrics"][1]) == damaged
    assert filled(found, expected) == expected and not kept.exists()


def test_a_full_disk_for_the_rollout_does_not_hide_the_stop(
    root, whole, tmp_path, monkeypatch, capsys
):
    stop, learn = Moments(), loop.Learner.prepare

    def full(*arguments: Any) -> None:
        raise StorageError("disk full")

    def stopped(*arguments: Any) -> Any:
        stop.at = 0
        return learn(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "keep_rollout", full)
        patch.setattr(loop.Learner, "prepare", stopped)
        run_stage(root, tmp_path / "run", stop)
    assert "the rollout of iteration 1 is not kept: disk full" in capsys.readouterr().out
    run_stage(root, tmp_path / "run", Moments())
    assert bits(tmp_path / "run") == whole[0]


@pytest.mark.slow
def test_a_stop_at_every_moment_loses_no_update(root, whole, tmp_path):
    expected, moments = whole
    for at in range(1, moments + 1):
        stop_at(root, tmp_path / f"run-{at}", at, expected)


def test_a_critic_that_has_not_learnt_yet_is_resumed(root, tmp_path):
    """All completions of the first iterations may be cut off, and masked."""
    masked = {"truncated": "mask", "max_new_tokens": 1, "prompts_per_iteration": 2}
    for iterations in (1, 2):
        values = config(root).model_dump(exclude_unset=True) | {
            "rollout": masked, "iterations": iterations, "evaluation": None, "preference": None,
            "critic": {"optim": {"lr": 1e-3}, "warmup_iterations": 0},
        }  # fmt: skip
        settings = TypeAdapter(UpoConfig).validate_python(values)
        stage = stage_run(root, tmp_path / "01-rl", Moments())
        done = loop.run(settings, stage, rl_data.prepare(settings, stage.data))
        assert done["steps"] == iterations
    assert not list(tmp_path.rglob("optimizer*.safetensors"))
