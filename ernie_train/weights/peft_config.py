"""PEFT's adapter_config.json: describe an adapter in it, and read one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.core.errors import WeightsError
from ernie_train.core.foreign_files import read_json
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.model.lora import LoraConfig
from ernie_train.weights.layout import TensorMapping, tensor_mappings

ADAPTER_CONFIG = "adapter_config.json"
_MOST_ALPHA = 2**60  # far beyond any; also no NaN is below it
# Keys that change what an adapter computes, with the only value that is read here.
_PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {}, "lora_bias": False, "layer_replication": None, "use_qalora": False,
    "use_bdlora": None, "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None,
    "monteclora_config": None,
}  # fmt: skip


@dataclass(frozen=True)
class AdapterSettings:
    """Say how an adapter computes: a pair adds scale * B A; with `dora` magnitudes lie beside."""

    rank: int
    scale: float
    dora: bool


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; `WeightsError` if it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from None


def read_settings(path: Path) -> AdapterSettings:
    """Return the settings of an adapter; `WeightsError` for some that are not computed here."""
    settings = read_json_object(path)
    odd = [
        f"{key}: {settings[key]}"
        for key, plain in _PLAIN.items()
        if settings.get(key) not in (None, plain)
    ]
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        odd.append(f"init_lora_weights: {start}, which changes the base")
    switches = {key: settings.get(key) or False for key in ("use_rslora", "use_dora")}
    odd += [f"{key}: {value!r}" for key, value in switches.items() if type(value) is not bool]
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if odd:
        raise WeightsError(f"{path}: cannot be read here: {', '.join(odd)}")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if type(rank) is not int or rank < 1 or not is_number or not abs(alpha) < _MOST_ALPHA:
        raise WeightsError(f"{path}: r and lora_alpha must be numbers, r at least 1")
    root = math.sqrt(rank) if switches["use_rslora"] else rank
    return AdapterSettings(rank, alpha / root, switches["use_dora"])


def describe_adapter(
    config: Ernie4_5_MoeConfig, lora: LoraConfig, adapted: tuple[str, ...], base: str
) -> dict[str, Any]:
    """Return PEFT's adapter_config.json, which peft 0.21 reads on transformers 4.57 and 5.

    transformers 5 fuses the experts of a layer, and peft then takes every target called gate_proj,
    up_proj or down_proj for the experts': dense and shared MLPs of an MoE model are named by their
    parameter instead. It also doubles the rank of the fused experts, which rslora's root does not
    allow, and refuses dropout there. DoRA it refuses there too, so those adapters of an MoE model
    that reach beyond attention are written as transformers 4.57 has the experts, one by one.
    """
    listed = set(adapted)
    modules = [m.stored.removesuffix(".weight") for m in _mappings_of(config, listed)]
    is_moe = any(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    fuses = is_moe and not lora.dora
    by_parameter = [m for m in modules if fuses and ".mlp." in m and ".mlp.experts." not in m]
    others = [m for m in _mappings_of(config, None) if m.parameter not in listed]
    taken = {m.stored.removesuffix(".weight") for m in others} | set(by_parameter)
    with_experts = fuses and any(".mlp.experts." in name for name in adapted)
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
        "use_dora": lora.dora,
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
            if not end.split(".")[0].isdigit()
            and not any(f".{other}".endswith(f".{end}") for other in others)
        )  # fmt: skip
        result[short] = None
    return list(result)
