"""The RoPE-base schedule: its arithmetic, its data, its place in checkpoints, runs and exports."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from pydantic import ValidationError

from ernie_train.cli.main import main
from ernie_train.data import EncodedDocument
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.rope import RopeTables, inverse_frequencies
from ernie_train.train.rope_schedule import Phase, RopePhase, RopeSchedule, Upsample, resolve
from ernie_train.train.supervised_data import PretrainConfig, _upsampled
from ernie_train.train.trainer import Trainer
from tests.small_models import make_config
from tests.workspace import as_documents, final_files, make_workspace, metrics_without_time

# ---- arithmetic ----------------------------------------------------------------------------------


def schedule(*phases: dict, start: float = 1e4) -> RopeSchedule:
    return RopeSchedule([resolve(RopePhase(**phase), 1, 1) for phase in phases], start)


def test_steps_from_10k_to_500k():
    found = schedule(
        {"rope_theta": 1e4, "seq_len": 8192, "steps": 3},
        {"rope_theta": 1.6e5, "seq_len": 32768, "steps": 2},
        {"rope_theta": 5e5, "seq_len": 131072, "steps": 1},
    )
    assert [found.at(step) for step in range(1, 7)] == [
        *[(1e4, 8192)] * 3, *[(1.6e5, 32768)] * 2, (5e5, 131072),
    ]  # fmt: skip


def test_smooth_is_log_linear_and_exact_at_its_ends():
    found = schedule(
        {"rope_theta": 1e4, "seq_len": 64, "steps": 2},
        {"rope_theta": 5e5, "seq_len": 128, "steps": 10, "transition": "smooth"},
    )
    bases = [found.at(step)[0] for step in range(1, 13)]
    assert bases[:2] == [1e4, 1e4]
    assert bases[-1] == 5e5
    logs = np.log(bases[1:])
    np.testing.assert_allclose(np.diff(logs), math.log(50) / 10, rtol=1e-12)
    assert found.at(7)[0] == pytest.approx(1e4 * 50**0.5), "half way is the geometric mean"


def test_a_smooth_first_phase_begins_at_the_models_base():
    found = schedule(
        {"rope_theta": 1e4, "seq_len": 64, "steps": 4, "transition": "smooth"}, start=100.0
    )
    np.testing.assert_allclose(
        [found.at(step)[0] for step in (1, 2, 3, 4)], [100 * 100 ** (i / 4) for i in (1, 2, 3, 4)]
    )


def test_tokens_are_positions_of_batches_and_rounded_up_to_steps():
    phase = RopePhase(rope_theta=1e4, seq_len=128, tokens=4097, micro_batch_size=4)
    assert resolve(phase, 1, 2).steps == 5  # 4 rows x 2 micro-batches x 128 = 1024 a step
    assert resolve(phase, 1, 2).micro_batch_size == 4
    assert resolve(RopePhase(rope_theta=1e4, seq_len=128, tokens=1024), 8, 1).steps == 1


@pytest.mark.parametrize("theta", [1e4, 1.6e5, 5e5])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_frequencies_of_a_base_equal_float64(theta, head_dim):
    expected = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    np.testing.assert_allclose(inverse_frequencies(theta, head_dim), expected, rtol=1e-6)
    tables = RopeTables.build(paddle.to_tensor([0, 1, 4095]), theta, head_dim)
    angles = np.array([0, 1, 4095])[:, None] * np.repeat(expected, 2)
    np.testing.assert_allclose(tables.cos.numpy(), np.cos(angles), atol=5e-4)
    np.testing.assert_allclose(tables.sin.numpy(), np.sin(angles), atol=5e-4)


def test_a_model_under_another_base_computes_what_one_made_with_it_computes():
    paddle.seed(0)
    moved = Ernie4_5_MoeForCausalLM(make_config(rope_theta=1e4))
    made = Ernie4_5_MoeForCausalLM(make_config(rope_theta=5e5))
    made.set_state_dict(moved.state_dict())
    ids = paddle.to_tensor(np.random.default_rng(0).integers(1, 90, (2, 40)))
    before = moved(ids).logits.numpy()
    moved.set_rope_theta(5e5)
    np.testing.assert_array_equal(moved(ids).logits.numpy(), made(ids).logits.numpy())
    assert np.abs(before - made(ids).logits.numpy()).max() > 1e-4
    assert moved.config.rope_theta == 5e5


def test_a_cache_of_another_base_is_refused():
    model = Ernie4_5_MoeForCausalLM(make_config(rope_theta=1e4))
    cache = model.new_cache(1)
    model.set_rope_theta(2e4)
    with pytest.raises(ValueError, match=r"rope_theta=10000\.0.*20000\.0"):
        model.model(paddle.to_tensor([[1, 2]]), kv_cache=cache)


# ---- what is refused -----------------------------------------------------------------------------

PHASES = [
    {"rope_theta": 1e4, "seq_len": 32, "steps": 4},
    {"rope_theta": 5e4, "seq_len": 64, "steps": 4},
]


def stage(schedule_=PHASES, **keys):
    values = {
        "name": "pretrain", "kind": "pretrain", "data": [{"path": "x"}], "micro_batch_size": 1,
        "optim": {"lr": 1e-3}, "rope_schedule": schedule_,
    }  # fmt: skip
    return {k: v for k, v in {**values, **keys}.items() if v is not None}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"schedule_": [PHASES[0], {**PHASES[1], "rope_theta": 9e3}]},
         r"rope_schedule\.1\.rope_theta=9000 lies below the 10000"),
        ({"schedule_": [PHASES[1], {**PHASES[1], "seq_len": 32}]},
         r"rope_schedule\.1\.seq_len=32 lies below the 64"),
        ({"schedule_": []}, "at least one phase"),
        ({"schedule_": [{**PHASES[0], "steps": None}]}, "exactly one of steps and tokens"),
        ({"schedule_": [{**PHASES[0], "tokens": 100}]}, "exactly one of steps and tokens"),
        ({"schedule_": [{**PHASES[0], "steps": 0}]}, "greater than or equal to 1"),
        ({"schedule_": [{**PHASES[0], "upsample": {"longer_than": 32, "factor": 2}}]},
         "must lie below"),
        ({"steps": 8}, "steps has no effect beside rope_schedule"),
        ({"seq_len": 64}, "seq_len has no effect beside rope_schedule"),
        ({"schedule_": None}, "seq_len must be given, or a rope_schedule"),
    ],
)  # fmt: skip
def test_impossible_schedules_are_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        PretrainConfig(**stage(**keys))


# ---- data ----------------------------------------------------------------------------------------


def documents(*lengths):
    made = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    return as_documents([EncodedDocument(d, np.ones(len(d), bool)) for d in made])


def test_long_documents_come_more_often_by_the_factor():
    parts = [documents(5, 40, 6, 50), documents(7, 8)]
    phase = Phase(64, 1, 1, 1e4, upsample=Upsample(longer_than=32, factor=3.0))
    split, weights = _upsampled(parts, [1.0, 0.5], phase)
    assert [p.lengths.tolist() for p in split] == [[5, 6], [40, 50], [7, 8]]
    assert weights == [1.0, 3.0, 0.5]
    np.testing.assert_array_equal(split[1][1].ids, parts[0][3].ids)
    assert _upsampled(parts, [1.0, 0.5], Phase(64, 1)) == (parts, [1.0, 0.5])


# ---- whole runs ----------------------------------------------------------------------------------


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["what", "is", "the", "sum", "of", "one", "and", "two", "three", "think", "answer"]
    return [" ".join(rng.choices(words, k=rng.randrange(4, 160))) for _ in range(count)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phases")
    recipe = yaml.safe_load(make_workspace(root).read_text())
    for name, made in (("texts", texts(60, 1)), ("short", ["one and two"] * 9)):
        lines = [json.dumps({"text": text}) + "\n" for text in made]
        (root / f"{name}.jsonl").write_text("".join(lines))
    recipe["model"] |= {"rope_theta": 40.0}
    sft = {**recipe["stages"][0], "steps": 2, "name": "sft"}
    recipe["stages"] = [
        stage(
            [
                {"rope_theta": 50.0, "seq_len": 32, "steps": 3, "micro_batch_size": 4,
                 "transition": "smooth"},
                {"rope_theta": 800.0, "seq_len": 64, "steps": 4, "transition": "smooth"},
                {"rope_theta": 5000.0, "seq_len": 128, "tokens": 3 * 2 * 2 * 128,
                 "upsample": {"longer_than": 64, "factor": 2}},
            ],
            data=[{"path": str(root / "texts.jsonl")}], micro_batch_size=2, grad_accum_steps=2,
            optim={"lr": 3e-3, "schedule": "wsd", "warmup_steps": 2, "decay_fraction": 0.3},
            balance={"bias_update_rate": 0.001, "orthogonal_coef": 0.001,
                     "orthogonal_mode": "decoupled", "z_loss_coef": 0.001},
            moe_health={"probe_every_steps": 2, "layers_every_steps": 2},
            checkpoint={"every_steps": 100},
        ),
        sft,
    ]  # fmt: skip
    recipe["evaluation"] = None
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def whole(workspace) -> Path:
    directory = workspace / "whole"
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 0
    return directory


def test_the_schedule_is_logged_every_step_and_the_last_base_is_exported(whole):
    lines = metrics_without_time(whole, "01-pretrain")
    found = [(line["rope_theta"], line["seq_len"]) for line in lines]
    smooth = [40 * 1.25 ** (i / 3) for i in (1, 2, 3)] + [50 * 16 ** (i / 4) for i in (1, 2, 3, 4)]
    assert [base for base, _ in found] == pytest.approx(smooth + [5000.0] * 3)
    assert [length for _, length in found] == [32] * 3 + [64] * 4 + [128] * 3
    names = ("moe/load_cv", "moe/router_cosine", "balance/z_loss", "moe/routing_changed")
    assert all(name in lines[-1] for name in names)
    for path in ("01-pretrain/checkpoints/step_000010", "02-sft/checkpoints/step_000002", "export"):
        config = json.loads((whole / path / "config.json").read_text())
        assert config["rope_theta"] == 5000.0, path
        assert config["rope_parameters"]["rope_theta"] == 5000.0, path


@pytest.mark.parametrize("at", [2, 5, 9])
def test_a_run_cut_off_in_any_phase_continues_to_the_same_bits(
    workspace, whole, tmp_path, monkeypatch, at
):
    original = Trainer.train_step

    def step_with_signal(self, *arguments):
        result = original(self, *arguments)
        if result.step == at and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "train_step", step_with_signal)
    directory = tmp_path / "run"
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 3
    saved = directory / f"01-pretrain/checkpoints/step_{at:06d}"
    written = json.loads((saved / "config.json").read_text())["rope_theta"]
    line = metrics_without_time(whole, "01-pretrain")[at - 1]
    assert written == line["rope_theta"], "a checkpoint says under which base its weights stand"
    assert run("run", workspace / "recipe.yaml", "--run-dir", directory) == 0
    for stage_dir in ("01-pretrain", "02-sft"):
        assert metrics_without_time(directory, stage_dir) == metrics_without_time(whole, stage_dir)
        assert final_files(directory, stage_dir) == final_files(whole, stage_dir)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.max_position_embeddings=100",
         r"stages.0.rope_schedule.2.seq_len=128 exceeds the model's max_position_embeddings=100"),
        ("model.rope_theta=60",
         r"stages.0.rope_schedule.0.rope_theta=50 lies below the 60 that the model has"),
        ("stages.0.data.0.path={root}/short.jsonl",
         r"rope_schedule.1.seq_len=64: no document is longer than 32 tokens"),
        ("model.moe_num_experts=0",
         r"stages.0.balance.bias_update_rate=0.001 has no effect: the model has no MoE layer"),
        ("stages.0.optim.gradient_dtype=bfloat16 device=cpu",
         r"stages.0.optim.gradient_dtype=bfloat16 has no effect: weights are float32 on this cpu"),
        ("model.moe_num_experts=0 parallel.expert=2",
         r"parallel.expert=2 has no effect: the model has no MoE layer"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_model_or_data_is_refused(workspace, capsys, override, says):
    override = override.format(root=workspace)
    assert run("check", workspace / "recipe.yaml", *override.split()) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert says in err


def test_a_schedule_raises_the_limit_of_a_loaded_model(workspace, whole, tmp_path, capsys):
    shutil.copytree(whole / "export", tmp_path / "released")
    config = tmp_path / "released/config.json"
    short = {"max_position_embeddings": 128}
    config.write_text(json.dumps(json.loads(config.read_text()) | short))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "one and two " * 200}) + "\n")
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    recipe["model"] = {"path": str(tmp_path / "released")}
    longer = [{"rope_theta": 9000.0, "seq_len": 256, "steps": 1}]
    data = [{"path": str(tmp_path / "long.jsonl")}]
    after = {**recipe["stages"][1], "seq_len": 200, "steps": 1}
    recipe["stages"] = [stage(longer, data=data, micro_batch_size=1), after]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("run", tmp_path / "recipe.yaml", "--run-dir", tmp_path / "run") == 0
    for path in ("01-pretrain/checkpoints/step_000001", "02-sft/checkpoints/step_000001", "export"):
        written = json.loads((tmp_path / "run" / path / "config.json").read_text())
        assert (written["rope_theta"], written["max_position_embeddings"]) == (9000.0, 256), path
    recipe["stages"] = [after]  # without a schedule the limit stands
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("check", tmp_path / "recipe.yaml") == 2
    assert "seq_len=200 exceeds" in " ".join(capsys.readouterr().err.split())


def test_check_shows_every_phase(workspace, capsys):
    assert run("check", workspace / "recipe.yaml") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rows of 32 tokens (256 at most) in 2 micro-batches; steps: 3, RoPE base 50" in out
    assert "steps: 4, RoPE base 800 at its end" in out
    assert "rows of 128 tokens (512 at most) in 2 micro-batches; steps: 3, RoPE base 5000" in out
