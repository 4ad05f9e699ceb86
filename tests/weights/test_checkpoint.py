"""Checkpoints: exact round trips, damage of every kind, retention, kills while saving."""

import base64
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ernie_train.core.config import parse_config
from ernie_train.core.errors import CheckpointError, ConfigError, StorageError, WeightsError
from ernie_train.io.files import write_directory
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.weights.checkpoint import (
    CheckpointConfig,
    CheckpointStore,
)
from ernie_train.weights.layout import to_hf

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 8,
    "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
}  # fmt: skip


def make_model(seed: int = 0, **keys: Any) -> Ernie4_5_MoeForCausalLM:
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**TINY, **keys}))
    random = np.random.default_rng(seed)
    for tensor in model.state_dict().values():
        tensor.set_value(random.standard_normal(tensor.shape).astype(np.float32))
    return model


def weights(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def moments(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    return {f"m/{name}": array * 2 for name, array in to_hf(model.config, weights(model))}


def save(store: CheckpointStore, step: int, **metrics: float) -> Path:
    model = make_model(step)
    return store.save(
        step, model=model, optimizer=moments(model), state={"seen": step * 10}, metrics=metrics
    )


def make_store(directory: Path, **keys: Any) -> CheckpointStore:
    return CheckpointStore(directory, CheckpointConfig(max_shard_size="10KB", **keys))


def check(store: CheckpointStore, path: Path, step: int) -> None:
    """The checkpoint in `path` holds exactly what `save` wrote at `step`."""
    saved = store.load(path)
    assert (saved.step, saved.state) == (step, {"seen": step * 10})
    model, expected = make_model(99), make_model(step)
    saved.load_model(model)
    for name, array in weights(expected).items():
        np.testing.assert_array_equal(weights(model)[name], array)
    assert saved.optimizer.keys() == moments(expected).keys()
    for name, array in moments(expected).items():
        np.testing.assert_array_equal(saved.optimizer[name], array)


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


def test_a_state_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    """That version wrote arrays and floats that are not finite as tagged objects of JSON."""
    store = make_store(tmp_path)
    array = np.arange(6, dtype="<i2").reshape(2, 3)
    data = base64.b64encode(array.tobytes()).decode()
    tag = "__ernie_train__"
    tagged = {tag: "array", "dtype": "<i2", "shape": [2, 3], "base64": data}
    state = {"probe": {"expert_ids": tagged, "far": {tag: "float", "value": "-inf"}}, "n": [1]}

    def write(directory: Path) -> dict[str, Any]:
        (directory / "state.json").write_text(json.dumps(state))
        return {}

    loss = {tag: "float", "value": "nan"}
    write_directory(store.path_of(3), write, info={"step": 3, "metrics": {"loss": loss, "b": 2}})
    loaded = store.load(store.path_of(3))
    np.testing.assert_array_equal(loaded.state["probe"]["expert_ids"], array)
    assert loaded.state["probe"]["far"] == -np.inf
    assert loaded.state["n"] == [1]
    assert np.isnan(loaded.metrics["loss"])
    assert loaded.metrics["b"] == 2


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


# ---- damage ------------------------------------------------------------------------------------


def damage_bit(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = save(store, 1)
    files = sorted(path.iterdir())
    generator = random.Random(0)
    for turn in range(150):
        file = files[turn % len(files)]
        before = file.read_bytes()
        damage_bit(file, generator.randrange(len(before)), generator.randrange(8))
        if file.name == "MANIFEST.json":
            try:  # a changed blank or a changed case of an escape changes nothing
                check(store, path, 1)
            except CheckpointError as error:
                assert file.name in str(error) or "step_000001" in str(error)
        else:
            with pytest.raises(CheckpointError, match=file.name):
                store.load(path)
        file.write_bytes(before)
    check(store, path, 1)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = save(store, 1)
    for file in sorted(path.iterdir()):
        before = file.read_bytes()
        for length in (0, len(before) // 2, len(before) - 2):
            file.write_bytes(before[:length])
            with pytest.raises(CheckpointError, match=file.name):
                store.load(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            store.load(path)
        file.write_bytes(before)
    check(store, path, 1)


def test_latest_is_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path, keep_last=5)
    for step in (1, 2, 3, 4):
        save(store, step)
    (tmp_path / "step_000004" / "MANIFEST.json").unlink()
    damage_bit(next((tmp_path / "step_000003").glob("optimizer-*")), -1, 0)
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest == tmp_path / "step_000002"
    check(store, latest, 2)
    assert "step_000004: incomplete" in caplog.text
    assert "content differs" in caplog.text


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (1, 2):
        (save(store, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint.*state\.json.*state\.json"):
        store.latest()


def test_other_things_in_the_directory_do_not_matter(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_000009.tmp").mkdir()
    (tmp_path / "step_000009.tmp" / ".ernie_train_incomplete").touch()
    (tmp_path / "step_000009.tmp" / "model.safetensors").write_text("half")
    assert store.latest() is None
    save(store, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_notes"]


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


# ---- disks that are full or closed -------------------------------------------------------------


def test_failing_disk_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file operation of a save fails once; the earlier checkpoint stays each time."""
    store = make_store(tmp_path)
    save(store, 1)
    real, calls, fail_at = os.fsync, 0, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    while True:
        calls, fail_at = 0, fail_at + 1
        try:
            save(store, 2)
        except StorageError as error:
            assert "disk is full" in str(error)
            failures += 1
        else:
            break
        latest = store.latest()
        assert latest is not None
        check(store, latest, int(latest.name[-1]))
        assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    assert failures > 10
    check(store, store.path_of(2), 2)


SMALL_DISK = """
    import importlib.util, resource, sys
    from pathlib import Path
    from ernie_train.core.errors import StorageError
    spec = importlib.util.spec_from_file_location("helpers", sys.argv[3])
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    store = helpers.make_store(Path(sys.argv[1]), keep_last=50)
    if sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    for step in range(2, 200):
        try:
            helpers.save(store, step)
        except StorageError as error:
            print(step - 1, error)
            break
"""


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_full_disk(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a small disk needs privileges")
    try:
        store = make_store(directory)
        save(store, 1)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SMALL_DISK),
             str(directory), kind, __file__],
            capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        last, message = done.stdout.split(maxsplit=1)
        assert ("disk is full" if kind == "tmpfs" else "size limit") in message
        latest = store.latest()
        assert latest == store.path_of(int(last))
        check(store, latest, int(last))
        assert not [p for p in directory.iterdir() if p.suffix]
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(directory)], check=True)


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        save(make_store(tmp_path / "file" / "checkpoints"), 1)
    with pytest.raises(StorageError, match="cannot write"):
        save(make_store(Path("/proc/checkpoints")), 1)


# ---- kill -9 -----------------------------------------------------------------------------------

SAVER = """
    import importlib.util, sys, time
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("helpers", sys.argv[2])
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    store = helpers.make_store(Path(sys.argv[1]), keep_last=2, best_metric="score")
    saved = store.load_latest()
    step = saved.step if saved else 0
    start = time.monotonic()
    helpers.save(helpers.make_store(Path(sys.argv[1], "trial")), step)
    print(time.monotonic() - start, flush=True)
    while True:
        step += 1
        helpers.save(store, step, score=step % 5)
        print(step, flush=True)
"""


def kill_while_saving(directory: Path, kills: int) -> None:
    generator = random.Random(kills)
    store = make_store(directory, keep_last=2, best_metric="score")
    known = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SAVER), directory, __file__],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )  # fmt: skip
        assert process.stdout is not None
        # So many seconds a save takes now: a busy machine needs longer to write any.
        seconds = process.stdout.readline() or pytest.fail(process.communicate()[1])
        time.sleep(generator.uniform(0.0, 4 * float(seconds)))
        process.kill()
        reported = [int(line) for line in process.communicate()[0].split()]
        known = max([known, *reported])
        latest = store.latest()
        if known:
            assert latest is not None
            assert int(latest.name[5:]) in (known, known + 1)  # killed before it could say so
        if latest is not None:
            known = int(latest.name[5:])
            check(store, latest, known)
            # Everything that looks like a checkpoint is one, but for what was being deleted.
            for step in store.steps():
                check(store, store.path_of(step), step)
    assert known > 0


def test_kill_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 5)


@pytest.mark.slow
def test_many_kills_while_saving(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 30)
