"""Adapters on disk: PEFT's layout, with peft itself as the referee, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.core.errors import CheckpointError, WeightsError
from ernie_train.data import Batch
from ernie_train.io.safetensors import TensorFiles, array_entries, write_tensor_files
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.lora import LoraConfig
from ernie_train.model.partial import begin_partial_training, select, trained_parameters
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.supervised import PackedLoss
from ernie_train.train.trainer import Trainer
from ernie_train.weights import CheckpointStore, find_model, load_pretrained, save_pretrained
from ernie_train.weights.adapters import describe_base, hash_weights
from ernie_train.weights.layout import parameter_shapes
from tests.small_models import VARIANTS, make_model, state

Referee = Callable[..., Any]
ALL = ["all-linear", "embed_tokens", "lm_head"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": ("untied", {"targets": ALL}),
    "moe": ("moe", {"rslora": True}),
    "dense": ("dense", {"rslora": True, "dropout": 0.1}),
    "attention": ("moe", {"targets": ["q_proj", "layers.1.self_attn.v_proj"]}),
    "shared": ("moe", {"targets": ["shared_experts", "layers.0.mlp"]}),
    "experts": ("no-shared", {"targets": "experts", "dropout": 0.1}),
    "dora-dense": ("dense-bias", {"dora": True, "dropout": 0.1, "targets": ALL}),
    "dora-attention": ("moe", {"dora": True, "rslora": True, "targets": "self_attn"}),
}
# peft fuses experts on transformers 5 as parameters, for which it has no DoRA.
ON_457_ALONE = {
    "dora": ("untied", {"dora": True, "targets": ALL}),
    "dora-experts": ("no-shared", {"dora": True, "rslora": True, "targets": "experts"}),
}


def begin(
    directory: Path,
    sizes: dict[str, Any],
    zero_b: bool = False,
    dtype: str = "float32",
    **settings: Any,
) -> Ernie4_5_MoeForCausalLM:
    """A model with pairs of random numbers, its base in `directory`/base."""
    model = make_model(**sizes)
    save_pretrained(model, directory / "base", dtype=dtype)
    if dtype != "float32":
        model = load_pretrained(directory / "base", dtype=dtype)
    lora = LoraConfig(**{"rank": 3, "alpha": 8, **settings})
    selection = select(parameter_shapes(model.config), lora, [], [])
    begin_partial_training(model, selection, lora, describe_base(directory / "base"), seed=1)
    random = np.random.default_rng(1)
    for matrix in trained_parameters(model).values() if not zero_b else ():
        values = random.normal(0, 0.1, matrix.shape).astype(np.float32)
        matrix.set_value(paddle.to_tensor(values).astype(matrix.dtype))
    return model


def save(model: Ernie4_5_MoeForCausalLM, directory: Path) -> Path:
    """Write the model's checkpoint as `directory`/adapter, with the three files of an adapter."""
    written = CheckpointStore(directory / "checkpoints").save(
        1, model=model, optimizer={}, state={}
    )
    (directory / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        shutil.copy(written / name, directory / "adapter")
    return directory / "adapter"


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (2, 9))


def logits(model: Ernie4_5_MoeForCausalLM) -> np.ndarray:
    model.eval()
    found: np.ndarray = model(paddle.to_tensor(tokens())).logits.numpy()
    return found


@pytest.mark.parametrize("transformers", ["newest", "4.57"])
def test_peft_computes_what_we_do(tmp_path: Path, referee: Referee, transformers: str) -> None:
    expected, cases = {}, CASES | (ON_457_ALONE if transformers == "4.57" else {})
    for name, (variant, settings) in cases.items():
        model = begin(tmp_path / name, VARIANTS[variant], **settings)
        expected[name] = logits(model)
        adapter = save(model, tmp_path / name)
        np.savez(tmp_path / name / "inputs.npz", input_ids=tokens())
        merged = load_pretrained(adapter)  # an adapter reads as a model: its base, merged
        np.testing.assert_allclose(logits(merged), expected[name], atol=1e-5)
    (tmp_path / "cases.json").write_text(json.dumps([{"name": name} for name in cases]))
    referee("peft_lora.py", tmp_path, transformers=transformers)
    for name, ours in expected.items():
        found = np.load(tmp_path / name / "logits.npz")
        np.testing.assert_allclose(found["logits"], ours, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found["merged"], ours, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES | ON_457_ALONE)
