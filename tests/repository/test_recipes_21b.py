"""The recipes of the 21B model: sound without its weights, and what they need of a cluster."""

import json
import re
from pathlib import Path

import pytest
import yaml

from ernie_train.cli.main import _run
from ernie_train.core import devices
from ernie_train.core.config import load_yaml
from ernie_train.core.errors import ConfigError
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SFT, PRL = "recipes/ernie-21b-a3b-sft.yaml", "recipes/ernie-21b-a3b-prl.yaml"
CLUSTER = ("--gpus", "8", "--gpu-memory-gb", "80")
LONG = "stages.sft.seq_len=131072"
CRITIC = [
    f"stages.{stage}.critic.optim.lr=1e-6" for stage in ("rl-logic", "rl-math-code", "rl-general")
]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command from the repository's root: status, and all that was printed on one line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str]:
        status, message = _run(list(arguments))
        told = capsys.readouterr().out + message
        return status, re.sub(r"\s+", " ", told)

    return call


@pytest.mark.parametrize("recipe", [SFT, PRL])
def test_they_pass_check_on_a_bare_clone(cli, recipe):
    # Encoding all rows takes as long as the rest of this file; test_embedded_data reads them.
    fewer = [
        f"stages.{number}.data.{source}.max_examples=200"
        for number, stage in enumerate(load_recipe(recipe).stages)
        for source in range(len(stage.data))
    ] + ["stages.0.optim.gradient_dtype=bfloat16"]  # for a GPU, as the recipe asks
    status, told = cli("check", recipe, *fewer)
    assert status == 0, told
    assert "21825.44 M parameters, 3352.15 M active" in told
    place = load_recipe(recipe).model.path
    assert f"model: nothing at {place}; sizes are those of preset 21b-a3b." in told
    assert "data/tokenizer stands in for it" in told
    if recipe == PRL:  # at most 20 of each task
        assert "evaluation: 440 problems of 22 tasks" in told
    missing = devices.why_no_gpu()
    assert (f"device: gpu, but here {missing}. A run needs a GPU." in told) == bool(missing)


@pytest.mark.parametrize(("recipe", "cluster"), [(SFT, CLUSTER), (PRL, ())])
def test_they_fit_eight_gpus(cli, recipe, cluster):
    """Which are assumed where no cluster is named."""
    status, told = cli("plan", recipe, *cluster)
    assert status == 0, told
    assert "(1.441 B dense, 20.384 B in routed experts)" in told
    assert "assumed: 8 GPUs of 80 GB (10^9 bytes); weights bfloat16" in told
    assert "it fits; the fastest: parallel: {expert: " in told
    assert "the recipe's own expert 8 x data 1, sharded optimizer, recompute" in told
    assert " fits: " in told
    assert "nothing at" in told  # that the preset stands for the model
    if recipe == SFT:
        assert "recompute: {parts: [experts]}}" in told, "brackets are no markup"


