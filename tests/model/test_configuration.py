"""The configuration: HF keys, presets, refusals, and parameter counts."""

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest

from ernie_train.core.errors import ConfigError
from ernie_train.model.configuration import PRESETS, Ernie4_5_MoeConfig


def problems(**keys: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Ernie4_5_MoeConfig(**keys)
    return caught.value.problems


def test_published_sizes() -> None:
    total, active = Ernie4_5_MoeConfig.preset("21b-a3b").num_parameters()
    assert total / 1e9 == pytest.approx(21.825, abs=5e-4)
    assert active / 1e9 == pytest.approx(3.35, abs=5e-3)
    total, active = Ernie4_5_MoeConfig.preset("0.3b").num_parameters()
    assert total == active
    assert total / 1e9 == pytest.approx(0.361, abs=5e-4)


def test_preset_sizes() -> None:
    assert 2e6 < Ernie4_5_MoeConfig.preset("tiny").num_parameters()[0] < 4e6
    assert 18e6 < Ernie4_5_MoeConfig.preset("mini").num_parameters()[0] < 22e6
    assert Ernie4_5_MoeConfig.preset("0.3b").model_type == "ernie4_5"
    assert Ernie4_5_MoeConfig.preset("tiny").moe_num_experts >= 8


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_presets(name: str) -> None:
    config = Ernie4_5_MoeConfig.preset(name)
    assert Ernie4_5_MoeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_key_survives_config_json(tmp_path: Path) -> None:
    config = Ernie4_5_MoeConfig.preset(
        "tiny", use_bias=True, tie_word_embeddings=False, rope_theta=160000, head_dim=48,
        hidden_act="gelu", rms_norm_eps=1e-6, initializer_range=0.01, eos_token_id=[2, 9],
        pad_token_id=None, moe_num_shared_experts=0, moe_layer_start_index=0,
        moe_layer_end_index=2, moe_layer_interval=2, moe_norm_min=1e-9, moe_capacity_factor=1.25,
        embedding_initializer_range=0.3,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict("bfloat16")))
    assert Ernie4_5_MoeConfig.from_pretrained(tmp_path) == config


def test_what_config_json_says() -> None:
    written = Ernie4_5_MoeConfig.preset("tiny", rope_theta=160000).to_dict("bfloat16")
    # transformers 4.x reads the first, 5.x the second of these two.
    assert written["rope_theta"] == 160000
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 160000}
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written
    assert written["tie_word_embeddings"] is True
    assert written["moe_layer_end_index"] == 3
    assert written["architectures"] == ["Ernie4_5_MoeForCausalLM"]
    assert "moe_capacity_factor" not in written
    dense = Ernie4_5_MoeConfig.preset("0.3b").to_dict()
    assert (dense["model_type"], dense["architectures"]) == ("ernie4_5", ["Ernie4_5ForCausalLM"])
    assert not [key for key in dense if key.startswith("moe")]


def test_defaults_differ_between_dense_and_moe() -> None:
    dense = Ernie4_5_MoeConfig.from_dict({"model_type": "ernie4_5"})
    assert (dense.hidden_size, dense.head_dim, dense.moe_num_experts) == (1024, 128, 0)
    moe = Ernie4_5_MoeConfig.from_dict({"model_type": "ernie4_5_moe"})
    assert (moe.hidden_size, moe.head_dim, moe.moe_layer_end_index) == (2560, 128, 27)
    assert moe == Ernie4_5_MoeConfig.preset("21b-a3b")


def test_other_names_of_keys() -> None:
    config = Ernie4_5_MoeConfig.from_dict({"num_experts": 32, "num_experts_per_tok": 4})
    assert (config.moe_num_experts, config.moe_k) == (32, 4)


