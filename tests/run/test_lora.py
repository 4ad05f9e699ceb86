"""Runs whose stages train a part of the model: what they keep, resume, merge, and refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.io.safetensors import TensorFiles
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.train.trainer import Trainer
from ernie_train.weights import load_pretrained
from tests.small_models import state
from tests.workspace import final_files, make_workspace, metrics_without_time, write_rows

DORA = {"rank": 4, "dropout": 0.1, "dora": True}


@pytest.fixture(autouse=True)
def _own_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    make_workspace(root)
    preferences = [
        {"prompt": f"What is {n} + 1?", "chosen": f"<response>\n{n + 1}\n</response>",
         "rejected": "<response>\nnone\n</response>"}
        for n in range(6)
    ]  # fmt: skip
    write_rows(root / "preferences.jsonl", preferences)
    reward = "def score(row, completion):\n    return float(len(completion) % 2)\n"
    (root / "reward.py").write_text(reward)
    return root


def sft(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "sft", "kind": "sft", "data": [{"path": str(root / "train.jsonl")}],
        "seq_len": 128, "micro_batch_size": 1, "grad_accum_steps": 2, "steps": 4,
        "optim": {"lr": 1e-2, "schedule": "constant"}, "checkpoint": {"every_steps": 100},
        **changes,
    }  # fmt: skip


def dpo(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "dpo", "kind": "dpo", "data": str(root / "preferences.jsonl"), "seq_len": 64,
        "steps": 3, "pairs_per_step": 2, "micro_batch_size": 2,
        "optim": {"lr": 1e-2, "schedule": "constant"}, "checkpoint": {"every_steps": 100},
        **changes,
    }  # fmt: skip


def upo(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "rl", "kind": "upo", "data": [{"path": str(root / "test.jsonl")}],
        "reward": {"python": str(root / "reward.py") + ":score"}, "canaries": 0, "iterations": 3,
        "rollout": {"prompts_per_iteration": 4, "group_size": 4, "max_new_tokens": 8,
                    "max_prompt_tokens": 64},
        "policy": {"kl": {"coef": 0.01}}, "micro_batch_size": 8,
        "optim": {"lr": 1e-2, "schedule": "constant"}, "checkpoint": {"every_steps": 1}, **changes,
    }  # fmt: skip


def recipe(root: Path, path: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    made = yaml.safe_load((root / "recipe.yaml").read_text())
    made |= {"evaluation": None, "export": None, "stages": list(stages), **changes}
    path.write_text(yaml.safe_dump(made))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, stage: Path) -> None:
    """Sends SIGTERM after a step of a stage."""
    original = Trainer.train_step

    def step_with_signal(self: Any, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if result.step == step and stage.exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "train_step", step_with_signal)


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Path:
    """SFT by DoRA with dropout, then DPO by LoRA, and the export."""
    stages = sft(workspace, lora=DORA), dpo(workspace, lora={"rank": 2, "targets": "q_proj"})
    stages[0]["checkpoint"] = {**stages[0].get("checkpoint", {}), "keep_optimizer": True}
    path = recipe(workspace, workspace / "two.yaml", *stages, export={"dtype": "float32"})
    assert run("run", path, "--run-dir", workspace / "two") == 0
    return workspace / "two"


def checkpoint(run_dir: Path, stage: str) -> Path:
    return sorted((run_dir / stage / "checkpoints").iterdir())[-1]


def test_checkpoints_hold_what_trains_and_name_the_base(whole: Path) -> None:
    first, second = checkpoint(whole, "01-sft"), checkpoint(whole, "02-dpo")
    assert not list(first.glob("model*.safetensors"))
    pairs = set(TensorFiles(first, "adapter_model"))
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight" in pairs
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_magnitude_vector" in pairs
    assert not [name for name in TensorFiles(second, "adapter_model") if "magnitude" in name]
    moments = TensorFiles(first, "optimizer")
    assert {name.partition("/")[2] for name in moments} == pairs
    assert json.loads((first / "base.json").read_text())["relative"] == "../../../initial"
    assert json.loads((second / "base.json").read_text())["path"] == str(first)
    assert {name.split(".")[-3] for name in TensorFiles(second, "adapter_model")} == {"q_proj"}


def test_the_export_is_the_base_and_both_adapters(whole: Path) -> None:
    exported = state(load_pretrained(whole / "export"))
    arrays = state(load_pretrained(whole / "initial"))
    for stage in ("01-sft", "02-dpo"):
        directory = checkpoint(whole, stage)
        files = TensorFiles(directory, "adapter_model")
        scale = 2.0  # alpha is 2 * rank by default
        for name in (n for n in files if n.endswith("lora_A.weight")):
            product = scale * files[name.replace("lora_A", "lora_B")] @ files[name]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            place: tuple[int, ...] = ()
            if ".experts." in module and "shared" not in module:
                layer, _, rest = module.partition(".experts.")
                expert, _, projection = rest.partition(".")
                module, place = f"{layer}.experts.{projection}", (int(expert),)
            parameter = arrays[module if place else f"{module}.weight"]
            merged = parameter[place].T + product  # [out,in]
            magnitudes = name.replace("lora_A.weight", "lora_magnitude_vector")
            if stage == "01-sft":
                merged *= (files[magnitudes] / np.linalg.norm(merged, axis=1))[:, None]
            parameter[place] = merged.T
    for name, array in arrays.items():
        np.testing.assert_allclose(exported[name], array, atol=1e-6, err_msg=name)
    moved = exported["model.layers.0.self_attn.k_proj.weight"]
    assert np.abs(moved - state(load_pretrained(whole / "initial"))[
        "model.layers.0.self_attn.k_proj.weight"]).max() > 1e-3  # fmt: skip


@pytest.mark.parametrize(("stage", "step"), [("01-sft", 2), ("02-dpo", 1)])
def test_a_run_cut_off_continues_bit_for_bit(
    whole: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    stage: str, step: int,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        stop_after(patch, step, tmp_path / "cut" / stage)
        assert run("run", workspace / "two.yaml", "--run-dir", tmp_path / "cut") == 3
    assert checkpoint(tmp_path / "cut", stage).name == f"step_{step:06d}"
    assert run("run", workspace / "two.yaml", "--run-dir", tmp_path / "cut") == 0
    for name in ("01-sft", "02-dpo"):
        found, expected = final_files(tmp_path / "cut", name), final_files(whole, name)
        differing = [file for file in expected if found[file] != expected[file]]
        # The base is named by its path too, and the adapter's settings repeat it.
        assert {Path(file).name for file in differing} <= {"base.json", "adapter_config.json"}
    losses = [[line["loss"] for line in metrics_without_time(d)] for d in (tmp_path / "cut", whole)]
    assert losses[0] == losses[1]


def test_a_moved_run_still_finds_its_base_and_another_base_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    directory = checkpoint(moved, "01-sft")
    record = json.loads((directory / "base.json").read_text())
    (directory / "base.json").write_text(json.dumps({**record, "path": "/nowhere"}))
    before = state(load_pretrained(checkpoint(whole, "01-sft")))
    after = state(load_pretrained(directory))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    (moved / "initial" / "MANIFEST.json").unlink()
    file = next((moved / "initial").glob("model*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert run("generate", directory, "--prompt", "What is 1 + 1?") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "are not those that" in message
    assert str(moved / "initial") in message


def test_generate_eval_and_export_work_from_a_lora_checkpoint(whole: Path, tmp_path: Path) -> None:
    directory = checkpoint(whole, "02-dpo")
    assert run("generate", directory, "--prompt", "What is 1 + 1?", "--max-new-tokens", 2) == 0
    assert run("export", directory, tmp_path / "out", "--dtype", "float32") == 0
    one, other = state(load_pretrained(tmp_path / "out")), state(load_pretrained(whole / "export"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_adapter_alone_is_written_and_read_as_a_model(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = checkpoint(whole, "01-sft"), tmp_path / "adapter"
    assert run("export", first, out, "--adapter") == 0
    assert "PeftModel.from_pretrained" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()} - {"MANIFEST.json"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(whole / "initial")
    one, other = state(load_pretrained(out)), state(load_pretrained(first))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert run("export", checkpoint(whole, "02-dpo"), tmp_path / "no", "--adapter") == 2
    assert "is an adapter's result too" in " ".join(capsys.readouterr().err.split())
    assert run("export", whole / "initial", tmp_path / "no", "--adapter") == 2
    assert "holds no adapter" in " ".join(capsys.readouterr().err.split())


def test_a_merge_that_rounds_to_its_base_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an export would be the base, without a word of it."""
    tiny = {"lora": {"rank": 2}, "optim": {"lr": 1e-10, "schedule": "constant"}, "steps": 1}
    path = recipe(workspace, tmp_path / "recipe.yaml", sft(workspace, **tiny), export={})
    assert run("run", path, "--run-dir", tmp_path / "run") == 2
    assert "as bfloat16, the merge equals its base" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run/export").exists()
    directory = checkpoint(tmp_path / "run", "01-sft")
    assert run("export", directory, tmp_path / "out", "--dtype", "bfloat16") == 2
    assert run("export", directory, tmp_path / "out", "--dtype", "float32") == 0


