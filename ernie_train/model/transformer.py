"""ERNIE 4.5 for causal language modelling, MoE and dense.

Shapes: B rows, S positions, T real tokens (padding is dropped at the entry), H hidden size,
V vocabulary, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie_train.model.attention import Attention, AttentionTables, attention_block
from ernie_train.model.batch_layout import BatchLayout
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.model.dtypes import dtype_name, zero_parameter, zero_parameters
from ernie_train.model.kv_cache import KVCache, require_rope_theta
from ernie_train.model.layers import MLP, Embedding, RMSNorm, mlp_block
from ernie_train.model.moe import LOCAL_PLACEMENT, MoE, RouterStats, moe_block
from ernie_train.model.rope import RopeTables
from ernie_train.model.token_dispatcher import Placement, is_expert_parameter

# Router logits [T,E], expert ids [T,K] and dropped rows of a layer; None for a dense layer.
RouterOutput = tuple[Tensor, Tensor, int] | None


@dataclass(frozen=True)
class HiddenOutput:
    """Final hidden states of the real tokens, their layout in the batch, router statistics."""

    hidden: Tensor  # [T,H] after the last norm
    layout: BatchLayout
    router_stats: list[RouterStats]


@dataclass(frozen=True)
class CausalLMOutput:
    """`logits` [B,S,V], zero at padding; one `RouterStats` per MoE layer."""

    logits: Tensor
    router_stats: list[RouterStats]


class DecoderLayer(nn.Layer):
    """Attention block and MLP (or MoE) block, each with a norm before it and a residual."""

    def __init__(self, config: Ernie4_5_MoeConfig, layer: int, placement: Placement) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layer_index = layer  # from 0
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = MoE(config, placement) if self.is_moe else MLP(config, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        tables: AttentionTables,
        cache: KVCache | None,
        replayed: Tensor | None = None,
    ) -> tuple[Tensor, RouterOutput]:
        """Run the layer: x [T,H] -> x [T,H] and the router's output."""
        return self.mlp_block(self.attn_block(x, tables, cache), replayed)

    def attn_block(self, x: Tensor, tables: AttentionTables, cache: KVCache | None) -> Tensor:
        """Return x [T,H] plus the attention of its norm."""
        if cache is None:
            made = attention_block(self.input_layernorm, self.self_attn, x, tables)
            if made is not None:
                return made
        return x + self.self_attn(self.input_layernorm(x), tables, cache)

    def mlp_block(self, x: Tensor, replayed: Tensor | None = None) -> tuple[Tensor, RouterOutput]:
        """Return x [T,H] plus the MLP or MoE of its norm, and the router's output.

        replayed [T,K]: as in `Router.forward`.
        """
        norm = self.post_attention_layernorm
        if not self.is_moe:
            made = mlp_block(norm, self.mlp, x)
            return (x + self.mlp(norm(x)) if made is None else made), None
        routed = None if replayed is not None else moe_block(norm, self.mlp, x)
        if routed is not None:
            return routed[0], (routed[1], routed[2], 0)
        y = norm(x)
        y, router_logits, expert_ids, dropped = self.mlp(y, replayed)
        return x + y, (router_logits, expert_ids, dropped)


def run_layer(
    layer: DecoderLayer,
    x: Tensor,
    tables: AttentionTables,
    cache: KVCache | None,
    replayed: Tensor | None = None,
) -> tuple[Tensor, RouterOutput]:
    """Run a layer: the default of `Ernie4_5_MoeModel.run_layer`, which recomputation replaces."""
    return layer(x, tables, cache, replayed)


