"""Where every number of a model lies: in memory, and in the three layouts found on disk.

In memory a Linear weight is [in, out] and the experts of a layer are stacked. On disk there is

- "hf": one tensor per expert and projection, Linear weights [out, in] (what this toolkit writes);
- "fused": the same, but with stacked experts, as newer `transformers` hold them in memory;
- "paddle": Baidu's own layout, prefix `ernie.`, fused `qkv_proj` and `up_gate_proj`, [in, out].

A `Piece` says which part of which stored tensor is which part of which parameter; loading, saving
and the renaming of Adam moments are all walks over the pieces of a layout.

In memory (H hidden, E experts, I width of one): `experts.gate_proj` and `experts.up_proj`
[E, H, I], `experts.down_proj` [E, I, H], router `gate.weight` [H, E], embedding [vocab, H].
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
# The bias belongs to the router in newer `transformers`; on disk it keeps its older place.
_BIAS_NAME = ".mlp.moe_statics.e_score_correction_bias"
_BIAS_ALIAS = ".mlp.gate.moe_statics.e_score_correction_bias"


@dataclass(frozen=True)
class Piece:
    """`parameter[at]` is `stored[stored_at]`, with the last two axes swapped if `transpose`."""

    parameter: str
    shape: Shape  # of the whole parameter
    stored: str
    stored_shape: Shape  # of the whole stored tensor
    transpose: bool = False
    at: Index = ()
    stored_at: Index = ()

    @property
    def keep_float32(self) -> bool:
        """The router and its bias stay float32 in a checkpoint of any dtype."""
        return self.parameter.endswith((".mlp.gate.weight", _BIAS_NAME))

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """Return this piece of a parameter, turned as it is stored; a view."""
        part = parameter[self.at]
        return part.swapaxes(-1, -2) if self.transpose else part

    def put(self, parameter: np.ndarray, stored: np.ndarray) -> None:
        """Copies this piece of the stored tensor to its place in the parameter."""
        part = stored[self.stored_at]
        parameter[self.at] = part.swapaxes(-1, -2) if self.transpose else part


def pieces(
    config: Ernie4_5_MoeConfig, layout: Layout = "hf", experts: range | None = None
) -> list[Piece]:
    """All pieces of a model in a layout, parameter by parameter in the order of the layers.

    `experts`: those of each layer that are in memory here; None: all.
    """
    result: list[Piece] = []
    prefix = "ernie." if layout == "paddle" else "model."
    vocab, hidden = config.vocab_size, config.hidden_size

    def same(name: str, shape: Shape) -> None:
        stored = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        result.append(Piece(name, shape, stored, shape))

    same(EMBED_TOKENS, (vocab, hidden))
    for index in range(config.num_hidden_layers):
        same(f"model.layers.{index}.input_layernorm.weight", (hidden,))
        same(f"model.layers.{index}.post_attention_layernorm.weight", (hidden,))
        here = range(config.moe_num_experts) if experts is None else experts
        layer = _LayerPieces(config, layout, f"layers.{index}", here)
        result += layer.attention()
        result += layer.moe() if config.is_moe_layer(index) else layer.dense()
    same("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        transposed = layout == "paddle"
        stored_shape = (hidden, vocab) if transposed else (vocab, hidden)
        result.append(Piece(LM_HEAD, (vocab, hidden), LM_HEAD, stored_shape, transposed))
    if config.lm_head_has_bias:
        same("lm_head.bias", (vocab,))
    return result


def parameter_shapes(config: Ernie4_5_MoeConfig, experts: range | None = None) -> dict[str, Shape]:
    """Name -> shape of everything a model holds in memory, the router's bias included."""
    return {piece.parameter: piece.shape for piece in pieces(config, experts=experts)}


