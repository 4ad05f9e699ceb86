"""What the files of an export say of one thing agrees: servers read one or another of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_train.cli.main import main
from ernie_train.data import load_tokenizer
from ernie_train.io.safetensors import TensorFiles
from ernie_train.run.export import Extras, WeightFormat, export
from ernie_train.run.quantize import QuantizeConfig, Quantizer
from ernie_train.weights.hf import DTYPES
from tests.run.test_export import new_model
from tests.workspace import make_workspace, save_model

IDS = ("pad", "bos", "eos")
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "max_new_tokens": 2048}


def read(directory: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / name).read_text(encoding="utf-8"))
    return found


def disagreements(directory: Path) -> list[str]:
    """Return what two files of an export say differently of tokens, template or dtype."""
    config, generation = (read(directory, f"{n}.json") for n in ("config", "generation_config"))
    told, mapped = (
        read(directory, f"{name}.json") for name in ("tokenizer_config", "special_tokens_map")
    )
    content = read(directory, "tokenizer.json")
    ids = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    found = [
        f"{key} of special_tokens_map.json"
        for key, value in mapped.items()
        if told.get(key) != value
    ]
    ends = generation["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    for name in IDS:
        token = ids[told[f"{name}_token"]]
        if config[f"{name}_token_id"] != token:
            found.append(f"{name} of config.json")
        if token not in (ends if name == "eos" else [generation[f"{name}_token_id"]]):
            found.append(f"{name} of generation_config.json")
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if told.get("chat_template", template) != template:
        found.append("chat_template of tokenizer_config.json")
    turn_ends = [t for t in ("<|im_end|>", "<|end_of_sentence|>") if f"{t}" in template]
    found += [f"{token} ends no generation" for token in turn_ends if ids[token] not in ends]
    stored = TensorFiles(directory).stored["model.norm.weight"].dtype
    if DTYPES[config["torch_dtype"]] != stored or "dtype" in config:
        found.append("dtype of config.json")
    if {key: v for key, v in generation.items() if not key.endswith("_token_id")} != SAMPLING:
        found.append("sampling of generation_config.json")
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    make_workspace(root)
    return root


def written(workspace: Path, out: Path, template: str, dtype: str, **keys: Any) -> Path:
    quantize = keys.pop("quantize", None)
    tokenizer = load_tokenizer(workspace / "tokenizer", template=template)
    quantizer = quantize and Quantizer(QuantizeConfig(to=quantize, method="rtn"), [], workspace)
    stored_as = WeightFormat(dtype, quantizer=quantizer)
    model = new_model(**keys)
    model.generation = {**SAMPLING, "eos_token_id": [9], "bos_token_id": 9, "pad_token_id": 9}
    export(model, tokenizer, out, weight_format=stored_as, extras=Extras("# card\n"))
    return out


@pytest.fixture(scope="module")
def an_export(workspace):
    return written(workspace, workspace / "out", "ernie_thinking", "float32")


@pytest.mark.parametrize(
    ("template", "dtype", "keys"),
    [
        ("ernie_thinking", "bfloat16", {}),
        ("ernie_plain", "float32", {"moe_num_experts": 0, "tie_word_embeddings": False}),
        ("ernie_thinking", "float16", {"quantize": "int8"}),
    ],
)
def test_the_files_of_an_export_agree(workspace, tmp_path, template, dtype, keys):
    assert disagreements(written(workspace, tmp_path / "out", template, dtype, **keys)) == []


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("config.json", {"pad_token_id": 5}, "pad of config.json"),
        ("config.json", {"torch_dtype": "bfloat16"}, "dtype of config.json"),
        ("generation_config.json", {"eos_token_id": 2}, "<|im_end|> ends no generation"),
        ("generation_config.json", {"temperature": 0.7}, "sampling of generation_config.json"),
        ("special_tokens_map.json", {"eos_token": "<s>"}, "eos_token of special_tokens_map.json"),
        ("tokenizer_config.json", {"chat_template": "x"}, "chat_template of tokenizer_config.json"),
    ],
)
def test_a_file_that_disagrees_is_found(an_export, tmp_path, file, changes, complaint):
    out = shutil.copytree(an_export, tmp_path / "out")
    path = out / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert disagreements(out) == [complaint]


def test_sampling_and_stops_of_the_base_go_through_training(workspace, tmp_path):
    """From the base to the checkpoints of a whole and a LoRA stage, and both kinds of export."""
    base, run_dir = save_model(workspace), tmp_path / "run"
    told = read(base, "generation_config.json")
    told |= {**SAMPLING, "_from_model_config": True, "eos_token_id": [*told["eos_token_id"], 77]}
    (base / "generation_config.json").write_text(json.dumps(told))
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    (stage,) = recipe["stages"]
    keys = ("seq_len", "micro_batch_size", "data", "optim")
    short = {"kind": "sft", "steps": 1, **{key: stage[key] for key in keys}}
    recipe |= {
        "model": {"path": str(base)}, "tokenizer": {"path": str(base)}, "evaluation": None,
        "stages": [{"name": "whole", **short}, {"name": "lora", "lora": {"rank": 2}, **short}],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    written_by = [["run", tmp_path / "recipe.yaml", "--run-dir", run_dir]]
    written_by += [["export", run_dir, tmp_path / "later", "--dtype", "float32"]]
    for arguments in written_by:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert not ended.value.code
    for directory in (run_dir / "export", tmp_path / "later"):
        found = read(directory, "generation_config.json")
        assert sorted(found.pop("eos_token_id")) == sorted(told["eos_token_id"])
        assert found == {**SAMPLING, "bos_token_id": 1, "pad_token_id": 0}
