"""Describe an adapter to PEFT: its adapter_config.json."""

from __future__ import annotations

from typing import Any

from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.model.lora import LoraConfig
from ernie_train.weights.layout import TensorMapping, tensor_mappings


def describe_adapter(
    config: Ernie4_5_MoeConfig, lora: LoraConfig, adapted: tuple[str, ...], base: str
) -> dict[str, Any]:
    """Return PEFT's adapter_config.json, which peft 0.21 reads on transformers 4.57 and 5.

    transformers 5 fuses the experts of a layer, and peft then takes every target called gate_proj,
    up_proj or down_proj for the experts': dense and shared MLPs of an MoE model are named by their
    parameter instead. It also doubles the rank of the fused experts, which rslora's root does not
    allow, and refuses dropout there.
    """
    listed = set(adapted)
    modules = [m.stored.removesuffix(".weight") for m in _mappings_of(config, listed)]
    is_moe = any(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    by_parameter = [m for m in modules if is_moe and ".mlp." in m and ".mlp.experts." not in m]
    others = [m for m in _mappings_of(config, None) if m.parameter not in listed]
    taken = {m.stored.removesuffix(".weight") for m in others} | set(by_parameter)
    with_experts = any(".mlp.experts." in name for name in adapted)
    rslora = lora.rslora and not with_experts
    alpha = lora.alpha_value if rslora else lora.scale * lora.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0 if with_experts or by_parameter else lora.dropout,
        "target_modules": _shortened([m for m in modules if m not in by_parameter], taken),
        "target_parameters": [f"{module}.weight" for module in by_parameter] or None,
        "use_rslora": rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _mappings_of(config: Ernie4_5_MoeConfig, wanted: set[str] | None) -> list[TensorMapping]:
    found = tensor_mappings(config)
    return [m for m in found if wanted is None or m.parameter in wanted]


def _shortened(modules: list[str], others: set[str]) -> list[str]:
    """Return the shortest ends of the modules' names that no other module's name has."""
    result: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        ends = (".".join(parts[at:]) for at in reversed(range(len(parts))))
        short = next(
            end for end in ends
            if not end.split(".")[0].isdigit() and not any(_ends_with(o, end) for o in others)
        )  # fmt: skip
        result[short] = None
    return list(result)


def _ends_with(module: str, end: str) -> bool:
    return module == end or module.endswith(f".{end}")