class Ernie4_5_MoeModel(nn.Layer):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: Ernie4_5_MoeConfig, placement: Placement = LOCAL_PLACEMENT) -> None:
        super().__init__()
        self.config = config
        self.placement = placement
        self.rope_theta = config.rope_theta
        self.run_layer: Callable[..., tuple[Tensor, RouterOutput]] = run_layer
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList(
            [DecoderLayer(config, i, placement) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: np.ndarray | Tensor | BatchLayout | None = None,
        kv_cache: KVCache | None = None,
        replayed_experts: np.ndarray | None = None,
    ) -> HiddenOutput:
        """Compute input_ids, position_ids, document_ids [B,S] -> hidden states of the real tokens.

        `document_ids`: tokens attend to earlier ones of the same document of their row; 0 is
        padding. Without it every row is one document. A layout stands for them where documents
        continue others. By default, positions count from 0 in each document, or continue those in
        `kv_cache`. `replayed_experts` [T,L,K]: the experts that the real tokens take in each of the
        L MoE layers, -1 where the router chooses them.

        Raises `ValueError` for a batch without a real token, or a cache of another RoPE base.
        """
        batch, length = input_ids.shape
        if document_ids is None:
            layout = BatchLayout.full_rows(batch, length)
        elif isinstance(document_ids, BatchLayout):
            layout = document_ids
        else:
            layout = BatchLayout.from_document_ids(np.asarray(document_ids))
        if layout.num_tokens == 0:
            raise ValueError("the batch has no real token: document_ids are all 0")
        tokens, cached = _real_tokens(input_ids, layout), None
        if kv_cache is not None:
            require_rope_theta(kv_cache.rope_theta, self.rope_theta)
            cached = kv_cache.begin(layout)
        if position_ids is not None:
            positions = _real_tokens(position_ids, layout)
        else:
            positions = paddle.to_tensor(layout.default_positions() if cached is None else cached)
        rope = RopeTables.build(positions, self.rope_theta, self.config.attention_head_dim)
        tables = AttentionTables(self.config, layout, rope)
        x = self.embed_tokens(tokens)
        stats: list[RouterStats] = []
        for i, layer in enumerate(self.layers):
            replayed = None
            if replayed_experts is not None and layer.is_moe:
                replayed = paddle.to_tensor(replayed_experts[:, len(stats)].astype(np.int64))
            x, routed = self.run_layer(layer, x, tables, kv_cache, replayed)
            if routed is not None:
                logits, expert_ids, dropped = routed
                stats.append(RouterStats(i, logits, F.softmax(logits), expert_ids, dropped))
        return HiddenOutput(self.norm(x), layout, stats)


def _real_tokens(ids: Tensor, layout: BatchLayout) -> Tensor:
    """Return the entries of ids [B,S] at real tokens, [T]."""
    flat = ids.reshape([-1])
    if layout.token_index is None:
        return flat
    return paddle.gather(flat, paddle.to_tensor(layout.token_index))


def _with_mean_rows(weight: Tensor, size: int) -> Tensor:
    """Return a parameter of `size` rows: those of `weight` [V,...], then their mean."""
    mean = weight.astype("float32").mean(axis=0, keepdim=True)
    new = paddle.concat([mean] * (size - weight.shape[0])).astype(weight.dtype)
    grown = zero_parameter([size, *weight.shape[1:]], dtype_name(weight))
    grown.set_value(paddle.concat([weight, new]))
    return grown


class LMHead(nn.Layer):
    """Output projection [V,H], of the shape of the embedding, to which it may be tied."""

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if not config.tie_word_embeddings:
            self.weight = self.create_parameter([config.vocab_size, config.hidden_size])
        if config.lm_head_has_bias:
            self.bias = self.create_parameter([config.vocab_size], is_bias=True)

    def matrix(self) -> Tensor | None:
        """Return the projection [V,H]; None if it is the embedding."""
        return self.weight


class Ernie4_5_MoeForCausalLM(nn.Layer):
    """Decoder and output head; attribute names are those of the Hugging Face implementation."""

    def __init__(
        self,
        config: Ernie4_5_MoeConfig,
        placement: Placement = LOCAL_PLACEMENT,
        *,
        initialize: bool = True,
    ) -> None:
        """Build the model; without `initialize` its parameters are zeros, to be overwritten.

        Random numbers take most of the time of loading: 15 of 20 s for 135 M parameters.
        """
        super().__init__()
        self.config = config
        # Stored tensors that mean nothing here, by name; written again with the weights.
        self.carried: dict[str, np.ndarray] = {}
        # generation_config.json of the directory that was read; written again likewise.
        self.generation: dict[str, Any] = {}
        with nullcontext() if initialize else zero_parameters():
            self.model = Ernie4_5_MoeModel(config, placement)
            self.lm_head = LMHead(config)
        self.partial: Any = None  # a `PartialTraining`; None where every parameter trains
        if initialize:
            self._initialize()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the output projection's weight [V,H], the embedding if tied, and its bias [V]."""
        weight = self.lm_head.matrix()
        return (self.model.embed_tokens.weight if weight is None else weight), self.lm_head.bias

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: np.ndarray | Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> CausalLMOutput:
        """Compute logits [B,S,V] of every position; arguments as in `Ernie4_5_MoeModel.forward`."""
        output = self.model(input_ids, position_ids, document_ids, kv_cache)
        logits = self.logits(output.hidden)
        layout = output.layout
        if layout.token_index is not None:
            size = layout.batch * layout.length
            index = paddle.to_tensor(layout.token_index)
            logits = paddle.scatter(
                paddle.zeros([size, logits.shape[-1]], logits.dtype), index, logits
            )
        logits = logits.reshape([layout.batch, layout.length, -1])
        return CausalLMOutput(logits, output.router_stats)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute hidden [T,H] -> logits [T,V]."""
        weight, bias = self.head()
        logits = paddle.matmul(hidden, weight, transpose_y=True)
        return logits if bias is None else logits + bias

    def set_rope_theta(self, theta: float) -> None:
        """Set the RoPE base, of the model and in the configuration that is saved with it."""
        self.set_context(theta, self.config.max_position_embeddings)

    def set_context(self, rope_theta: float, max_positions: int) -> None:
        """Set the RoPE base and the longest sequence, in the configuration too."""
        self.config = self.config.with_overrides(
            {"rope_theta": rope_theta, "max_position_embeddings": max_positions}
        )
        self.model.config = self.config
        self.model.rope_theta = rope_theta

    def grow_vocabulary(self, size: int) -> None:
        """Give embedding and head rows for `size` tokens; new rows are the mean of the others."""
        old = self.config.vocab_size
        if size <= old:
            return
        self.config = self.config.with_overrides({"vocab_size": size})
        self.model.config = self.config
        embedding = Embedding(size, self.config.hidden_size)
        embedding.weight = _with_mean_rows(self.model.embed_tokens.weight, size)
        self.model.embed_tokens = embedding
        if self.lm_head.weight is not None:
            self.lm_head.weight = _with_mean_rows(self.lm_head.weight, size)
        if self.lm_head.bias is not None:
            self.lm_head.bias = _with_mean_rows(self.lm_head.bias, size)

    def new_cache(self, batch: int, slots: int = 0) -> KVCache:
        """Return an empty key/value cache for `batch` sequences under the present RoPE base.

        slots: the most tokens of a sequence, if known; their memory is taken at once.
        """
        cache = KVCache(self.config, batch, dtype_name(self.model.norm.weight), slots)
        cache.rope_theta = self.model.rope_theta
        return cache

    def _initialize(self) -> None:
        """Set normal weights of `initializer_range` and zero biases; norms stay at one."""
        for name, parameter in self.named_parameters():
            std = self.config.initializer_range
            if "embed_tokens" in name:
                std = self.config.embedding_initializer_range or std
            if name.endswith("bias"):
                parameter.set_value(paddle.zeros_like(parameter))
            elif "norm" not in name:
                parameter.set_value((self._random(name, parameter) * std).astype(parameter.dtype))

    def _random(self, name: str, parameter: Tensor) -> Any:
        """Draw normal numbers of the parameter's shape.

        A stack of local experts takes its slice of the numbers of all experts, so that an expert's
        weights do not depend on the number of ranks.
        """
        experts = self.model.placement.experts
        if experts is None or not is_expert_parameter(name):
            return paddle.randn(parameter.shape, "float32")
        full_shape = [self.config.moe_num_experts, *parameter.shape[1:]]
        return paddle.randn(full_shape, "float32")[experts.start : experts.stop]