def test_a_model_in_training_is_saved_as_its_adapter_reads(
    tmp_path: Path, case: str, dtype: str
) -> None:
    """Bit for bit: what an engine is given is what the stage's export will hold."""
    variant, settings = (CASES | ON_457_ALONE)[case]
    model = begin(tmp_path, VARIANTS[variant], dtype=dtype, **settings)
    adapter = save(model, tmp_path)
    save_pretrained(model, tmp_path / "training", max_shard_size="20KB")
    merged = load_pretrained(adapter)
    save_pretrained(merged, tmp_path / "merged", dtype=dtype, max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "merged").glob("model*"))
    assert len(files) > 2
    for name in files:
        found, expected = (tmp_path / side / name for side in ("training", "merged"))
        assert found.read_bytes() == expected.read_bytes(), name


def full_batch(ids: np.ndarray) -> Batch:
    """Every row one document, every next token trained."""
    rows, length = ids.shape
    labels = np.roll(ids, -1, 1)
    mask = np.ones(ids.shape, np.float32)
    mask[:, -1] = 0
    return Batch(
        input_ids=ids,
        labels=labels,
        loss_mask=mask,
        position_ids=np.tile(np.arange(length), (rows, 1)),
        document_ids=np.ones(ids.shape, np.int64),
    )