@pytest.fixture
def models_made(monkeypatch: pytest.MonkeyPatch) -> list[Ernie4_5_MoeForCausalLM]:
    """Every model that is made."""
    made: list[Ernie4_5_MoeForCausalLM] = []
    original = Ernie4_5_MoeForCausalLM.__init__

    def counting(self: Any, *arguments: Any, **keys: Any) -> None:
        original(self, *arguments, **keys)
        made.append(self)

    monkeypatch.setattr(Ernie4_5_MoeForCausalLM, "__init__", counting)
    return made


@pytest.mark.parametrize(
    "changes", [{"lora": {"rank": 2}}, {"lora": {"rank": 2, "dora": True}}, {}]
)
def test_dpo_holds_no_second_model(
    workspace: Path, tmp_path: Path, models_made: list[Any], changes: dict[str, Any]
) -> None:
    path = recipe(workspace, tmp_path / "recipe.yaml", dpo(workspace, **changes))
    assert run("run", path, "--run-dir", tmp_path / "run") == 0
    assert len(models_made) == 1
    losses = [line["preference"] for line in metrics_without_time(tmp_path / "run", "01-dpo")]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are equal
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_rl_with_lora_samples_with_its_adapter_and_holds_no_second_model(
    workspace: Path, tmp_path: Path, models_made: list[Any], monkeypatch: pytest.MonkeyPatch,
    dora: bool,
) -> None:  # fmt: skip
    lora = {"rank": 4, "dora": dora}
    path = recipe(workspace, tmp_path / "recipe.yaml", upo(workspace, lora=lora))
    assert run("run", path, "--run-dir", tmp_path / "run") == 0
    assert len(models_made) == 1
    lines = metrics_without_time(tmp_path / "run", "01-rl")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["kl"] > 1e-3  # the policy has left its reference,
    assert all(line["logprob_mismatch"] < 1e-5 for line in lines)  # and samples as it computes
    with monkeypatch.context() as patch:
        stop_after(patch, 2, tmp_path / "cut/01-rl")
        assert run("run", path, "--run-dir", tmp_path / "cut") == 3
    assert run("run", path, "--run-dir", tmp_path / "cut") == 0
    one, other = (
        TensorFiles(checkpoint(tmp_path / name, "01-rl"), "adapter_model")
        for name in ("run", "cut")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "stages.0.lora.rank: must be >= 1"),
        ({"lora": {"r": 8}}, "r is called rank"),
        ({"lora": {"rank": 4, "targets": ["q_porj"]}}, "stages.0.lora.targets: 'q_porj' matches "
         "no parameter; did you mean 'q_proj'?"),
        ({"lora": {"rank": 4, "targets": ["mlp.gate"]}}, "'mlp.gate' is the router"),
        ({"lora": {"rank": 4, "targets": ["lm_head"]}}, "tie_word_embeddings"),
        ({"lora": {"rank": 4, "targets": ["experts.*.gate_proj"]}}, "routed experts take pairs at"),
        ({"lora": {"rank": 4}, "freeze": ["model"]}, "freeze leaves nothing to train"),
        ({"freeze": ["*"]}, "stages.0.freeze leaves nothing to train"),
        ({"train": ["norms"]}, "stages.0.train: 'norms' matches no parameter; did you mean 'norm'"),
        ({"lora": {"rank": 4}, "train": ["q_proj"]}, "cannot train whole and with a pair"),
        ({"lora": {"rank": 4}, "balance": {"bias_update_rate": 1e-3}}, "routers are frozen"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_one_message(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    path = recipe(workspace, tmp_path / "recipe.yaml", sft(workspace, **changes))
    assert run("run", path, "--run-dir", tmp_path / "run") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run/01-sft").exists()


def test_lora_out_of_place_is_told_where_it_belongs(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(workspace, tmp_path / "recipe.yaml", dpo(workspace))
    for override, message in {
        "model.lora={rank: 4}": "lora belongs to a stage",
        "lora={rank: 4}": "did you mean 'stages[].lora'",
        "stages.dpo.lora={rank: 4, dropout: 0.1}": "policy and reference must compute alike",
    }.items():
        assert run("run", path, override, "--run-dir", tmp_path / "run") == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_new_tokens_need_a_trained_embedding_which_a_checkpoint_then_holds(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = {"path": str(workspace / "tokenizer"), "add": [f"<|new_{n}|>" for n in range(80)]}
    for train, status in (([], 2), (["embed_tokens"], 0)):
        stage = sft(workspace, lora={"rank": 2}, train=train, steps=1)
        path = recipe(workspace, tmp_path / "recipe.yaml", stage, tokenizer=tokenizer)
        assert run("run", path, "--run-dir", tmp_path / "run") == status
    assert "tokens of tokenizer.add" in " ".join(capsys.readouterr().err.split())
    directory = checkpoint(tmp_path / "run", "01-sft")
    rows = len(TensorFiles(directory)["model.embed_tokens.weight"])
    assert rows == len(state(load_pretrained(directory))["model.embed_tokens.weight"]) > 384


def test_a_stage_that_freezes_keeps_what_it_trained(workspace: Path, tmp_path: Path) -> None:
    """Frozen parameters keep their bits, and checkpoints hold the others alone."""
    stages = [sft(workspace, freeze=["mlp", "embed_tokens"]), sft(workspace, name="more")]
    path = recipe(workspace, tmp_path / "recipe.yaml", *stages)
    assert run("run", path, "--run-dir", tmp_path / "run", "--until", "sft") == 0
    directory = checkpoint(tmp_path / "run", "01-sft")
    files = TensorFiles(directory)
    assert not [name for name in files if ".mlp." in name or "embed" in name]
    assert {name.partition("/")[2] for name in TensorFiles(directory, "optimizer")} == set(files)
    before, after = (state(load_pretrained(d)) for d in (tmp_path / "run/initial", directory))
    for name, array in before.items():
        frozen = ".mlp." in name or "embed" in name
        assert np.array_equal(array, after[name]) == frozen, name
    assert run("run", path, "--run-dir", tmp_path / "run") == 0  # all of it trains again
    last = state(load_pretrained(checkpoint(tmp_path / "run", "02-more")))
    changed = {name for name in last if not np.array_equal(last[name], after[name])}
    assert changed >= {name for name in last if "correction_bias" not in name}