def test_eighty_columns_cut_nothing_off(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, told = cli("plan", SFT, LONG, "--gpus", "16")
    assert "…" not in told
    assert re.search(r"layers, chunks of 16384 7\d\.\d\d ", told)


def test_the_tables_of_the_page_are_what_plan_says():
    """docs/scaling.md cannot go stale: `tools.evidence.scaling_table --write` remakes it."""
    from tools.evidence import scaling_table

    page = scaling_table.PAGE.read_text("utf-8")
    assert scaling_table.with_tables(page) == page
    with pytest.raises(ValueError, match="one place for the table clusters"):
        scaling_table.with_tables("no marks")


def test_rl_in_the_published_order_by_upo_without_a_critic():
    recipe = load_recipe(ROOT / PRL)
    tasks = [stage.data[0].tasks for stage in recipe.stages]
    assert tasks == [["logic"], ["math", "code"], ["science", "tools"]]
    for stage in recipe.stages:
        assert stage.rollout.max_prompt_tokens + stage.rollout.max_new_tokens == 8192
        assert stage.critic is None
        assert "online" in stage.preference.pairs


def test_a_critic_names_the_smallest_cluster(cli):
    status, told = cli("plan", PRL, *CLUSTER, *CRITIC)
    assert status == 0, told
    assert "nothing fits" in told
    assert "what binds is critic" in told
    assert "the smallest cluster that holds it: 16 ranks" in told


def test_rows_of_128k_name_the_smallest_cluster_and_fit_it(cli):
    status, told = cli("plan", SFT, *CLUSTER, LONG)
    assert status == 0, told
    assert "what binds is activations" in told
    assert "the smallest cluster that holds it: 16 ranks" in told
    chunks = "parallel.recompute={chunk_tokens: 16384}"
    assert f"{LONG} parallel.expert=16 '{chunks}'" in comment_of(SFT)
    sixteen = ("--gpus", "16", "--gpu-memory-gb", "80")
    status, told = cli("plan", SFT, *sixteen, LONG, "parallel.expert=16", chunks)
    assert status == 0, told
    assert "chunks of 16384 fits: " in told


def comment_of(recipe: str) -> str:
    return " ".join((ROOT / recipe).read_text("utf-8").replace("#", "").split())


def test_sft_is_of_the_thinking_model_as_its_publisher_tunes_it():
    """Tokenizer and weights of one release; what changes for LoRA stands in the comment."""
    recipe = load_recipe(ROOT / SFT)
    assert Path(recipe.model.path).name == "ERNIE-4.5-21B-A3B-Thinking"
    assert recipe.tokenizer.path == recipe.model.path
    optim = recipe.stages[0].optim
    assert (optim.lr, optim.min_lr, optim.warmup_steps) == (1e-5, 1e-6, 20)
    assert (optim.beta2, optim.eps, optim.weight_decay) == (0.95, 1e-8, 0.1)
    adapted = ["stages.sft.lora={rank: 32}", "stages.sft.optim.lr=3e-4"]
    assert f"'{adapted[0]}' {adapted[1]}" in comment_of(SFT)
    stage = load_recipe(ROOT / SFT, adapted).stages[0]
    assert (stage.lora.rank, stage.lora.alpha_value, stage.optim.lr) == (32, 64, 3e-4)


def test_lora_fits_a_single_gpu(cli):
    """As Baidu's example of LoRA in rows of 8K has one."""
    single = ["parallel.expert=1", "parallel.sharding=false"]
    assert f"(64 GB by `plan`): {' '.join(single)}" in comment_of(SFT)
    adapted = ["stages.sft.lora={rank: 32}", "stages.sft.optim.lr=3e-4", *single]
    status, told = cli("plan", SFT, *adapted, "--gpus", "1", "--gpu-memory-gb", "80")
    assert status == 0, told
    assert "the recipe's own expert 1 x data 1, recompute layers fits: 63.56" in told


def test_a_run_without_weights_refuses(cli, tmp_path):
    """The stand-ins are for check and plan alone: nothing trains under the wrong vocabulary."""
    recipe = load_yaml(ROOT / SFT) | {"parallel": {}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    status, told = cli("run", str(path), "--run-dir", str(tmp_path / "run"))
    assert status == 2
    assert "models/ERNIE-4.5-21B-A3B-Thinking does not exist" in told
    assert not (tmp_path / "run").exists()


def tiny_recipe(directory: Path, **model: object) -> Path:
    path = directory / "tiny.yaml"  # a recipe.yaml would make it a run directory
    recipe = load_yaml(ROOT / "recipes" / "sft.yaml") | {"model": model}
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_preset_beside_a_path_says_which_sizes_must_lie_there(tmp_path):
    config = Ernie4_5_MoeConfig.preset("tiny")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    same = load_recipe(tiny_recipe(tmp_path, path=str(tmp_path), preset="tiny"))
    assert same.model.build() == config
    assert not same.model.is_absent
    other = load_recipe(tiny_recipe(tmp_path, path=str(tmp_path), preset="mini"))
    with pytest.raises(ConfigError, match=r"other sizes than model.preset=mini: vocab_size=1024, "):
        other.model.build()


def test_what_is_no_size_may_differ_from_the_preset(tmp_path):
    config = Ernie4_5_MoeConfig.preset("tiny", rope_theta=5e5, max_position_embeddings=4096)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = load_recipe(tiny_recipe(tmp_path, path=str(tmp_path), preset="tiny")).model.build()
    assert (found.rope_theta, found.max_position_embeddings) == (5e5, 4096)


def test_a_path_takes_no_overrides_with_a_preset_either(tmp_path):
    with pytest.raises(ConfigError, match="moe_k: a model from path keeps its own sizes"):
        load_recipe(tiny_recipe(tmp_path, path="nowhere", preset="tiny", moe_k=2))
