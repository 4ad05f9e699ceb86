"""Map the parameters of a model in memory to the tensors of the three layouts found on disk.

In memory a Linear weight is [in, out] and the experts of a layer are stacked. The layouts on disk:

- "hf": one tensor per expert and projection, Linear weights [out, in] (the one that is written);
- "fused": the same, but with stacked experts, as newer `transformers` hold them in memory;
- "paddle": Baidu's own layout, prefix `ernie.`, fused `qkv_proj` and `up_gate_proj`, [in, out].

A `TensorMapping` maps a slice of a stored tensor to a slice of a parameter. Loading, saving and
the renaming of Adam moments all loop over the mappings of a layout.

Shapes in memory (H hidden size, E experts, I intermediate size of one expert):
`experts.gate_proj` and `experts.up_proj` [E, H, I], `experts.down_proj` [E, I, H],
router `gate.weight` [H, E], embedding [vocab, H].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ernie_train.core.errors import WeightsError
from ernie_train.model.configuration import Ernie4_5_MoeConfig

Layout = Literal["hf", "fused", "paddle"]
Index = tuple[int | slice, ...]
Shape = tuple[int, ...]
LAYOUTS: tuple[Layout, ...] = ("hf", "fused", "paddle")

EMBED_TOKENS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Newer `transformers` name the bias under the router; the released checkpoints use the older name.
_BIAS_NAME = ".mlp.moe_statics.e_score_correction_bias"
_BIAS_ALIAS = ".mlp.gate.moe_statics.e_score_correction_bias"


@dataclass(frozen=True)
class TensorMapping:
    """Map a slice of a stored tensor to a slice of a parameter.

    `parameter[at]` equals `stored[stored_at]`, with the last two axes swapped if `transpose`.
    An empty index means the whole array.
    """

    parameter: str
    shape: Shape  # of the whole parameter
    stored: str
    stored_shape: Shape  # of the whole stored tensor
    transpose: bool = False
    at: Index = ()
    stored_at: Index = ()

    @property
    def keep_float32(self) -> bool:
        """Return whether it is the router or its bias: float32 in a checkpoint of any dtype."""
        return self.parameter.endswith((".mlp.gate.weight", _BIAS_NAME))

    def to_stored(self, parameter: np.ndarray) -> np.ndarray:
        """Return the slice of `parameter` in the orientation of the stored tensor; a view."""
        part = parameter[self.at]
        return part.swapaxes(-1, -2) if self.transpose else part

    def copy_from_stored(self, parameter: np.ndarray, stored: np.ndarray) -> None:
        """Copy the slice of the `stored` tensor into `parameter`, in place."""
        part = stored[self.stored_at]
        parameter[self.at] = part.swapaxes(-1, -2) if self.transpose else part


def tensor_mappings(
    config: Ernie4_5_MoeConfig, layout: Layout = "hf", experts: range | None = None
) -> list[TensorMapping]:
    """Return all mappings of a model in a layout, by parameter, in the order of the layers.

    Args:
        config: the model's configuration.
        layout: the layout on disk.
        experts: the experts of each layer that this rank holds; None for all.
    """
    result: list[TensorMapping] = []
    prefix = "ernie." if layout == "paddle" else "model."
    vocab, hidden = config.vocab_size, config.hidden_size

    def same(name: str, shape: Shape) -> None:
        stored = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        result.append(TensorMapping(name, shape, stored, shape))

    same(EMBED_TOKENS, (vocab, hidden))
    for index in range(config.num_hidden_layers):
        same(f"model.layers.{index}.input_layernorm.weight", (hidden,))
        same(f"model.layers.{index}.post_attention_layernorm.weight", (hidden,))
        here = range(config.moe_num_experts) if experts is None else experts
        layer = _LayerMappings(config, layout, f"layers.{index}", here)
        result += layer.attention()
        result += layer.moe() if config.is_moe_layer(index) else layer.dense()
    same("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        transposed = layout == "paddle"
        stored_shape = (hidden, vocab) if transposed else (vocab, hidden)
        result.append(TensorMapping(LM_HEAD, (vocab, hidden), LM_HEAD, stored_shape, transposed))
    if config.lm_head_has_bias:
        same("lm_head.bias", (vocab,))
    return result


def parameter_shapes(config: Ernie4_5_MoeConfig, experts: range | None = None) -> dict[str, Shape]:
    """Return name -> shape of all parameters in memory, the router's bias included.

    `experts`: the experts of each layer that this rank holds; None for all.
    """
    return {
        mapping.parameter: mapping.shape for mapping in tensor_mappings(config, experts=experts)
    }


@dataclass(frozen=True)
class _LayerMappings:
    """Build the mappings of one decoder layer."""

    config: Ernie4_5_MoeConfig
    layout: Layout
    name: str  # "layers.3"
    here: range  # the experts in memory

    def linear(
        self, name: str, parts: list[tuple[str, int]], rows: int, fused: str
    ) -> list[TensorMapping]:
        """Return the mappings of Linears that share an input.

        `parts` lists (projection, output features); `rows` is the number of input features. In
        Baidu's layout they are columns of one stored Linear, called `fused`.
        """
        paddle = self.layout == "paddle"
        total = sum(width for _, width in parts)
        result, start = [], 0
        for part, width in parts:
            columns = slice(start, start + width)
            start += width
            target = f"model.{self.name}.{name}.{part}"
            stored = f"ernie.{self.name}.{name}.{fused}" if paddle else target
            shape = (rows, width)
            result.append(self._weight(f"{target}.weight", shape, stored, rows, columns, total))
            if self.config.use_bias:
                size, at = (total, (columns,)) if paddle else (width, ())
                target, stored = f"{target}.bias", f"{stored}.bias"
                result.append(TensorMapping(target, (width,), stored, (size,), stored_at=at))
        return result

    def _weight(
        self,
        target: str,
        shape: Shape,
        stored: str,
        rows: int,
        columns: slice,
        total: int,
        at: Index = (),
    ) -> TensorMapping:
        """Map a Linear weight [rows,columns], which is `at` of the parameter `target`.

        It is a tensor of its own, transposed; in Baidu's layout `columns` of one with `total`.
        """
        stored = f"{stored}.weight"
        if self.layout == "paddle":
            place = (slice(None), columns)
            return TensorMapping(target, shape, stored, (rows, total), at=at, stored_at=place)
        width = columns.stop - columns.start
        return TensorMapping(target, shape, stored, (width, rows), transpose=True, at=at)

    def attention(self) -> list[TensorMapping]:
        config = self.config
        q_width = config.num_attention_heads * config.attention_head_dim
        kv_width = config.num_key_value_heads * config.attention_head_dim
        parts = [("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)]
        output = [("o_proj", config.hidden_size)]
        return [
            *self.linear("self_attn", parts, config.hidden_size, "qkv_proj"),
            *self.linear("self_attn", output, q_width, "o_proj"),
        ]

    def mlp(self, name: str, width: int) -> list[TensorMapping]:
        hidden = self.config.hidden_size
        parts = [("gate_proj", width), ("up_proj", width)]
        return [
            *self.linear(name, parts, hidden, "up_gate_proj"),
            *self.linear(name, [("down_proj", hidden)], width, "down_proj"),
        ]

    def dense(self) -> list[TensorMapping]:
        return self.mlp("mlp", self.config.intermediate_size)

    def moe(self) -> list[TensorMapping]:
        config, paddle = self.config, self.layout == "paddle"
        hidden, experts = config.hidden_size, config.moe_num_experts
        stored = f"ernie.{self.name}" if paddle else f"model.{self.name}"
        router, bias = f"model.{self.name}.mlp.gate.weight", f"model.{self.name}{_BIAS_NAME}"
        stored_shape = (hidden, experts) if paddle else (experts, hidden)
        result = [
            TensorMapping(
                router, (hidden, experts), f"{stored}.mlp.gate.weight", stored_shape, not paddle
            ),
            TensorMapping(bias, (1, experts), f"{stored}{_BIAS_NAME}", (1, experts)),
        ]
        result += self.experts()
        if config.moe_num_shared_experts:
            width = config.moe_num_shared_experts * config.moe_intermediate_size
            result += self.mlp("mlp.shared_experts", width)
        return result

    def experts(self) -> list[TensorMapping]:
        """Return the mappings of the stacked experts: gate and up [E, H, I], down [E, I, H]."""
        hidden, width = self.config.hidden_size, self.config.moe_intermediate_size
        return [
            *self._stacked("gate_proj", (hidden, width), slice(0, width), 2 * width),
            *self._stacked("up_proj", (hidden, width), slice(width, 2 * width), 2 * width),
            *self._stacked("down_proj", (width, hidden), slice(0, hidden), hidden),
        ]

    def _stacked(
        self, part: str, shape: tuple[int, int], columns: slice, total: int
    ) -> list[TensorMapping]:
        """Return the mappings of one projection of all experts, [E, *shape] in memory.

        The fused layouts store it as `columns` of `total`.
        """
        rows, outputs = shape
        target = f"model.{self.name}.mlp.experts.{part}"
        whole = (len(self.here), rows, outputs)
        fused = {"fused": "gate_up_proj", "paddle": "up_gate_proj"}.get(self.layout, part)
        stored = part if part == "down_proj" else fused
        if self.layout == "fused":
            name = f"model.{self.name}.mlp.experts.{stored}"
            everywhere = (self.config.moe_num_experts, total, rows)
            here = slice(self.here.start, self.here.stop)
            return [TensorMapping(target, whole, name, everywhere, True, stored_at=(here, columns))]
        experts = f"{'ernie' if self.layout == 'paddle' else 'model'}.{self.name}.mlp.experts"
        return [
            self._weight(target, whole, f"{experts}.{e}.{stored}", rows, columns, total, (place,))
            for place, e in enumerate(self.here)
        ]


# ---- names found in files ----------------------------------------------------------------------


def detect_layout(names: Iterable[str]) -> Layout:
    """Return the layout that stored tensors with these names follow."""
    listed = list(names)
    if any(name.startswith("ernie.") for name in listed):
        return "paddle"
    return "fused" if any(".mlp.experts.gate_up_proj" in name for name in listed) else "hf"


def is_mtp_name(name: str) -> bool:
    """Return whether a stored tensor belongs to multi-token prediction, which is not loaded."""
    return any(part.startswith("mtp") for part in name.split("."))


def normalize_name(name: str) -> str:
    """Return the name that a stored tensor has in the released checkpoints."""
    return name.replace(_BIAS_ALIAS, _BIAS_NAME)


# ---- arrays ------------------------------------------------------------------------------------


def to_stored(
    mappings: list[TensorMapping], named: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name on disk, view as on disk) of parameters or of their Adam moments.

    `mappings` map them; `named`, by name in memory, may have only some of them.

    Raises:
        WeightsError: no mapping has a name or its shape.
    """
    shapes = {mapping.parameter: mapping.shape for mapping in mappings}
    unknown = [name for name in named if name not in shapes]
    wrong = wrong_shapes({name: array.shape for name, array in named.items()}, shapes)
    if problems := describe_names([], unknown, wrong):
        raise WeightsError("; ".join(problems))
    for mapping in mappings:
        if mapping.parameter in named:
            yield mapping.stored, mapping.to_stored(named[mapping.parameter])


