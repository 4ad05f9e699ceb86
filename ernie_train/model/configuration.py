"""The configuration of ERNIE 4.5 models, MoE and dense, in Hugging Face's keys.

Everything that changes the computed function is a field of `Ernie4_5_MoeConfig`. A key of a
foreign `config.json` that would change the function and that this model does not compute is refused
by name; other keys (library versions, caching, parallel layout) are carried through.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PrivateAttr

from ernie_train.core.config import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    StrictConfig,
    list_problems,
)
from ernie_train.core.errors import ConfigError, did_you_mean
from ernie_train.core.foreign_files import read_json
from ernie_train.model.foreign_keys import NOT_CARRIED, foreign_problems, unknown_keys

MOE_MODEL_TYPE = "ernie4_5_moe"
DENSE_MODEL_TYPE = "ernie4_5"
ARCHITECTURES = {MOE_MODEL_TYPE: "Ernie4_5_MoeForCausalLM", DENSE_MODEL_TYPE: "Ernie4_5ForCausalLM"}
TORCH_DTYPES = ("float32", "bfloat16", "float16")

# The keys that decide which parameters there are, and which of them a token uses.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "use_bias", "moe_intermediate_size",
    "moe_num_experts", "moe_k", "moe_num_shared_experts", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval",
)  # fmt: skip

# Far beyond any model, and few enough for arithmetic over each of them.
_MOST = {
    "num_hidden_layers": 1024, "moe_num_experts": 2**14, "hidden_size": 2**20,
    "intermediate_size": 2**24, "moe_intermediate_size": 2**24, "vocab_size": 2**28,
    "moe_num_shared_experts": 2**10, "num_attention_heads": 2**14, "head_dim": 2**14,
    "max_position_embeddings": 2**31,
}  # fmt: skip

# Other names in Hugging Face's attribute map. Not pydantic's AliasChoices: a preset and its
# overrides are merged before they are validated, so both must have the same name by then.
ALIASES = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}

# `transformers` gives a dense model other defaults than an MoE one.
_DENSE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
    "moe_num_experts": 0,
}  # fmt: skip

# The small ones are trained from scratch in minutes: about 1 / sqrt(hidden_size) as the initial
# standard deviation, and more in the embedding, gets them going several times sooner than 0.02.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "rope_theta": 10000.0,
        "initializer_range": 0.07, "embedding_initializer_range": 0.2,
        "moe_intermediate_size": 96, "moe_num_experts": 16, "moe_k": 2,
        "moe_num_shared_experts": 1,
    },
    "mini": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "initializer_range": 0.06, "embedding_initializer_range": 0.2,
        "moe_intermediate_size": 176, "moe_num_experts": 16, "moe_k": 4,
        "moe_num_shared_experts": 2,
    },
    "0.3b": {**_DENSE_DEFAULTS},
    "21b-a3b": {"head_dim": 128},
}  # fmt: skip


TokenId = NonNegativeInt


class Ernie4_5_MoeConfig(StrictConfig):
    """The sizes and constants of one model, by Hugging Face's keys; defaults are those of 21B-A3B.

    `moe_num_experts=0` is a dense model (`model_type` "ernie4_5"), whose other `moe_` keys keep
    their defaults. `head_dim=None` means `hidden_size / num_attention_heads`,
    `num_key_value_heads=None` as many as query heads and `moe_layer_end_index=-1` the last layer;
    all three are resolved on construction.
    Two keys are this toolkit's own: `moe_capacity_factor`, a limit on an expert's rows in training
    alone, None routes every token (dropless); `embedding_initializer_range`, None initializes the
    embedding by `initializer_range`.

    Raises `ConfigError` that lists every impossible value.
    """

    vocab_size: PositiveInt = 103424
    hidden_size: PositiveInt = 2560
    intermediate_size: PositiveInt = 12288
    num_hidden_layers: PositiveInt = 28
    num_attention_heads: PositiveInt = 20
    num_key_value_heads: PositiveInt = 4
    head_dim: PositiveInt | None = None
    hidden_act: Literal["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu"] = "silu"
    max_position_embeddings: PositiveInt = 131072
    rope_theta: Positive = 500000.0
    rms_norm_eps: Positive = 1e-5
    initializer_range: Positive = 0.02
    embedding_initializer_range: Positive | None = None
    tie_word_embeddings: bool = True
    use_bias: bool = False
    pad_token_id: TokenId | None = 0
    bos_token_id: TokenId | None = 1
    eos_token_id: TokenId | Annotated[list[TokenId], Field(min_length=1)] | None = 2
    moe_intermediate_size: PositiveInt = 1536
    moe_num_experts: NonNegativeInt = 64
    moe_k: PositiveInt = 6
    moe_num_shared_experts: NonNegativeInt = 2
    moe_layer_start_index: NonNegativeInt = 1
    moe_layer_end_index: Annotated[int, Field(ge=-1)] = -1
    moe_layer_interval: PositiveInt = 1
    moe_norm_min: NonNegative = 1e-12
    moe_capacity_factor: Positive | None = None
    # Keys of the config.json that was read which change nothing here; written again as they were.
    _carried: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(self, **keys: Any) -> None:
        if keys.get("moe_num_experts") == 0:
            dense = (key for key in keys if not key.startswith("moe_") or key == "moe_num_experts")
            keys = {key: keys[key] for key in dense}
        if "num_key_value_heads" in keys and keys["num_key_value_heads"] is None:
            heads = type(self).model_fields["num_attention_heads"].default
            keys["num_key_value_heads"] = keys.get("num_attention_heads", heads)
        try:
            super().__init__(**keys)
        except pydantic.ValidationError as error:
            problems = list_problems(type(self), keys, error.errors(include_url=False))
            raise ConfigError(problems, source="model") from None
        if problems := self._misfits():
            raise ConfigError(problems, source="model")
        resolved = vars(self)  # the attributes of a frozen model
        if self.head_dim is None:
            resolved["head_dim"] = self.hidden_size // self.num_attention_heads
        if self.moe_layer_end_index == -1:
            resolved["moe_layer_end_index"] = self.num_hidden_layers - 1

    def __eq__(self, other: object) -> bool:
        """Compare the fields; carried keys change nothing."""
        return isinstance(other, Ernie4_5_MoeConfig) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def _misfits(self) -> list[str]:
        """Return what is wrong with values that are possible each by itself."""
        problems = [
            f"{name}={getattr(self, name)} is no size of a model: at most {most}"
            for name, most in _MOST.items()
            if (getattr(self, name) or 0) > most
        ]
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            problems.append(
                f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % heads:
            problems.append(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}; "
                "set head_dim"
            )
        elif (width := self.head_dim or self.hidden_size // heads) % 2:
            problems.append(f"head_dim={width} must be even: RoPE rotates pairs of numbers")
        if self.moe_k > self.moe_num_experts > 0:
            problems.append(
                f"moe_k={self.moe_k} must not exceed moe_num_experts={self.moe_num_experts}"
            )
        eos = self.eos_token_id
        ids = {"pad_token_id": self.pad_token_id, "bos_token_id": self.bos_token_id}
        ids["eos_token_id"] = max(eos) if isinstance(eos, list) else eos
        return problems + [
            f"{name}={value} must be below vocab_size={self.vocab_size}"
            for name, value in ids.items()
            if value is not None and value >= self.vocab_size
        ]

    # ---- reading -------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Ernie4_5_MoeConfig:
        """Return a size of `PRESETS`; `ConfigError` on an unknown name or key of `overrides`."""
        if name not in PRESETS:
            hint = did_you_mean(name, PRESETS)
            raise ConfigError(f"unknown preset {name!r}{hint}", source="model")
        return cls(**{**PRESETS[name], **_checked_overrides(overrides)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> Ernie4_5_MoeConfig:
        """Read the keys of a Hugging Face `config.json`; `source` names it in errors.

        Both spellings of the RoPE base are read. Keys that change nothing here are carried through
        to the next `to_dict`.
        Raises `ConfigError` for keys that would change the model and are not implemented.
        """
        values = {ALIASES.get(key, key): value for key, value in data.items()}
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        problems = foreign_problems(values, defaults)
        model_type = values.get("model_type", MOE_MODEL_TYPE)
        if model_type not in list(ARCHITECTURES):  # it may be a list, which no dict takes
            problems.append(f"model_type {model_type!r} is none of {', '.join(ARCHITECTURES)}")
        problems += _merge_rope(values)
        if problems:
            raise ConfigError(problems, source=source)
        known = {k: v for k, v in values.items() if k in cls.model_fields}
        if model_type == DENSE_MODEL_TYPE:
            known = {**_DENSE_DEFAULTS, **known, "moe_num_experts": 0}
        try:
            config = cls(**known)
        except ConfigError as error:
            raise ConfigError(error.problems, source=source) from None
        own = {*cls.model_fields, *NOT_CARRIED}
        config._carried = {key: value for key, value in values.items() if key not in own}
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Ernie4_5_MoeConfig:
        """Read `config.json` in the directory `path`; `ConfigError` if missing or not JSON."""
        file = Path(path) / "config.json"
        return cls.from_dict(read_config_json(file), source=str(file))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Ernie4_5_MoeConfig:
        """Return a copy with some keys changed; `ConfigError` on an unknown or impossible one."""
        changed = type(self)(**{**dict(self), **_checked_overrides(overrides)})
        changed._carried = self._carried
        return changed

    def differing_sizes(self, other: Ernie4_5_MoeConfig) -> dict[str, Any]:
        """Return the values in `other` of those sizes that differ from this model's."""
        return {
            name: getattr(other, name)
            for name in _SIZES
            if getattr(other, name) != getattr(self, name)
        }

    # ---- what follows from the fields ----------------------------------------------------------

    @property
    def carried_keys(self) -> Mapping[str, Any]:
        """Return the keys of the config.json that was read which mean nothing here."""
        return self._carried

    @property
    def unknown_keys(self) -> list[str]:
        """Return the carried keys of which it is not known that they mean nothing here."""
        return unknown_keys(self._carried)

    @property
    def model_type(self) -> str:
        return MOE_MODEL_TYPE if self.moe_num_experts else DENSE_MODEL_TYPE

    @property
    def rope_parameters(self) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    @property
    def attention_head_dim(self) -> int:
        """Return `head_dim`, the width of one attention head, which is never None here."""
        if self.head_dim is None:
            raise ConfigError("head_dim is not resolved", source="model")
        return self.head_dim

    @property
    def lm_head_has_bias(self) -> bool:
        """As in `transformers`: under `use_bias` an MoE output layer has one, a dense one never."""
        return self.use_bias and self.moe_num_experts > 0

    def is_moe_layer(self, index: int) -> bool:
        """Return whether layer `index` (from 0) is MoE, by the rule of `transformers`."""
        return (
            self.moe_num_experts > 0
            and (index + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= index <= self.moe_layer_end_index
        )

    def num_parameters(self) -> tuple[int, int]:
        """Return (total, active per token) parameters with embeddings, by arithmetic alone."""
        hidden, bias = self.hidden_size, int(self.use_bias)
        q_width = self.num_attention_heads * self.attention_head_dim
        kv_width = self.num_key_value_heads * self.attention_head_dim
        attention = 2 * hidden * q_width + 2 * hidden * kv_width
        attention += bias * (q_width + 2 * kv_width + hidden)
        norms = 2 * hidden

        def mlp(width: int) -> int:
            return 3 * hidden * width + bias * (2 * width + hidden) if width else 0

        expert = 3 * hidden * self.moe_intermediate_size  # routed experts have no biases
        always = hidden * self.moe_num_experts  # the router
        always += mlp(self.moe_num_shared_experts * self.moe_intermediate_size)
        total = active = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2) + hidden
        if self.lm_head_has_bias:
            total, active = total + self.vocab_size, active + self.vocab_size
        for index in range(self.num_hidden_layers):
            if self.is_moe_layer(index):
                total += attention + norms + always + expert * self.moe_num_experts
                active += attention + norms + always + expert * self.moe_k
            else:
                total += attention + norms + mlp(self.intermediate_size)
                active += attention + norms + mlp(self.intermediate_size)
        return total, active

    # ---- writing -------------------------------------------------------------------------------

    def to_dict(self, torch_dtype: str = "float32") -> dict[str, Any]:
        """Return the content of `config.json` for weights that are stored as `torch_dtype`.

        RoPE's base is written twice: `transformers` 4.x reads `rope_theta`, 5.x `rope_parameters`.
        The dtype is written once, as `torch_dtype`: some loaders take a key `dtype` as the mark of
        Paddle's own weight layout.
        """
        if torch_dtype not in TORCH_DTYPES:
            expected = ", ".join(TORCH_DTYPES)
            raise ConfigError(f"torch_dtype must be one of {expected}: {torch_dtype!r}")
        values = self.model_dump()
        for own in ("moe_capacity_factor", "embedding_initializer_range"):
            if values[own] is None:
                del values[own]
        if not self.moe_num_experts:
            values = {k: v for k, v in values.items() if not k.startswith("moe_")}
        return {
            **self._carried,
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "torch_dtype": torch_dtype,
            **values,
            "rope_parameters": self.rope_parameters,
            "use_cache": True,
        }


