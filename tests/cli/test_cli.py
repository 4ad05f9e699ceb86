"""The command line as a user meets it: every mistake is one clear message and the right status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import ernie_train
from ernie_train.cli.main import main
from ernie_train.rewards.sandbox import api
from tests.workspace import REPOSITORY, make_workspace, rows, write_recipe, write_rows


@pytest.fixture(autouse=True)
def _own_reader(monkeypatch):
    """Exports are read back by this toolkit alone: test_export lets transformers do it."""
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    make_workspace(root)
    return root


@pytest.fixture(scope="module")
def trained(workspace):
    """A finished run of a few steps."""
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(workspace / "recipe.yaml"), "--run-dir", str(workspace / "run"),
              "stages.sft.steps=3", "evaluation=null", "export=null"])  # fmt: skip
    assert stopped.value.code == 0
    return workspace / "run"


@pytest.fixture
def cli(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(stopped.value.code or 0), captured.out, " ".join(captured.err.split())

    return call


# ---- recipes ------------------------------------------------------------------------------------

MISTAKES = [
    ({"modle": {"preset": "tiny"}}, "did you mean 'model'"),
    ({"model": {"preset": "tinny"}}, "tinny"),
    ({"model": {"preset": "tiny", "moe_kk": 2}}, "moe_k"),
    ({"model": {"preset": "tiny", "moe_k": 99}}, "moe_k"),
    ({"model": {"path": "x", "moe_k": 2}}, "a model from path keeps its own sizes"),
    ({"model": {}}, "preset or path must be given"),
    ({"seed": "seven"}, "seed"),
    ({"seed": -1}, "seed"),
    ({"device": "tpu"}, "device"),
    ({"sandbox": "rlimits_only"}, "delete it: programs of a model always run in a"),
    ({"stages": []}, "stages"),
    ({"export": {"dtype": "int8"}}, "export.dtype"),
    ({"parallel": {"expert": 3}}, "parallel.expert"),
    ({"parallel": {"data": 0}}, "parallel.data"),
    ({"parallel": {"sharding": True}}, "sharding has no effect on one rank"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_mistake_in_the_recipe(workspace, tmp_path, cli, change, message, verb):
    recipe = workspace / "recipe.yaml"
    text = recipe.read_text()
    try:
        write_recipe(workspace, **change)
        extra = ["--run-dir", tmp_path / "run"] if verb == "run" else []
        status, _, err = cli(verb, recipe, *extra)
    finally:
        recipe.write_text(text)
    assert status == 2
    assert message in err
    assert not (tmp_path / "run").exists(), "nothing may be written before the recipe is right"


def test_all_mistakes_at_once_each_with_its_path(workspace, cli):
    status, _, err = cli(
        "check", workspace / "recipe.yaml", "stages.sft.optim.lr=-1", "stages.sft.seq_len=0",
        "stages.sft.kind=sft", "export.dtype=int8",
    )  # fmt: skip
    assert status == 2
    for path in ("stages.0.optim.lr", "stages.0.seq_len", "export.dtype"):
        assert path in err


def test_an_unknown_key_in_a_stage_names_the_nearest(workspace, cli):
    status, _, err = cli("check", workspace / "recipe.yaml", "stages.sft.optim.larning_rate=1e-3")
    assert status == 2
    assert "larning_rate" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.epochs=2", "exactly one of epochs and steps must be given; epochs=null takes"),
        ("stages.sft.validation=[]", "validate_every_steps needs validation data"),
        ("stages.sft.seq_len=4096", "max_position_embeddings=256"),
        ("model.vocab_size=100", "vocab_size=100"),
        ("stages.sft.optim.min_lr=1", "min_lr"),
        ("stages.sft.data.0.path=/nowhere.jsonl", "/nowhere.jsonl"),
        ("tokenizer.path=/nowhere", "/nowhere"),
        ("evaluation.path=/nowhere", "/nowhere"),
        ("stages.nope.steps=3", "nope"),
    ],
)
def test_settings_that_do_not_fit_together(workspace, cli, override, message):
    status, _, err = cli("check", workspace / "recipe.yaml", override)
    assert status == 2
    assert message in err


def test_broken_yaml_and_missing_recipe(tmp_path, cli):
    (tmp_path / "bad.yaml").write_text("name: x\nseed: [1,\n")
    status, _, err = cli("check", tmp_path / "bad.yaml")
    assert status == 2
    assert "bad.yaml" in err
    status, _, err = cli("check", tmp_path / "none.yaml")
    assert status == 2
    assert "none.yaml" in err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no rows"),
        (["not json"] * 20, "not json"),
        ([json.dumps({"messages": [{"role": "user", "content": "?"}]})] * 20, "nothing"),
    ],
)
def test_data_without_a_row_to_train_on(workspace, tmp_path, cli, lines, message):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    status, _, err = cli(
        "run", workspace / "recipe.yaml", f"stages.sft.data.0.path={data}",
        "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert status == 2
    assert "data.jsonl" in err
    assert message in err or ":1" in err


def test_check_shows_batch_report_and_label_mask(workspace, cli):
    status, out, _ = cli("check", workspace / "recipe.yaml")
    assert status == 0
    words = " ".join(out.split())
    assert "a step trains 4 rows of 128 tokens (512 at most) in 2 micro-batches; steps: 12" in words
    assert "think_mode=True" in out
    assert "20 problems of 1 tasks" in words
    assert "beta2: 0.95" not in out  # a default: of the recipe itself nothing is repeated


def test_check_prints_the_recipe_with_its_defaults_when_asked(workspace, cli):
    status, out, _ = cli("check", workspace / "recipe.yaml", "stages.sft.seq_len=64", "--resolved")
    assert status == 0
    assert "beta2: 0.95" in out and "seq_len: 64" in out and "rows of 64 tokens" in out


def test_problems_that_cannot_be_scored_are_refused_before_training(
    workspace, tmp_path, cli, monkeypatch
):
    made = rows(2, 0)
    made[1]["reward"] = "exactt"
    write_rows(tmp_path / "test.jsonl", made)
    arguments = ("run", workspace / "recipe.yaml", f"evaluation.path={tmp_path / 'test.jsonl'}",
                 "--run-dir", tmp_path / "run")  # fmt: skip
    status, _, err = cli(*arguments)
    assert status == 2
    assert "did you mean 'exact'" in err
    made[1] |= {"reward": "code", "tests": [], "entry_point": "f"}
    write_rows(tmp_path / "test.jsonl", made)
    monkeypatch.setattr(api, "possible_layers", lambda: ([], ["no bubblewrap"]))
    api.current_layer.cache_clear()
    status, _, err = cli(*arguments)
    api.current_layer.cache_clear()
    assert status == 1
    assert "bubblewrap" in err
    assert not (tmp_path / "run").exists()


# ---- places -------------------------------------------------------------------------------------


def test_an_unwritable_run_directory_is_an_io_error(workspace, tmp_path, cli):
    (tmp_path / "file").write_text("")
    status, _, err = cli("run", workspace / "recipe.yaml", "--run-dir", tmp_path / "file/run")
    assert status == 1
    assert "file/run" in err


def test_from_and_until_name_known_stages(workspace, tmp_path, cli):
    status, _, err = cli(
        "run", workspace / "recipe.yaml", "--run-dir", tmp_path / "run", "--from", "stf"
    )
    assert status == 2
    assert "no stage 'stf'" in err


@pytest.mark.parametrize("verb", ["status", "eval", "export", "generate"])
def test_a_directory_that_is_no_model(tmp_path, cli, verb):
    extra = {"export": [tmp_path / "out"], "generate": ["--prompt", "x"]}.get(verb, [])
    problems = tmp_path / "test.jsonl"
    write_rows(problems, rows(2, 0))
    if verb == "eval":
        extra = ["--data", problems]
    status, _, err = cli(verb, tmp_path, *extra)
    assert status == 2
    assert str(tmp_path) in err.replace(" ", "")


def test_usage_errors_exit_2(cli):
    assert cli("run")[0] == 2
    assert cli("fly")[0] == 2


# ---- the verbs on a trained model ----------------------------------------------------------------


def test_status_shows_stages_and_what_comes_next(trained, cli):
    status, out, _ = cli("status", trained)
    assert status == 0
    assert "sft" in out
    assert "done" in out
    assert "next: nothing" in out


def test_a_run_directory_of_another_version_is_refused_with_its_version(trained, tmp_path, cli):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    recipe = (old / "recipe.yaml").read_text().replace("seq_len:", "sequence_length:")
    (old / "recipe.yaml").write_text(recipe)
    for arguments in (("status", old), ("export", old, tmp_path / "out")):
        status, _, err = cli(*arguments)
        assert status == 2
        assert f"was recorded by ernie_train {ernie_train.__version__}" in err
        assert "stages.0" in err
    assert not (tmp_path / "out").exists()
    (checkpoint,) = list((old / "01-sft/checkpoints").glob("step_000003"))
    assert cli("export", checkpoint, tmp_path / "out")[0] == 0, "as the message says"
    (old / "environment.json").unlink()
    assert "an unknown version" in cli("status", old)[2]


def test_generate_from_run_checkpoint_and_export(trained, tmp_path, cli):
    out = tmp_path / "out"
    status, message, _ = cli("export", trained, out, "--dtype", "float32")
    assert status == 0
    before, passed, _ = " ".join(message.split()).partition("passed")
    assert passed and "then reading it back and comparing logits" in before
    checkpoint = sorted((trained / "01-sft/checkpoints").iterdir())[-1]
    texts = [
        cli("generate", place, "--prompt", "What is 1 + 2?", "--max-new-tokens", 8)
        for place in (trained, checkpoint, out)
    ]
    assert [status for status, _, _ in texts] == [0, 0, 0]
    assert len({text for _, text, _ in texts}) == 1


def test_export_in_bfloat16_keeps_the_router_in_float32_and_passes(trained, tmp_path, cli):
    from ernie_train.io.safetensors import TensorFiles

    assert cli("export", trained, tmp_path / "out")[0] == 0
    receipt = json.loads((tmp_path / "out/export_receipt.json").read_text())
    assert receipt["passed"]
    assert receipt["dtype"] == "bfloat16"
    files = TensorFiles(tmp_path / "out")
    assert files["model.layers.1.mlp.gate.weight"].dtype == "float32"


def test_export_refuses_a_directory_that_is_not_ours(trained, tmp_path, cli):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    status, _, err = cli("export", trained, tmp_path / "out")
    assert status == 2
    assert str(tmp_path / "out") in err.replace(" ", "")
    assert (tmp_path / "out/precious.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_named(trained, tmp_path, cli):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    weights = sorted(copy.glob("01-sft/checkpoints/*/model.safetensors"))[-1]
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    status, _, err = cli("generate", copy, "--prompt", "x")
    assert status == 2
    assert "model.safetensors" in err


def test_eval_prints_a_table_and_writes_results(trained, workspace, tmp_path, cli):
    out = tmp_path / "out"
    arguments = ("eval", trained, "--data", workspace / "test.jsonl", "--max-examples", 6, "--n", 2,
                 "--max-new-tokens", 8, "--few-shot", workspace / "train.jsonl", "--shots", 1,
                 "--out", out)  # fmt: skip
    status, printed, _ = cli(*arguments)
    assert status == 0
    assert "problems  12/12" in printed
    for name in ("sum", "pass@1", "pass@2", "maj@2"):
        assert name in printed
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12
    assert {sample["status"] for sample in samples} <= {"correct", "wrong"}
    results = json.loads((out / "results.json").read_text())
    assert results["format"] == "ernie_train.evaluation/1"
    assert results["settings"]["k"] == [1, 2] and results["settings"]["shots"] == 1
    (task,) = results["trained"]["tasks"]
    assert task["completions"] == 12 and set(task["estimates"]) == {"pass@1", "pass@2", "maj@2"}
    assert set(task["estimates"]["pass@2"]) == {"value", "low", "high"}
    status, printed, _ = cli(*arguments, "--json")
    assert status == 0 and json.loads(printed) == results, "nothing else is on the output"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--tasks", "addition"), "addition"),
        (("--n", 4, "--temperature", 0), "4 times"),
        (("--n", 4, "--k", "1,8"), "--k 8: pass@k needs 1 to --n completions, here 4"),
        (("--k", "0"), "--k 0"),
        (("--k", "many"), "sizes such as 1,8"),
        (("--shots", 2), "--few-shot"),
        (("--few-shot", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_mistakes_in_the_options_of_eval(trained, workspace, cli, wrong, told):
    status, _, err = cli("eval", trained, "--data", workspace / "test.jsonl", *wrong)
    assert status == 2 and told in err


def test_doctor_runs(cli):
    status, out, _ = cli("doctor")
    assert status == 0
    assert "GFLOP" in out


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ernie_train", "--help"],
        cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True, check=True,
    )  # fmt: skip
    for verb in ("run", "check", "status", "eval", "generate", "chat", "export", "doctor"):
        assert verb in done.stdout


# ---- outputs -------------------------------------------------------------------------------------


def test_export_replaces_neither_a_checkpoint_nor_what_it_reads(trained, tmp_path, cli):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = run / "01-sft/checkpoints/step_000003"
    before = (checkpoint / "MANIFEST.json").read_bytes()
    for model in (run, checkpoint):
        status, _, err = cli("export", model, checkpoint)
        assert status == 2
        assert "--force" in err
    assert (checkpoint / "MANIFEST.json").read_bytes() == before
    out = tmp_path / "out"
    assert cli("export", run, out, "--dtype", "float32")[0] == 0
    assert cli("export", out, out)[0] == 2
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert cli("export", run, out)[0] == 0, "an earlier export is replaced"
    assert cli("export", out, out, "--dtype", "float32", "--force")[0] == 0


def test_eval_writes_over_its_own_results_only(trained, workspace, tmp_path, cli):
    arguments = ("eval", trained, "--data", workspace / "test.jsonl", "--max-examples", 1,
                 "--max-new-tokens", 1, "--out")  # fmt: skip
    out = tmp_path / "out"
    assert cli(*arguments, out)[0] == 0
    assert cli(*arguments, out)[0] == 0
    for place in (workspace / "test.jsonl", workspace, out / "results.json"):
        before = place.read_bytes() if place.is_file() else None
        assert cli(*arguments, place)[0] == 2
        assert before is None or place.read_bytes() == before


def test_a_run_does_not_replace_the_recipe_beside_which_it_is_started(workspace, cli, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((workspace / "recipe.yaml").read_text())
    status, _, err = cli("run", recipe, "--run-dir", tmp_path)
    assert status == 2
    assert "another --run-dir" in err
    assert recipe.read_text() == (workspace / "recipe.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
