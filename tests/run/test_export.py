"""Referee: transformers, newest and 4.57, which load an export without this toolkit."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import paddle
import pytest

from ernie_train.core import process_group
from ernie_train.core.errors import WeightsError
from ernie_train.data import DataSource, load_tokenizer
from ernie_train.io.safetensors import TensorFiles, array_entries, write_tensor_files
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.run import export as exports
from ernie_train.run.export import Extras, WeightFormat, export, rounded_copy
from ernie_train.run.proof import Receipt, Trace, compare
from ernie_train.run.quantize import QuantizeConfig, Quantizer
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.saving import save_pretrained
from tests.workspace import REPOSITORY, make_workspace


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    make_workspace(root)
    return load_tokenizer(root / "tokenizer")


def new_model(**keys):
    paddle.seed(2)
    config = Ernie4_5_MoeConfig.preset(
        "tiny", **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48,
                   "num_hidden_layers": 3, "moe_intermediate_size": 16,
                   "initializer_range": 0.2, **keys},
    )  # fmt: skip
    return Ernie4_5_MoeForCausalLM(config)


def write(model, tokenizer, path, **options):
    names = [field.name for field in dataclasses.fields(WeightFormat)]
    given = {"dtype": "float32", **{name: options.pop(name) for name in names if name in options}}
    settings = {"extras": Extras("# card\n"), **options}
    return export(model, tokenizer, path, weight_format=WeightFormat(**given), **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keys", [{}, {"moe_num_experts": 0, "tie_word_embeddings": False}])
def test_transformers_gives_the_receipt(tokenizer, tmp_path, reader, dtype, keys):
    receipt = write(new_model(**keys), tokenizer, tmp_path / "out", dtype=dtype, referee=reader)
    assert receipt.passed
    assert receipt.reader.startswith("transformers 5")
    assert 0 < receipt.max_logit_difference <= 2e-5
    saved = json.loads((tmp_path / "out/export_receipt.json").read_text())
    assert saved["passed"]
    assert saved["reader"] == receipt.reader


@pytest.mark.parametrize("version", ["newest", "4.57"])
def test_the_example_of_the_page_answers_a_prompt(tokenizer, tmp_path, referee, version):
    write(new_model(), tokenizer, tmp_path / "out")
    page = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (example,) = [text for text in examples if "AutoModelForCausalLM" in text]
    script = tmp_path / "example.py"
    script.write_text(example.replace("runs/tiny/export", str(tmp_path / "out")))
    done = referee(script, transformers=version)
    assert "Convert 42 L to mL." in done.stdout
    assert "<|im_start|>assistant" in done.stdout


def quantizer(root, **settings):
    tokens = {} if settings.get("method") == "rtn" else {"calibration_tokens": 700}
    config = QuantizeConfig(**{"to": "int4", **tokens, **settings})
    return Quantizer(config, [DataSource(path=str(root / "train.jsonl"))], root)


@pytest.mark.parametrize(
    ("to", "dtype", "keys"),
    [("int4", "bfloat16", {}), ("int8", "float32", {"moe_num_experts": 0, "use_bias": True})],
)
def test_transformers_reads_a_quantized_export(tokenizer, tmp_path, reader, to, dtype, keys):
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32, **keys}
    receipt = write(
        new_model(**sizes), tokenizer, tmp_path / "out", dtype=dtype, referee=reader,
        quantizer=quantizer(tokenizer.directory.parent, to=to),
    )  # fmt: skip
    assert receipt.passed
    assert receipt.reader.startswith("transformers 5")
    assert receipt.quantization["method"] == "gptq"
    assert receipt.quantization["calibration_tokens"] == 700
    names = [name.removesuffix("_packed") for name in TensorFiles(tmp_path / "out").stored]
    experts = [name for name in names if ".experts." in name and name.endswith("down_proj.weight")]
    assert len(experts) == (0 if keys else 2 * 16)
    stored = TensorFiles(tmp_path / "out").stored
    assert all(stored[f"{name}_packed"].dtype == "I32" for name in experts)
    kept = {"model.embed_tokens.weight", "model.norm.weight"}
    kept |= set() if keys else {"model.layers.1.mlp.gate.weight"}
    assert kept <= stored.keys()


def test_a_quantized_export_is_read_back_without_torch(tokenizer, tmp_path):
    model = new_model(intermediate_size=64, moe_intermediate_size=32)
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    receipt = write(
        model, tokenizer, tmp_path / "out",
        quantizer=quantizer(tokenizer.directory.parent, method="rtn"),
    )  # fmt: skip
    assert receipt.passed
    assert receipt.reader == "ernie_train"
    saved = json.loads((tmp_path / "out/export_receipt.json").read_text())
    assert saved["quantization"] == {
        "scheme": "int4 in groups of 32", "method": "rtn", "calibration_tokens": 0,
        "weights": 3 * 4 + 3 + 2 * (16 + 1) * 3, "rounded_for_few_tokens": [],
    }  # fmt: skip
    loaded = load_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])  # it was a copy that changed
        changed = (loaded.state_dict()[name].numpy() != before[name]).any()
        assert changed == ("_proj" in name)


def test_parts_of_quantized_weights_that_do_not_fit_are_named(tokenizer, tmp_path):
    rounding = quantizer(tokenizer.directory.parent, to="int8", method="rtn")
    write(new_model(), tokenizer, tmp_path / "out", quantizer=rounding)
    (tmp_path / "out/MANIFEST.json").unlink()
    whole = dict(TensorFiles(tmp_path / "out"))
    name = "model.layers.0.self_attn.q_proj.weight"
    words, scale = whole[f"{name}_packed"], whole[f"{name}_scale"]
    for changes, message in (
        ({f"{name}_scale": None}, rf"{name}_packed lacks {name}_scale"),
        ({f"{name}_packed": words[:, 1:]}, rf"{name}_packed: int32 .* do not fit int8"),
        ({f"{name}_scale": scale * np.float32("nan")}, "a scale is NaN or infinite"),
        ({f"{name}_shape": np.array([1, 2])}, "q_proj.weight .*instead of"),
        ({f"{name}_shape": np.array(1)}, "q_proj.weight .*instead of"),
    ):
        arrays = {k: v for k, v in {**whole, **changes}.items() if v is not None}
        write_tensor_files(tmp_path / "out", "model", array_entries(arrays))
        with pytest.raises(WeightsError, match=message):
            load_pretrained(tmp_path / "out")


def test_a_difference_fails_the_receipt_and_says_how_large(tokenizer, tmp_path, monkeypatch):
    def damaged(path, dtype="float32"):
        model = load_pretrained(path, dtype)
        weight = model.model.layers[1].self_attn.q_proj.weight
        weight.set_value(weight + 0.01)
        return model

    monkeypatch.setattr("ernie_train.run.export.load_pretrained", damaged)
    with pytest.raises(WeightsError, match="largest logit difference"):
        write(new_model(), tokenizer, tmp_path / "out")
    assert not json.loads((tmp_path / "out/export_receipt.json").read_text())["passed"]


def test_one_bit_on_disk_fails_the_receipt(tokenizer, tmp_path, monkeypatch):
    def flipped(model, path, *args, **options):
        save_pretrained(model, path, *args, **options)
        file = path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-4] ^= 1  # the lowest bit of a float32: no logit notices
        file.write_bytes(content)

    monkeypatch.setattr("ernie_train.run.export.save_pretrained", flipped)
    monkeypatch.setattr("ernie_train.weights.hf._verify", lambda path: False)
    with pytest.raises(WeightsError, match=r"1 of \d+ stored tensors differ: model\."):
        write(new_model(), tokenizer, tmp_path / "out")
    receipt = json.loads((tmp_path / "out/export_receipt.json").read_text())
    assert receipt["max_logit_difference"] <= receipt["tolerance"]


def test_the_tolerance_grows_with_the_logits():
    logits = np.zeros((4, 8), np.float32)
    logits[:, 3] = 46.0
    expected = Trace([2], [[0, 1, 3, 3]], [logits])
    assert compare(expected, [logits + 2e-4]).difference < compare(expected, [logits]).tolerance
    small = Trace([2], [[0, 1, 3, 3]], [logits / 46])
    found = compare(small, [logits / 46 + 2e-4])
    assert found.difference > found.tolerance


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, -1])
def test_logits_that_are_no_numbers_prove_nothing(odd, row):
    """The rows predict a token of the prompt, and one behind the end: no greedy token shows it."""
    logits = np.zeros((4, 8), np.float32)
    logits[:, 3] = 1.0
    broken = logits.copy()
    broken[row] = odd
    for ours, theirs in ((logits, broken), (broken, logits), (broken, broken)):
        found = compare(Trace([2], [[0, 1, 3, 3]], [ours]), [theirs])
        compared = (found.difference, found.tolerance, found.tokens_equal, "")
        receipt = Receipt("float32", "reader", 1, *compared)
        assert not receipt.passed
        written = json.loads(json.dumps(receipt.as_dict(), allow_nan=False))
        assert not written["passed"]
        assert repr(float(written["max_logit_difference"])) == repr(found.difference)


def test_greedy_tokens_differ_unless_they_tie():
    logits = np.zeros((4, 8), np.float32)
    logits[:, 3] = 1.0
    expected = Trace([2], [[0, 1, 3, 3]], [logits])
    tie, other = logits.copy(), logits.copy()
    tie[1, 5], other[1, 5] = 1.000001, 1.1
    assert compare(expected, [tie]).tokens_equal
    assert not compare(expected, [other]).tokens_equal


def test_float16_is_served_or_refused_at_once(tokenizer, tmp_path):
    assert write(new_model(), tokenizer, tmp_path / "out", dtype="float16").passed
    stored = TensorFiles(tmp_path / "out").stored
    assert {t.dtype for n, t in stored.items() if "norm" in n} == {"F16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float16"
    model = new_model()
    model.model.norm.weight.set_value(model.model.norm.weight + 1e5)
    with pytest.raises(WeightsError, match=r"model.norm.weight: 1e\+05 is too large for float16"):
        write(model, tokenizer, tmp_path / "large", dtype="float16")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("name", ["ernie_thinking", "ernie_plain", "own.jinja"])
def test_the_chat_template_is_the_one_trained_with(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    own = load_tokenizer(tokenizer.directory, template=name)
    write(new_model(), own, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == own.chat.template.source
    assert load_tokenizer(tmp_path / "out").chat.template.source == own.chat.template.source


def test_without_torch_the_receipt_says_so(tokenizer, tmp_path):
    receipt = write(new_model(), tokenizer, tmp_path / "out")
    assert receipt.reader == "ernie_train"
    assert "torch is not installed" in receipt.note


@pytest.mark.parametrize(("ranks", "where"), [(1, ["cpu", "gpu:0"]), (8, [])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_holds_no_float32_model_beside_the_trained_one(
    tokenizer, tmp_path, monkeypatch, ranks, where, dtype
):
    """21B in bfloat16 leave no room for it; several ranks have a part each, and need their GPUs."""
    model, selected, compared = new_model(), [], []
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0" if not selected else selected[-1])
    monkeypatch.setattr(paddle, "set_device", selected.append)
    monkeypatch.setattr(process_group, "world_size", lambda: ranks)
    monkeypatch.setattr(exports, "save_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(exports, "trace", lambda model, _: compared.append((model, [*selected])))
    monkeypatch.setattr(exports, "_read_back", lambda *_: [*selected] == where[:1] and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(model, tokenizer, tmp_path / "out", dtype=dtype)
    ((traced, during),) = compared
    assert during == where[:1] and selected == where
    # The stand-in's weights are on the CPU: where it computes on "the GPU", they are a copy.
    assert (traced is model) == (dtype == "float32" and ranks == 1)


def test_rounding_keeps_the_router_exact():
    model = new_model()
    copy = rounded_copy(model, "bfloat16")
    for name, tensor in model.state_dict().items():
        rounded = copy.state_dict()[name].numpy()
        if name.endswith(".mlp.gate.weight"):
            np.testing.assert_array_equal(rounded, tensor.numpy())
        elif "proj" in name:
            assert (rounded != tensor.numpy()).any()
            np.testing.assert_allclose(rounded, tensor.numpy(), rtol=2**-8)