def from_hf(
    config: Ernie4_5_MoeConfig, named: Mapping[str, np.ndarray], experts: range | None = None
) -> Assembled:
    """Return parameters or their Adam moments by name in memory: undo `to_stored`.

    Args:
        config: the model's configuration.
        named: name on disk -> array, in the "hf" layout; may be only some of the parameters, but
            all tensors of each, and may be a mapping that reads from files on access.
        experts: the experts of each layer to read; None for all.

    Raises:
        WeightsError: a name or shape is not the model's.
    """
    every = tensor_mappings(config)
    here = every if experts is None else tensor_mappings(config, experts=experts)
    return from_stored(every, named, here)


def from_stored(
    every: list[TensorMapping], named: Mapping[str, np.ndarray], here: list[TensorMapping]
) -> Assembled:
    """Return stored arrays by name in memory: undo `to_stored`; see `from_hf`.

    `every` maps those of all ranks, `here` those of this one.

    Raises:
        WeightsError: no mapping has a name, or a part of a parameter is missing.
    """
    present = {mapping.parameter for mapping in every if mapping.stored in named}
    wanted = [mapping for mapping in every if mapping.parameter in present]
    expected = {mapping.stored: mapping.stored_shape for mapping in wanted}
    unknown = [name for name in named if name not in expected]
    missing = [name for name in expected if name not in named]
    if problems := describe_names(missing, unknown, []):
        raise WeightsError("; ".join(problems))
    return Assembled([p for p in here if p.parameter in present], named.__getitem__)


