"""Small models with random numbers, and the stored layouts written down a second time."""

from typing import Any

import numpy as np
import paddle

from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.weights.layout import Layout

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "untied": {"tie_word_embeddings": False, "head_dim": 12},
    "no-shared": {"moe_num_shared_experts": 0, "moe_layer_interval": 2, "rope_theta": 1e4},
    "bias": {"use_bias": True},
    "dense": {"moe_num_experts": 0},
    "dense-bias": {"moe_num_experts": 0, "use_bias": True, "tie_word_embeddings": False},
    "no-moe-layer": {"moe_layer_start_index": 3},
}


def make_config(**keys: Any) -> Ernie4_5_MoeConfig:
    return Ernie4_5_MoeConfig(**{**SMALL, **keys})


def make_model(**keys: Any) -> Ernie4_5_MoeForCausalLM:
    """A model in which every number, biases and norms included, is random."""
    model = Ernie4_5_MoeForCausalLM(make_config(**keys))
    fill(model)
    return model


def fill(model: Ernie4_5_MoeForCausalLM, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        scale, base = (0.02, 0.0) if name.endswith("correction_bias") else (0.15, 0.0)
        values = random.normal(1.0 if "norm" in name else base, scale, tensor.shape)
        tensor.set_value(values.astype(np.float32))


def state(model: Ernie4_5_MoeForCausalLM) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def stored_by_hand(config: Ernie4_5_MoeConfig, arrays: dict[str, np.ndarray], layout: Layout
                   ) -> dict[str, np.ndarray]:  # fmt: skip
    """The tensors of a layout, written down independently of `hf_layout`."""
    out: dict[str, np.ndarray] = {}
    for name, a in arrays.items():
        parts = name.split(".")
        if name.endswith((".experts.gate_proj", ".experts.up_proj", ".experts.down_proj")):
            for e in range(a.shape[0]):
                out[f"{'.'.join(parts[:-1])}.{e}.{parts[-1]}.weight"] = a[e].T
        elif parts[-1] == "weight" and (parts[-2].endswith("_proj") or parts[-2] == "gate"):
            out[name] = a.T
        else:
            out[name] = a
    if layout == "hf":
        return out
    if layout == "fused":
        for i in filter(config.is_moe_layer, range(config.num_hidden_layers)):
            experts = f"model.layers.{i}.mlp.experts"
            take = [
                [out.pop(f"{experts}.{e}.{p}_proj.weight") for e in range(config.moe_num_experts)]
                for p in ("gate", "up", "down")
            ]
            out[f"{experts}.gate_up_proj"] = np.concatenate([take[0], take[1]], axis=1)
            out[f"{experts}.down_proj"] = np.stack(take[2])
            bias = out.pop(f"model.layers.{i}.mlp.moe_statics.e_score_correction_bias")
            out[f"model.layers.{i}.mlp.gate.moe_statics.e_score_correction_bias"] = bias
        return out
    baidu: dict[str, np.ndarray] = {}
    fused = {"q_proj": ["q_proj", "k_proj", "v_proj"], "gate_proj": ["gate_proj", "up_proj"]}
    for name, a in out.items():
        parts = name.split(".")
        new = "ernie." + name.removeprefix("model.") if name.startswith("model.") else name
        if len(parts) > 1 and parts[-2] in fused:
            others = [name.replace(parts[-2], part) for part in fused[parts[-2]]]
            whole = np.concatenate([out[other] for other in others], axis=0)
            fused_name = "qkv_proj" if parts[-2] == "q_proj" else "up_gate_proj"
            baidu[new.replace(parts[-2], fused_name)] = whole.T
        elif len(parts) > 1 and parts[-2] in ("k_proj", "v_proj", "up_proj"):
            continue
        else:
            linear = "_proj.weight" in name or name.endswith("mlp.gate.weight")
            baidu[new] = a.T if linear or name == "lm_head.weight" else a
    return baidu


def round_bfloat16(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rounded = {}
    for name, array in arrays.items():
        keep = name.endswith((".mlp.gate.weight", "e_score_correction_bias"))
        bfloat = paddle.to_tensor(array).astype("bfloat16").astype("float32").numpy()
        rounded[name] = array if keep else bfloat
    return rounded