def test_thirty_steps_are_those_of_transformers_and_peft(tmp_path: Path, referee: Referee) -> None:
    """The same weights, batches and AdamW: losses step by step, and the model after them.

    LoRA, DoRA and all parameters, dense and with experts. On transformers 4.57: peft trains on 5
    more than one pair an expert, since it fuses those of gate and up into one of twice the rank.
    """
    rates = {"everything": 5e-3, "dense": 5e-3, "moe": 5e-3, "dora": 5e-3, "dora-dense": 5e-3,
             "all-dense": 1e-3, "all-moe": 1e-3}  # fmt: skip
    # Without id 0, padding, whose embedding takes no gradient in transformers.
    batches = np.random.default_rng(4).integers(1, 96, (3, 2, 16))
    expected, after = {}, {}
    for name, rate in rates.items():
        # Every token goes to all experts: choosing among them, the two would part at the first tie.
        variant, settings = (CASES | ON_457_ALONE).get(name, (name[4:], {}))
        sizes = {**VARIANTS[variant], "moe_k": 4}
        if settings:
            model = begin(tmp_path / name, sizes, zero_b=True, **settings | {"dropout": 0.0})
            save(model, tmp_path / name)
        else:
            model = make_model(**sizes)
            save_pretrained(model, tmp_path / name / "base")
        optim = OptimConfig(lr=rate, schedule="constant")
        trainer: Trainer[Any, Any] = Trainer(model, Optimizer(model, optim))
        rows = batches[np.arange(30) % len(batches)]
        steps = [trainer.train_step([full_batch(b)], PackedLoss("tokens"), 30) for b in rows]
        expected[name] = [step.metrics["loss"] for step in steps]
        after[name] = logits(model)
        np.savez(tmp_path / name / "inputs.npz", input_ids=tokens(), batches=rows)
    cases = [{"name": name, "steps": {"lr": rate}} for name, rate in rates.items()]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    referee("peft_lora.py", tmp_path, transformers="4.57")
    for name, ours in expected.items():
        found = np.load(tmp_path / name / "logits.npz")
        np.testing.assert_allclose(found["losses"], ours, atol=3e-5, err_msg=name)
        assert found["losses"][0] - found["losses"][-1] > 0.3, name
        np.testing.assert_allclose(found["logits"], after[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_pairs_of_a_bfloat16_model_are_saved_and_read_back(tmp_path: Path, dora: bool) -> None:
    save_pretrained(make_model(), tmp_path / "base")
    model = load_pretrained(tmp_path / "base", dtype="bfloat16")
    lora = LoraConfig(rank=3, dora=dora)
    selection = select(parameter_shapes(model.config), lora, [], [])
    begin_partial_training(model, selection, lora, describe_base(tmp_path / "base"), seed=1)
    random, trained = np.random.default_rng(1), trained_parameters(model)
    for matrix in trained.values():
        numbers = paddle.to_tensor(random.normal(0, 0.1, matrix.shape).astype(np.float32))
        matrix.set_value(numbers.astype(matrix.dtype))
    before = {name: p.astype("float32").numpy() for name, p in trained.items()}
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(1, model=model, optimizer={}, state={})
    for matrix in trained.values():
        matrix.set_value(paddle.zeros(matrix.shape, matrix.dtype))
    store.load(path).load_model(model)
    for name, matrix in trained_parameters(model).items():
        np.testing.assert_array_equal(matrix.astype("float32").numpy(), before[name], err_msg=name)


PEFTS_OWN = {
    "dense": ("dense-bias", {"target_modules": ["q_proj", "o_proj", "gate_proj", "lm_head"]}),
    "embedding": (
        "dense-bias",
        {"target_modules": ["embed_tokens", "v_proj"], "use_rslora": True},
    ),
    "experts": ("no-shared", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
}


def test_an_adapter_that_peft_made_computes_the_same_here(tmp_path: Path, referee: Referee) -> None:
    """Made with random numbers and saved by peft, of LoRA and DoRA."""
    cases = {
        f"{name}-{'dora' if dora else 'lora'}": (variant, {**settings, "use_dora": dora})
        for name, (variant, settings) in PEFTS_OWN.items()
        for dora in (False, True)
    }
    for name, (variant, _) in cases.items():
        save_pretrained(make_model(**VARIANTS[variant]), tmp_path / name / "base")
        np.savez(tmp_path / name / "inputs.npz", input_ids=tokens())
    made = [
        {"name": name, "make": {"r": 3, "lora_alpha": 8, **settings}}
        for name, (_, settings) in cases.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(made))
    referee("peft_lora.py", tmp_path, transformers="4.57")
    for name in cases:
        here = logits(load_pretrained(tmp_path / name / "adapter"))
        found = np.load(tmp_path / name / "logits.npz")
        np.testing.assert_allclose(here, found["logits"], atol=1e-5, err_msg=name)
        base = logits(load_pretrained(tmp_path / name / "base"))
        assert np.abs(here - base).max() > 0.05, name


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(begin(tmp_path, {}), tmp_path)


def test_an_adapter_of_peft_alone_reads_as_a_model(adapter: Path) -> None:
    before = state(load_pretrained(adapter))
    (adapter / "base.json").unlink()
    assert find_model(adapter).weights == adapter
    after = state(load_pretrained(adapter))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_settings_saved_by_an_editor_of_windows_are_read(adapter: Path) -> None:
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text(), "utf-8-sig", newline="\r\n")
    load_pretrained(adapter)
    settings.write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"adapter_config\.json: cannot be read: .*too deeply"):
        load_pretrained(adapter)


def test_a_damaged_manifest_of_the_base_is_told(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a manifest of this program"):
        hash_weights(tmp_path)


def test_what_peft_saves_whole_is_read_too(adapter: Path) -> None:
    """modules_to_save of PEFT, such as an embedding that was resized."""
    embedding = np.full((96, 32), 0.25, np.float32)
    name = "base_model.model.model.embed_tokens.weight"
    rewrite(adapter, lambda arrays: arrays.update({name: embedding}))
    found = state(load_pretrained(adapter))["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found, embedding)


def rewrite(adapter: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    arrays = dict(TensorFiles(adapter, "adapter_model"))
    change(arrays)
    write_tensor_files(adapter, "adapter_model", array_entries(arrays))


def settings(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBED = "base_model.model.model.embed_tokens.lora_embedding"
Q_M = Q_A.replace("lora_A.weight", "lora_magnitude_vector")
E_A = "base_model.model.model.layers.1.mlp.experts.0.gate_proj.lora_A.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (lambda d: settings(d, r=4), "have rank 3, adapter_config.json says r: 4"),
    "dora without magnitudes": (
        lambda d: settings(d, use_dora=True),
        r"an adapter of another base: missing .*lora_magnitude_vector",
    ),
    "magnitudes without dora": (
        lambda d: rewrite(d, lambda a: a.update({Q_M: np.ones(32, np.float32)})),
        "holds magnitudes of DoRA, but adapter_config.json says use_dora: false",
    ),
    "another kind": (lambda d: settings(d, use_qalora=True), "cannot be read here: use_qalora"),
    "patterns": (lambda d: settings(d, rank_pattern={"q_proj": 8}), "rank_pattern"),
    "pissa": (lambda d: settings(d, init_lora_weights="pissa_niter_4"), "changes the base"),
    "fused": (
        lambda d: rewrite(
            d, lambda a: a.update({E_A.replace("0.gate_proj.", "base_layer."): np.ones((3, 2))})
        ),
        "fused experts, as peft saves them on transformers 5",
    ),
    "tied embedding": (
        lambda d: rewrite(
            d,
            lambda a: a.update(
                {f"{EMBED}_A": np.ones((3, 96), "f4"), f"{EMBED}_B": np.ones((32, 3), "f4")}
            ),
        ),
        "a pair beside the embedding, which is the head too",
    ),
    "no rank": (lambda d: settings(d, r=None), "r and lora_alpha must be numbers"),
    "damaged": (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read"),
    "zero": (
        lambda d: rewrite(d, lambda a: a.update({n: 0 * a[n] for n in a})),
        "merged it equals its base",
    ),
    "width": (
        lambda d: rewrite(d, lambda a: a.update({Q_A: np.ones((3, 48), np.float32)})),
        r"an adapter of another base: wrong shape \(1\): .*q_proj.lora_A.weight \[3, 48\] instead",
    ),
    "unknown": (
        lambda d: rewrite(d, lambda a: a.update({Q_A.replace("layers.0", "layers.9"): a[Q_A]})),
        "an adapter of another base: .*not of this model",
    ),
    "half a pair": (lambda d: rewrite(d, lambda a: a.__delitem__(Q_A)), "missing .*q_proj.lora_A"),
    "base": (
        lambda d: shutil.move(d.parent / "base", d.parent / "elsewhere"),
        "names the base .*, which is not another directory here: set it to the base's place",
    ),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_faulty_adapter_is_one_message(adapter: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(adapter)
    with pytest.raises(WeightsError, match=message) as caught:
        load_pretrained(adapter)
    assert str(adapter) in str(caught.value)


def test_magnitudes_alone_are_a_change_and_fresh_ones_are_none(tmp_path: Path) -> None:
    """With B at zero the merge equals the base unless a magnitude moved."""
    adapter = save(begin(tmp_path, VARIANTS["dense"], zero_b=True, dora=True), tmp_path)
    with pytest.raises(WeightsError, match="merged it equals its base"):
        load_pretrained(adapter)
    rewrite(adapter, lambda arrays: arrays.update({Q_M: 1.5 * arrays[Q_M]}))
    name = "model.layers.0.self_attn.q_proj.weight"
    before, after = (state(load_pretrained(d)) for d in (tmp_path / "base", adapter))
    np.testing.assert_allclose(after[name], 1.5 * before[name], rtol=1e-5)


def test_weights_of_another_base_of_the_same_size_are_noticed(adapter: Path) -> None:
    other = make_model()
    other.model.norm.weight.set_value(2 * other.model.norm.weight)
    shutil.rmtree(adapter.parent / "base")
    save_pretrained(other, adapter.parent / "base")
    with pytest.raises(WeightsError, match=r"are not those that .* was trained on"):
        load_pretrained(adapter)
