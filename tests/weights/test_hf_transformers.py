"""Directories that transformers writes and reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.io.safetensors import TensorFiles
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.saving import save_pretrained
from tests.conftest import Referee
from tests.small_models import (
    VARIANTS,
    assert_same,
    make_model,
    state,
)

# ---- transformers ------------------------------------------------------------------------------

IDS = np.random.default_rng(3).integers(3, 96, (2, 17))


@pytest.mark.parametrize(
    ("transformers", "options"),
    [
        ("newest", [{"max_shard_size": "20KB"}, {"save_original_format": False}]),
        ("4.57", [{"max_shard_size": "20KB"}]),
    ],
    ids=["newest", "4.57"],
)
def test_transformers_reads_ours_and_we_read_theirs(
    transformers: str, options: list[dict[str, Any]], referee: Referee, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    (tmp_path / "options.json").write_text(json.dumps(options))
    models: dict[str, Ernie4_5_MoeForCausalLM] = {}
    for name, keys in VARIANTS.items():
        # 4.57 gives routed experts biases, newer versions do not: we follow these. And it cannot
        # build an MoE model without an MoE layer.
        if transformers == "4.57" and name in ("bias", "no-moe-layer"):
            continue
        models[name] = make_model(**keys)
        save_pretrained(models[name], tmp_path / name / "ours", max_shard_size="20KB")
    save_pretrained(models["moe"], tmp_path / "bfloat16" / "ours", dtype="bfloat16")
    models["bfloat16"] = load_pretrained(tmp_path / "bfloat16" / "ours")
    folders = [tmp_path / name for name in models]
    referee(
        "hf_roundtrip.py", tmp_path / "ids.npy", tmp_path / "options.json", *folders,
        transformers=transformers,
    )  # fmt: skip
    for name, model in models.items():
        info = json.loads((tmp_path / name / "info.json").read_text())
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert info[kind] == [], (name, kind)
        dense = model.config.moe_num_experts == 0
        assert info["class"] == ("Ernie4_5ForCausalLM" if dense else "Ernie4_5_MoeForCausalLM")
        assert info["eos_token_id"] == 2
        assert info["parameters"] == model.config.num_parameters()[0]
        assert ("torch.bfloat16" in info["dtypes"]) == (name == "bfloat16")
        expected = np.load(tmp_path / name / "logits.npy")
        ours = model(paddle.to_tensor(IDS)).logits.numpy()
        # fp32 sums in another order, over logits of size 1 to 10.
        np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0, err_msg=name)
        for number in range(len(options)):
            theirs = load_pretrained(tmp_path / name / f"theirs-{number}")
            assert_same(state(theirs), state(model))
    if transformers == "newest":  # the second way of saving stacks the experts
        names = TensorFiles(tmp_path / "moe" / "theirs-1")
        assert "model.layers.1.mlp.experts.gate_up_proj" in names
