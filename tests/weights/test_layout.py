"""Where each number lies on disk: every layout is read, one is written, moments go along."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ernie_train.core.errors import WeightsError
from ernie_train.io.safetensors import to_bfloat16
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.weights.hf import load_config, load_pretrained
from ernie_train.weights.layout import (
    LAYOUTS,
    Layout,
    detect_layout,
    from_hf,
    parameter_shapes,
    tensor_mappings,
    to_stored,
)
from ernie_train.weights.saving import save_pretrained
from tests.small_models import (
    VARIANTS,
    assert_same,
    make_config,
    make_model,
    round_bfloat16,
    state,
    stored_by_hand,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_each_layout(layout: Layout, variant: str, tmp_path: Path) -> None:
    model = make_model(**VARIANTS[variant])
    stored = stored_by_hand(model.config, state(model), layout)
    stored = {name: np.ascontiguousarray(array) for name, array in stored.items()}
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    config = model.config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(state(load_pretrained(tmp_path)), state(model))
    if layout == "paddle" or (layout == "hf" and model.config.moe_num_experts):
        assert detect_layout(stored) == layout


@pytest.mark.parametrize("variant", VARIANTS)
def test_writes_the_released_layout(variant: str, tmp_path: Path) -> None:
    model = make_model(**VARIANTS[variant])
    save_pretrained(model, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    stored = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= safetensors.numpy.load_file(file)
    assert_same(stored, stored_by_hand(model.config, state(model), "hf"))
    assert_same(state(load_pretrained(tmp_path / "out")), state(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_has_these_parameters(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == parameter_shapes(model.config)
    trained = sum(int(np.prod(p.shape)) for p in model.parameters())
    assert model.config.num_parameters()[0] == trained


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mappings_cover_every_number_once(layout: Layout) -> None:
    config = make_config(use_bias=True, tie_word_embeddings=False)
    count = {name: np.zeros(shape, int) for name, shape in parameter_shapes(config).items()}
    stored: dict[str, np.ndarray] = {}
    for mapping in tensor_mappings(config, layout):
        count[mapping.parameter][mapping.at] += 1
        stored.setdefault(mapping.stored, np.zeros(mapping.stored_shape, int))[
            mapping.stored_at
        ] += 1
    for name, array in [*count.items(), *stored.items()]:
        assert (array == 1).all(), name


def test_moments_go_to_disk_names_and_back() -> None:
    model = make_model()
    moments = {n: a for n, a in state(model).items() if "layers.1.mlp" in n or n.endswith("norm")}
    stored = dict(to_stored(tensor_mappings(model.config), moments))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored
    assert_same(dict(from_hf(model.config, stored)), moments)


def test_moments_of_another_model() -> None:
    config = make_config()
    with pytest.raises(WeightsError, match=r"not of this model \(1\): model.other.*wrong shape"):
        dict(
            to_stored(
                tensor_mappings(config),
                {"model.other": np.zeros(1), "model.norm.weight": np.zeros(3)},
            )
        )
    stored = dict(
        to_stored(
            tensor_mappings(config), {"model.layers.1.mlp.experts.gate_proj": np.zeros((4, 32, 16))}
        )
    )
    stored.pop("model.layers.1.mlp.experts.2.gate_proj.weight")
    with pytest.raises(WeightsError, match=r"missing \(1\): .*experts.2.gate_proj"):
        dict(from_hf(config, stored))


# ---- Baidu's layout in particular --------------------------------------------------------------


def write_baidu(directory: Path, model: Ernie4_5_MoeForCausalLM, **keys: Any) -> None:
    """A directory as Baidu publishes it: bfloat16 as uint16, `dtype`, no tie_word_embeddings."""
    stored = stored_by_hand(model.config, state(model), "paddle")
    fp32 = ("mlp.gate.weight", "e_score_correction_bias")
    stored = {
        n: np.ascontiguousarray(a) if n.endswith(fp32) else to_bfloat16(a)
        for n, a in stored.items()
    }
    safetensors.numpy.save_file(stored, directory / "model.safetensors")
    config = model.config.to_dict("bfloat16")
    config["dtype"] = config.pop("torch_dtype")
    del config["tie_word_embeddings"], config["rope_parameters"]
    (directory / "config.json").write_text(json.dumps({**config, **keys}))


def test_baidu_bfloat16_and_its_default_of_untied_embeddings(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=False)
    write_baidu(tmp_path, model, moe_use_aux_free=True)
    assert load_config(tmp_path).tie_word_embeddings is False
    assert_same(state(load_pretrained(tmp_path)), round_bfloat16(state(model)))


def test_baidu_model_trained_without_selection_bias(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=False)
    write_baidu(tmp_path, model)
    file = tmp_path / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    stored = {n: a for n, a in stored.items() if not n.endswith("correction_bias")}
    safetensors.numpy.save_file(stored, file)
    loaded = state(load_pretrained(tmp_path))
    assert (loaded["model.layers.1.mlp.moe_statics.e_score_correction_bias"] == 0).all()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "moe_use_aux_free": True}))
    with pytest.raises(WeightsError, match=r"missing \(2\).*correction_bias"):
        load_pretrained(tmp_path)