def read_config_json(file: Path) -> dict[str, Any]:
    """Return the object in `file`; `ConfigError` if it is missing or is not a JSON object."""
    try:
        return read_json(file)
    except FileNotFoundError:
        hint = "a model directory has a config.json beside its weights"
        raise ConfigError(f"no such file; {hint}", source=str(file)) from None
    except ValueError as error:
        raise ConfigError(str(error), source=str(file)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", source=str(file)) from None


def _checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    values = {ALIASES.get(key, key): value for key, value in overrides.items()}
    problems = _merge_rope(values)
    values.pop("rope_parameters", None)
    values.pop("rope_scaling", None)
    known = Ernie4_5_MoeConfig.model_fields
    problems += [
        f"{key}: unknown key{did_you_mean(key, known)}" for key in values if key not in known
    ]
    if problems:
        raise ConfigError(problems, source="model")
    return values


def _merge_rope(values: dict[str, Any]) -> list[str]:
    """Move the RoPE base of `rope_parameters`/`rope_scaling` to `rope_theta`; return problems."""
    problems = []
    bases = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = values.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, Mapping):
            problems.append(f"{key} must be a mapping or null: {parameters!r}")
            continue
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            problems.append(f"{key}: RoPE type {kind!r} is not implemented, only 'default'")
        if parameters.get("partial_rotary_factor") not in (None, 1):
            problems.append(f"{key}: partial_rotary_factor is not implemented")
        if parameters.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = parameters["rope_theta"]
    if any(base != other for base, other in pairwise(bases.values())):
        listed = ", ".join(f"{key} = {value}" for key, value in bases.items())
        problems.append(f"conflicting RoPE bases: {listed}; make them equal")
    elif bases:
        values["rope_theta"] = next(iter(bases.values()))
    elif "rope_theta" in values:
        del values["rope_theta"]  # null: the default
    return problems