class Assembled(Mapping[str, np.ndarray]):
    """Parameters by name in memory, each made of its stored tensors on access.

    A tensor that is stored as it is in memory is passed on, not copied.

    Raises:
        WeightsError: `read` returned a tensor of another shape than the model's.
    """

    def __init__(self, wanted: list[TensorMapping], read: Callable[[str], np.ndarray]) -> None:
        self._read = read
        self._parts: dict[str, list[TensorMapping]] = {}
        for mapping in wanted:
            self._parts.setdefault(mapping.parameter, []).append(mapping)

    def __getitem__(self, name: str) -> np.ndarray:
        buffer, parts = np.empty(0), self._parts[name]
        for mapping in parts:
            stored = self._read(mapping.stored)
            if stored.shape != mapping.stored_shape:
                raise WeightsError(
                    f"{mapping.stored}: shape {list(stored.shape)} instead of "
                    f"{list(mapping.stored_shape)}"
                )
            if not (mapping.transpose or mapping.at or mapping.stored_at):
                return stored
            if mapping is parts[0]:
                buffer = np.empty(mapping.shape, stored.dtype)
            mapping.copy_from_stored(buffer, stored)
        return buffer

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def wrong_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """Return a text for each of the `found` that is expected in another shape."""
    return [
        f"{name} {list(shape)} instead of {list(expected[name])}"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]


def describe_names(missing: list[str], unknown: list[str], wrong: list[str]) -> list[str]:
    """Return one sentence for each kind of mismatch: the count and at most 20 names."""
    kinds = (("missing", missing), ("not of this model", unknown), ("wrong shape", wrong))
    result = []
    for label, names in kinds:
        if names:
            more = f", and {len(names) - 20} more" if len(names) > 20 else ""
            result.append(f"{label} ({len(names)}): {', '.join(sorted(names)[:20])}{more}")
    return result