@pytest.mark.parametrize(
    ("interval", "start", "end", "expected"),
    [
        (1, 1, -1, [1, 2, 3, 4, 5]),
        (2, 0, -1, [1, 3, 5]),
        (2, 2, 4, [3]),
        (3, 0, 5, [2, 5]),
        (1, 6, -1, []),
    ],
)
def test_moe_layers(interval: int, start: int, end: int, expected: list[int]) -> None:
    config = Ernie4_5_MoeConfig.preset(
        "tiny", num_hidden_layers=6, moe_layer_interval=interval,
        moe_layer_start_index=start, moe_layer_end_index=end,
    )  # fmt: skip
    assert [i for i in range(6) if config.is_moe_layer(i)] == expected
    assert config.model_type == "ernie4_5_moe"


# ---- refusals ----------------------------------------------------------------------------------


def test_all_problems_at_once() -> None:
    found = problems(hidden_size=-4, vocab_size=True, rope_theta="fast", hidden_act="tanh")
    assert len(found) == 4
    for key in ("hidden_size", "vocab_size", "rope_theta", "hidden_act"):
        assert any(key in line for line in found)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"num_attention_heads": 20, "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 31}, "head_dim=31"),
        ({"hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3}, "head_dim"),
        ({"moe_k": 65}, "moe_k=65"),
        ({"moe_k": 0}, "moe_k"),
        ({"moe_layer_interval": 0}, "moe_layer_interval"),
        ({"moe_layer_end_index": -2}, "moe_layer_end_index"),
        ({"moe_capacity_factor": 0}, "moe_capacity_factor"),
        ({"embedding_initializer_range": -1}, "embedding_initializer_range"),
        ({"moe_num_experts": -1}, "moe_num_experts"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": [2, 200000]}, "eos_token_id=200000"),
        ({"pad_token_id": 103424}, "pad_token_id=103424"),
        ({"use_bias": 1}, "use_bias"),
    ],
)
def test_impossible_value_is_named(keys: dict[str, Any], named: str) -> None:
    found = problems(**keys)
    assert len(found) == 1
    assert named in found[0]


def test_keys_without_meaning_for_a_dense_model_are_not_judged() -> None:
    config = Ernie4_5_MoeConfig(moe_num_experts=0, moe_k=9)
    assert not config.is_moe_layer(1)


def test_unknown_override_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"num_hiden_layers.*did you mean 'num_hidden_layers'"):
        Ernie4_5_MoeConfig.preset("tiny", num_hiden_layers=2)
    with pytest.raises(ConfigError, match="did you mean 'vocab_size'"):
        Ernie4_5_MoeConfig.preset("tiny").with_overrides({"vocabsize": 2})
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        Ernie4_5_MoeConfig.preset("minni")


def test_overrides_are_checked_like_the_rest() -> None:
    tiny = Ernie4_5_MoeConfig.preset("tiny")
    assert tiny.with_overrides({"rope_theta": 160000}).rope_theta == 160000
    assert tiny.with_overrides({"rope_parameters": {"rope_theta": 2e4}}).rope_theta == 2e4
    with pytest.raises(ConfigError, match="moe_k=99"):
        tiny.with_overrides({"moe_k": 99})


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "llama3"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": [1]}, "mapping"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "conflicting"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"compression_ratio": 2.0}, "compress"),
        ({"sliding_window": 4096}, "sliding"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: sliding_attention",
        ),
        ({"is_quantized": True}, "quantized"),
        ({"routed_scaling_factor": 2.5}, "scaled"),
        ({"norm_topk_prob": False}, "normalized"),
        ({"n_group": 8, "topk_group": 4}, "groups"),
        ({"rope_3d": True}, "three-dimensional"),
        ({"final_logit_softcapping": 30.0}, "soft-capping"),
        ({"attention_bias": True}, "use_bias"),
        ({"first_k_dense_replace": 3}, "moe_layer_start_index"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vision_config": {}}, "text"),
        ({"moe_gate_act": "sigmoid"}, "softmax"),
        ({"model_type": "llama"}, "llama"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"moe_num_experts": [64, 64]}, "moe_num_experts"),
    ],
)
def test_what_is_not_computed_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Ernie4_5_MoeConfig.from_dict({"model_type": "ernie4_5_moe", **keys}, source="x/config.json")
    assert "x/config.json" in str(caught.value)


