"""Checkpoints: exact round trips, damage of every kind, retention, kills while saving."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from ernie_train.cli.status import print_status
from ernie_train.core.config import parse_config
from ernie_train.core.errors import CheckpointError, ConfigError, WeightsError
from ernie_train.io.files import write_directory
from ernie_train.run.recipe import recorded_recipe
from ernie_train.run.sources import tokenizer_directory
from ernie_train.weights.checkpoint import CheckpointStore
from ernie_train.weights.checkpoint_config import CheckpointConfig
from ernie_train.weights.model_directory import ModelDirectory, find_model
from tests.weights.checkpoints import (
    check,
    make_model,
    make_store,
    moments,
    save,
    weights,
)
from tests.weights.test_checkpoint_damage import damage_bit

# ---- round trips -------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    store = make_store(tmp_path / "checkpoints")
    assert store.latest() is None
    assert store.load_latest() is None
    path = save(store, 500, loss=0.25)
    assert path == tmp_path / "checkpoints" / "step_000500"
    assert store.latest() == path
    check(store, path, 500)
    assert store.load(path).metrics == {"loss": 0.25}
    names = {p.name for p in path.iterdir()}
    assert {
        "config.json",
        "state.json",
        "MANIFEST.json",
        "optimizer.safetensors.index.json",
    } <= names
    # The optimizer's arrays are an ordinary safetensors file under names a reader knows.
    index = json.loads((path / "optimizer.safetensors.index.json").read_text())["weight_map"]
    name = "m/model.layers.1.mlp.experts.2.up_proj.weight"
    assert safetensors.numpy.load_file(path / index[name])[name].shape == (8, 16)


def test_without_optimizer_and_with_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = store.save(1, model=make_model(), optimizer={}, state={}, metrics={"loss": float("nan")})
    saved = store.load(path)
    assert len(saved.optimizer) == 0
    assert np.isnan(saved.metrics["loss"])


def test_another_model(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    saved = store.load(save(store, 1))
    with pytest.raises(WeightsError, match="wrong shape"):
        saved.load_model(make_model(hidden_size=32))


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    save(store, 3)
    check(store, save(store, 3), 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**130, 0.1, 1e-320, -0.0, "ü\n\u2028", [], {}, [1, [2.5, None]],
     {"a": {"b": []}}],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_state_is_exact(value: Any, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = store.save(1, model=make_model(), optimizer={}, state={"x": {"y": value}})
    back = store.load(path).state["x"]["y"]
    assert type(back) is type(value)
    assert repr(back) == repr(value)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i2", "u1", "?", "<u8"])
def test_arrays_in_the_state_are_exact(dtype: str, tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (3, 2, 4)).astype(dtype)
    arrays = {"a": bits, "b": bits.T, "c": bits[:0], "d": np.array(1, dtype)}
    store = make_store(tmp_path)
    state = {"probe": {"nested": arrays, "n": 1}, "x": bits[0]}
    loaded = store.load(store.save(1, model=make_model(), optimizer={}, state=state)).state
    assert loaded["probe"]["n"] == 1
    for array, back in [*zip(arrays.values(), loaded["probe"]["nested"].values(), strict=True),
                        (bits[0], loaded["x"])]:  # fmt: skip
        assert (back.dtype, back.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back, array)


def test_metrics_of_version_0_1_are_refused_by_version(tmp_path: Path) -> None:
    """That version wrote NaN as a tagged object of JSON."""
    store = make_store(tmp_path, best_metric="loss")

    def write(directory: Path) -> dict[str, Any]:
        (directory / "state.json").write_text("{}")
        return {}

    loss = {"__ernie_train__": "float", "value": "nan"}
    write_directory(store.path_of(3), write, info={"step": 3, "metrics": {"loss": loss}})
    for read in (store.best_step, lambda: store.load(store.path_of(3))):
        with pytest.raises(CheckpointError, match=r"as ernie_train 0\.1 wrote them"):
            read()


def test_restored_generators_go_on_alike(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    generator.random(10)
    store = make_store(tmp_path)
    state = {"generator": generator.bit_generator.state}
    path = store.save(1, model=make_model(), optimizer={}, state=state)
    expected = generator.random(5)
    other = np.random.default_rng(2)
    other.bit_generator.state = store.load(path).state["generator"]
    np.testing.assert_array_equal(other.random(5), expected)


@pytest.mark.parametrize(
    "value", [object(), {1: "a"}, {"a": {2.5: 1}}, np.array([object()]), {1, 2}, float("nan")]
)
def test_what_cannot_be_stored_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, WeightsError)):
        make_store(tmp_path).save(1, model=make_model(), optimizer={}, state={"x": value})
    assert list(tmp_path.iterdir()) == []


# ---- settings ----------------------------------------------------------------------------------


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            CheckpointConfig,
            {"every_steps": 0, "keep_last": 0, "max_shard_size": "big", "best_is": "max"},
            "recipe",
        )
    assert len(caught.value.problems) == 4


# ---- retention ---------------------------------------------------------------------------------


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=2)
    for step in (10, 20, 30, 1000000):
        save(store, step)
    assert store.steps() == [30, 1000000]
    check(store, store.path_of(30), 30)


@pytest.mark.parametrize(
    ("metric", "best_is", "kept"),
    [
        ("score", "higher", 2),
        ("score", "lower", 3),
        ("score", None, 2),
        ("validation_loss", None, 3),
        ("validation_loss", "higher", 2),
    ],
)
def test_keeps_the_best_one(metric: str, best_is: str | None, kept: int, tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=1, best_metric=metric, best_is=best_is)
    for step, score in enumerate((0.5, 0.9, 0.1, float("nan"), 0.5), start=1):
        save(store, step, **{metric: score})
    save(store, 6)  # without metrics
    assert store.steps() == sorted({kept, 6})
    assert store.best_step() == kept
    check(store, store.path_of(kept), kept)


def test_checkpoints_without_a_value_of_the_best_metric_are_refused() -> None:
    settings = CheckpointConfig(every_steps=12, best_metric="score")
    for interval in (1, 4, 12, None):
        settings.require_scores("evaluation.every_iterations", interval)
    with pytest.raises(ValueError, match=r"every_steps=12 must be a multiple of x=24: .*score"):
        settings.require_scores("x", 24)
    with pytest.raises(ConfigError, match="load_best_at_end needs best_metric"):
        parse_config(CheckpointConfig, {"load_best_at_end": True}, "recipe")
    with pytest.raises(ConfigError, match="early_stopping_patience needs best_metric"):
        parse_config(CheckpointConfig, {"early_stopping_patience": 1}, "recipe")


def test_best_metric_that_nobody_measures(tmp_path: Path) -> None:
    store = make_store(tmp_path, best_metric="acuracy")
    with pytest.raises(ConfigError, match=r"acuracy.*only accuracy"):
        save(store, 1, accuracy=0.5)
    check(store, store.path_of(1), 1)  # nothing is lost for it


def test_a_damaged_newer_one_does_not_push_out_good_ones(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep_last=1)
    save(store, 20)
    damage_bit(next((tmp_path / "step_000020").glob("model-*")), -1, 0)
    save(store, 10)
    save(store, 15)
    assert store.steps() == [15, 20]
    assert store.latest() == store.path_of(15)
    check(store, save(store, 20), 20)
    assert store.latest() == store.path_of(20)


# ---- without optimizer state -------------------------------------------------------------------


def save_with_critic(store: CheckpointStore, step: int) -> Path:
    model = make_model(step)
    arrays = {"value_head.weight": np.full((3, 1), step, np.float32)}
    parts = {"critic/model": arrays, "critic/optimizer": {f"m/{n}": a for n, a in arrays.items()}}
    return store.save(
        step, model=model, optimizer=moments(model), state={"seen": step * 10}, parts=parts
    )


def of_optimizer(directory: Path) -> list[Path]:
    return sorted(directory.rglob("optimizer*"))


def test_weights_state_and_critic_stay_when_optimizer_state_goes(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (10, 20):
        save_with_critic(store, step)
    gone = of_optimizer(tmp_path)
    assert len(gone) > 6 and any(path.parent.name == "critic" for path in gone)
    size = sum(path.stat().st_size for path in gone)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file() and p not in gone}
    assert store.has_optimizer()
    assert store.remove_optimizer() == size
    assert not store.has_optimizer() and not of_optimizer(tmp_path)
    assert {p: p.read_bytes() for p in kept if p.name != "MANIFEST.json"} == {
        p: content for p, content in kept.items() if p.name != "MANIFEST.json"
    }
    for step in (10, 20):
        saved = store.load(store.path_of(step))
        assert (saved.step, saved.state, saved.optimizer) == (step, {"seen": step * 10}, {})
        assert saved.part("critic/model")["value_head.weight"][0, 0] == step
        model = make_model(99)
        saved.load_model(model)
        for name, array in weights(make_model(step)).items():
            np.testing.assert_array_equal(weights(model)[name], array)
    assert store.latest() == store.path_of(20)
    with pytest.raises(CheckpointError, match=r"step_000020.*optimizer state was removed when"):
        store.load_latest()
    assert store.remove_optimizer() == 0


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("no manifest", "step_000010: incomplete, it has no MANIFEST.json"),
        ("manifest", "step_000010/MANIFEST.json: damaged: it does not match its own hash"),
        ("optimizer", None),
    ],
)
def test_a_damaged_checkpoint_keeps_no_other_from_losing_its_state_and_is_told(
    damage: str, told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path)
    for step in (10, 20):
        save(store, step)
    pattern = "optimizer-*" if damage == "optimizer" else "MANIFEST.json"
    file = next((tmp_path / "step_000010").glob(pattern))
    if damage == "manifest":
        file.write_text(file.read_text().replace('"step": 10', '"step": 11'))
    else:
        file.unlink()
    assert store.remove_optimizer() > 0
    assert not of_optimizer(tmp_path / "step_000020")
    assert bool(of_optimizer(tmp_path / "step_000010")) == (told is not None)
    assert len(caplog.messages) == (told is not None)
    assert told is None or caplog.messages[0].endswith(f"/{told}")
    assert store.latest() == store.path_of(20)


def test_a_checkpoint_finds_its_run_s_tokenizer_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, tokenizer = tmp_path / "run" / "01-sft", tmp_path / "run" / "tokenizer"
    checkpoint = save(make_store(stage / "checkpoints"), 5)
    (stage / "stage.json").write_text("{}")
    (tmp_path / "latest").symlink_to(checkpoint)
    monkeypatch.chdir(stage)
    for path in (checkpoint, "checkpoints/step_000005", ".", tmp_path / "latest"):
        assert find_model(path).tokenizer == tokenizer
    monkeypatch.chdir(checkpoint)
    assert find_model(".").tokenizer == tokenizer


def test_a_model_with_a_recipe_beside_it_is_no_run(tmp_path: Path) -> None:
    """`init` writes recipe.yaml into the working directory, which may be the model's."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert find_model(tmp_path) == ModelDirectory(tmp_path, tmp_path)
    assert tokenizer_directory(tmp_path) == tmp_path
    assert recorded_recipe(tmp_path) is None
    with pytest.raises(CheckpointError, match="not a run directory"):
        print_status(tmp_path, Console())