@dataclass(frozen=True)
class _LayerPieces:
    config: Ernie4_5_MoeConfig
    layout: Layout
    name: str  # "layers.3"
    here: range  # the experts in memory

    def linear(self, name: str, parts: list[tuple[str, int]], rows: int, fused: str) -> list[Piece]:
        """The pieces of Linears with `rows` inputs: (projection, outputs) each.

        In Baidu's layout they are columns of one stored Linear, called `fused`.
        """
        paddle, bias = self.layout == "paddle", self.config.use_bias
        total = sum(width for _, width in parts)
        result, start = [], 0
        for part, width in parts:
            columns = slice(start, start + width)
            start += width
            parent = f"model.{self.name}.{name}.{part}"
            target, shape = f"{parent}.weight", (rows, width)
            if paddle:
                stored = f"ernie.{self.name}.{name}.{fused}"
                at: Index = (slice(None), columns)
                result.append(Piece(target, shape, f"{stored}.weight", (rows, total), stored_at=at))
            else:
                result.append(Piece(target, shape, target, (width, rows), transpose=True))
            target = f"{parent}.bias"
            if bias and paddle:
                at = (columns,)
                result.append(Piece(target, (width,), f"{stored}.bias", (total,), stored_at=at))
            elif bias:
                result.append(Piece(target, (width,), target, (width,)))
        return result

    def attention(self) -> list[Piece]:
        config = self.config
        q_width = config.num_attention_heads * config.attention_head_dim
        kv_width = config.num_key_value_heads * config.attention_head_dim
        parts = [("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)]
        output = [("o_proj", config.hidden_size)]
        return [
            *self.linear("self_attn", parts, config.hidden_size, "qkv_proj"),
            *self.linear("self_attn", output, q_width, "o_proj"),
        ]

    def mlp(self, name: str, width: int) -> list[Piece]:
        hidden = self.config.hidden_size
        parts = [("gate_proj", width), ("up_proj", width)]
        return [
            *self.linear(name, parts, hidden, "up_gate_proj"),
            *self.linear(name, [("down_proj", hidden)], width, "down_proj"),
        ]

    def dense(self) -> list[Piece]:
        return self.mlp("mlp", self.config.intermediate_size)

    def moe(self) -> list[Piece]:
        config, paddle = self.config, self.layout == "paddle"
        hidden, experts = config.hidden_size, config.moe_num_experts
        stored = f"ernie.{self.name}" if paddle else f"model.{self.name}"
        router, bias = f"model.{self.name}.mlp.gate.weight", f"model.{self.name}{_BIAS_NAME}"
        stored_shape = (hidden, experts) if paddle else (experts, hidden)
        result = [
            Piece(router, (hidden, experts), f"{stored}.mlp.gate.weight", stored_shape, not paddle),
            Piece(bias, (1, experts), f"{stored}{_BIAS_NAME}", (1, experts)),
        ]
        result += self.experts()
        if config.moe_num_shared_experts:
            width = config.moe_num_shared_experts * config.moe_intermediate_size
            result += self.mlp("mlp.shared_experts", width)
        return result

    def experts(self) -> list[Piece]:
        """Three stacked parameters: gate and up [E, H, I], down [E, I, H]."""
        hidden, width = self.config.hidden_size, self.config.moe_intermediate_size
        parts = {
            "gate_proj": (hidden, width, slice(0, width)),
            "up_proj": (hidden, width, slice(width, 2 * width)),
            "down_proj": (width, hidden, slice(0, hidden)),
        }
        result = []
        for part, (rows, outputs, columns) in parts.items():
            total = outputs if part == "down_proj" else 2 * width
            result += self._stacked(part, (rows, outputs), columns, total)
        return result

    def _stacked(
        self, part: str, shape: tuple[int, int], columns: slice, total: int
    ) -> list[Piece]:
        """One projection of all experts; fused layouts store it as `columns` of `total`."""
        rows, outputs = shape
        target = f"model.{self.name}.mlp.experts.{part}"
        whole = (len(self.here), rows, outputs)
        fused = {"fused": "gate_up_proj", "paddle": "up_gate_proj"}.get(self.layout, part)
        stored = part if part == "down_proj" else fused
        if self.layout == "fused":
            name = f"model.{self.name}.mlp.experts.{stored}"
            everywhere = (self.config.moe_num_experts, total, rows)
            here = slice(self.here.start, self.here.stop)
            return [Piece(target, whole, name, everywhere, True, stored_at=(here, columns))]
        result = []
        for place, expert in enumerate(self.here):
            if self.layout == "paddle":
                name = f"ernie.{self.name}.mlp.experts.{expert}.{stored}.weight"
                at = (slice(None), columns)
                piece = Piece(target, whole, name, (rows, total), at=(place,), stored_at=at)
            else:
                name = f"model.{self.name}.mlp.experts.{expert}.{stored}.weight"
                piece = Piece(target, whole, name, (outputs, rows), transpose=True, at=(place,))
            result.append(piece)
        return result


# ---- names found in files ----------------------------------------------------------------------


def detect_layout(names: Iterable[str]) -> Layout:
    """Which layout the tensors with these names follow."""
    listed = list(names)
    if any(name.startswith("ernie.") for name in listed):
        return "paddle"
    return "fused" if any(".mlp.experts.gate_up_proj" in name for name in listed) else "hf"


def is_skipped(name: str) -> bool:
    """Whether a stored tensor belongs to a multi-token-prediction block, which is not loaded."""
    return any(part.startswith("mtp") for part in name.split("."))


def canonical_name(name: str) -> str:
    """The name a stored tensor has in released checkpoints."""
    return name.replace(_BIAS_ALIAS, _BIAS_NAME)


# ---- arrays ------------------------------------------------------------------------------------


def to_hf(
    config: Ernie4_5_MoeConfig, named: Mapping[str, np.ndarray], experts: range | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters (or their Adam moments), by in-memory name -> (name on disk, array as on disk).

    `named` may hold a part of the parameters, and those of `experts` alone. The arrays yielded are
    views.
    Raises `WeightsError` for names or shapes that are not the model's.
    """
    shapes = parameter_shapes(config, experts)
    unknown = [name for name in named if name not in shapes]
    wrong = [
        f"{name} {list(array.shape)} instead of {list(shapes[name])}"
        for name, array in named.items()
        if name in shapes and tuple(array.shape) != shapes[name]
    ]
    if problems := describe_names([], unknown, wrong):
        raise WeightsError("; ".join(problems))
    for piece in pieces(config, experts=experts):
        if piece.parameter in named:
            yield piece.stored, piece.take(named[piece.parameter])


def from_hf(
    config: Ernie4_5_MoeConfig, named: Mapping[str, np.ndarray], experts: range | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `to_hf`: (in-memory name, array), one whole parameter after another.

    `named` may hold a part of the parameters, but each of them wholly, and may be a mapping that
    reads from files; of experts only `experts` are read. Raises `WeightsError` for names or shapes
    that are not the model's.
    """
    every = pieces(config)
    present = {piece.parameter for piece in every if piece.stored in named}
    wanted = [piece for piece in every if piece.parameter in present]
    expected = {piece.stored: piece.stored_shape for piece in wanted}
    unknown = [name for name in named if name not in expected]
    missing = [name for name in expected if name not in named]
    if problems := describe_names(missing, unknown, []):
        raise WeightsError("; ".join(problems))
    here = every if experts is None else pieces(config, experts=experts)
    yield from assemble([p for p in here if p.parameter in present], named.__getitem__)


def assemble(
    wanted: list[Piece], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the pieces of one parameter after another: (in-memory name, array).

    A tensor that is stored as it lies in memory is passed on, not copied.
    """
    by_parameter: dict[str, list[Piece]] = {}
    for piece in wanted:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    for name, parts in by_parameter.items():
        buffer: np.ndarray | None = None
        for piece in parts:
            stored = read(piece.stored)
            if stored.shape != piece.stored_shape:
                raise WeightsError(
                    f"{piece.stored}: shape {list(stored.shape)} instead of "
                    f"{list(piece.stored_shape)}"
                )
            if not (piece.transpose or piece.at or piece.stored_at):
                buffer = stored
                continue
            if buffer is None:
                buffer = np.empty(piece.shape, stored.dtype)
            piece.put(buffer, stored)
        if buffer is not None:
            yield name, buffer


def describe_names(missing: list[str], unknown: list[str], wrong: list[str]) -> list[str]:
    """One sentence for each kind of misfit, with at most 20 names and the count of all."""
    kinds = (("missing", missing), ("not of this model", unknown), ("wrong shape", wrong))
    result = []
    for label, names in kinds:
        if names:
            more = f", and {len(names) - 20} more" if len(names) > 20 else ""
            result.append(f"{label} ({len(names)}): {', '.join(sorted(names)[:20])}{more}")
    return result