def test_harmless_foreign_keys_are_tolerated() -> None:
    config = Ernie4_5_MoeConfig.from_dict(
        {
            "architectures": ["Ernie4_5_MoeForCausalLM"], "transformers_version": "4.57.6",
            "torch_dtype": "bfloat16", "compression_ratio": 1.0, "rope_scaling": None,
            "rope_theta": 500000, "attention_dropout": 0.0, "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "use_cache": True, "moe_capacity": [6, 6, 6], "moe_gate": "topk",
        }
    )  # fmt: skip
    assert config == Ernie4_5_MoeConfig()
    assert config.carried_keys.keys() >= {"moe_capacity", "moe_gate", "compression_ratio"}
    written = config.with_overrides({"rope_theta": 1e6}).to_dict()
    assert (written["moe_capacity"], written["moe_gate"]) == ([6, 6, 6], "topk")
    assert "transformers_version" not in written


RELEASED: dict[str, dict[str, Any]] = {
    "21B-A3B": {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072,
        "num_attention_heads": 20, "num_key_value_heads": 4, "num_hidden_layers": 28,
        "rms_norm_eps": 1e-05, "rope_theta": 500000, "rope_scaling": None, "vocab_size": 103424,
        "tie_word_embeddings": True, "use_bias": False, "use_cache": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.54.0",
        "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536, "moe_capacity": [64, 64, 64], "moe_layer_start_index": 1,
        "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
        "moe_gate": "topk", "moe_use_aux_free": True, "moe_aux_loss_lambda": 1e-2,
        "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
        "num_nextn_predict_layers": 1, "multi_token_pred_lambda": 0.3, "compression_ratio": 1.0,
        "output_router_logits": False, "router_aux_loss_coef": 0.001, "use_rmsnorm": True,
        "fuse_rope": False, "use_flash_attention": True, "rope_3d": False,
        "auto_map": {"AutoConfig": "configuration_ernie4_5_moe.Ernie4_5_MoeConfig"},
    },
    "0.3B": {
        "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 131072,
        "num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 18,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "rope_scaling": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_bias": False,
        "use_cache": False, "vocab_size": 103424, "transformers_version": "4.54.0",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_keys_of_released_models_all_load(name: str) -> None:
    config = Ernie4_5_MoeConfig.from_dict(RELEASED[name])
    assert config.unknown_keys == []
    assert config == Ernie4_5_MoeConfig.preset({"21B-A3B": "21b-a3b"}.get(name, "0.3b"))
    written = config.to_dict("bfloat16")
    new = {"architectures", "transformers_version", "auto_map", "use_cache", "rope_scaling"}
    for key, value in RELEASED[name].items():
        assert key in new or written[key] == value, key
    assert "auto_map" not in written  # it names files that an export does not have


def test_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        Ernie4_5_MoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(ConfigError, match="not JSON"):
        Ernie4_5_MoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        Ernie4_5_MoeConfig.from_pretrained(tmp_path)


def test_a_message_names_the_key_what_it_must_be_and_what_it_is() -> None:
    assert problems(hidden_size=-4, rope_theta="fast", hidden_act="gleu", moe_kk=1) == [
        "hidden_size: must be >= 1, got the number -4",
        "hidden_act: must be 'silu', 'swish', 'gelu', 'gelu_pytorch_tanh' or 'relu', "
        "got the text 'gleu'; did you mean 'gelu'?",
        "rope_theta: must be a number, got the text 'fast'",
        "moe_kk: unknown key; did you mean 'moe_k'?",
    ]
    assert problems(moe_num_experts=False) == [
        "moe_num_experts: must be a whole number, got the boolean false"
    ]
    assert len(problems(moe_k=65, head_dim=31, pad_token_id=103424)) == 3


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Ernie4_5_MoeConfig().moe_k = 2


@pytest.mark.parametrize("size", [2**31, 10**9, 10**30])
@pytest.mark.parametrize("name", ["num_hidden_layers", "moe_num_experts", "hidden_size"])
def test_sizes_beyond_any_model_are_refused_at_once(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}={size} is no size of a model"):
        Ernie4_5_MoeConfig.preset("tiny", **{name: size})
