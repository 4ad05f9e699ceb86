"""Bytes that a micro-batch keeps for its backward pass, and what stands beside them at the peak.

Each term names tensors that the code of `model/` and `losses/` holds; docs/scaling.md lists them.

Shapes: T tokens of the micro-batch, H hidden size, N query heads, K key/value heads, D head
dimension, E experts, k experts per token, I expert width, R routed rows of this rank, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.parallel import chunk_tokens, recomputed_parts
from ernie_train.parallel.recompute import PARTS, Part
from ernie_train.plan.buckets import numbers_in_flight
from ernie_train.plan.layout import Layout, Precision, moe_layers

_FLOAT, _INT = 4, 8  # bytes of float32 and int64
# Those of model/layout.py and losses/cross_entropy.py, which load Paddle.
BATCHED_LENGTH, KEPT_LENGTH, KEPT_BLOCK, ALIGNMENT = 192, 1024, 128, 8
CHUNK_ELEMENTS = 8 * 1024 * 1024
# The fullest rank of an expert group is taken to get this much more than the mean.
LOAD_IMBALANCE = 1.25

Head = Literal["cross_entropy", "logprobs"]


@dataclass(frozen=True)
class MicroBatch:
    """`rows` full rows of `seq_len` tokens, packed from documents of `document_tokens`."""

    rows: int
    seq_len: int
    document_tokens: int

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


@dataclass(frozen=True)
class Activations:
    """Activations of one rank; on a GPU FlashMask keeps log-sum-exps in place of probabilities."""

    config: Ernie4_5_MoeConfig
    precision: Precision
    layout: Layout
    on_gpu: bool

    def peak(self, batch: MicroBatch, head: Head) -> float:
        """Most bytes that live beside weights, gradients and optimizer state in a training step.

        Either while the loss is made, or in the backward pass of a layer: what is kept of it and
        of those before, and what is made again. Experts go back first; what they took is free
        again when attention does. Gradients of layers that are through may be on their way.
        """
        standing = self.kept(batch)
        peaks = [standing + self._head_transient(batch, head)]
        layers = self._layers()
        turns = {layer: self._turn(batch, *layer) for layer in set(layers)}
        travelling = numbers_in_flight(self.config, self.layout)
        for layer, numbers in zip(reversed(layers), reversed(travelling), strict=True):
            kept, beside = turns[layer]
            peaks.append(standing + beside + numbers * self.precision.gradient_width)
            standing -= kept
        return max(peaks)

    def kept(self, batch: MicroBatch) -> float:
        """What stands when the forward pass is done."""
        config = self.config
        counts = Counter(self._layers())
        layers = sum(n * sum(self._kept_parts(batch, *layer)) for layer, n in counts.items())
        # Router logits, probabilities and expert ids are reported for the losses.
        reported = batch.tokens * (2 * config.moe_num_experts * _FLOAT + config.moe_k * _INT)
        reported *= moe_layers(config)
        return layers + reported + self._tables(batch) + self._after_layers(batch)

    def layer(self, batch: MicroBatch, moe: bool) -> float:
        """What a layer keeps where it is not recomputed, less what it reports."""
        return self._attention(batch) + self._experts(batch.tokens, moe)

    def prefill(self, tokens: int, prompt_tokens: int) -> float:
        """One layer's activations: without gradients each layer's go before the next one's come."""
        batch = MicroBatch(max(1, tokens // prompt_tokens), prompt_tokens, prompt_tokens)
        return self._tables(batch) + max(self.layer(batch, moe) for moe in self._kinds())

    def routed_rows(self, tokens: int) -> float:
        """R, for `tokens` on every rank."""
        share = min(1.0, self.config.moe_capacity_factor or 1.0)
        rows = tokens * self.config.moe_k * share
        return rows * LOAD_IMBALANCE if self.layout.expert > 1 else rows

    # ---- parts -----------------------------------------------------------------------------------

    def _kinds(self) -> set[bool]:
        return {moe for moe, _ in self._layers()}

    def _layers(self) -> list[tuple[bool, frozenset[Part]]]:
        """Whether each layer is an MoE layer, and what is run again of it."""
        numbers, again = range(self.config.num_hidden_layers), self.layout.recompute
        return [(self.config.is_moe_layer(n), recomputed_parts(again, n)) for n in numbers]

    def _kept_parts(
        self, batch: MicroBatch, moe: bool, parts: frozenset[Part]
    ) -> tuple[float, float]:
        """What attention and experts of a layer keep: of what is run again its input, [T,H]."""
        stream = batch.tokens * self.config.hidden_size * self.precision.width
        if parts == set(PARTS):
            return stream, 0.0
        return (
            stream if "attention" in parts else self._attention(batch),
            stream if "experts" in parts else self._experts(batch.tokens, moe),
        )

    def _turn(self, batch: MicroBatch, moe: bool, parts: frozenset[Part]) -> tuple[float, float]:
        """What a layer keeps, and the most that stands beside it in the layer's backward pass."""
        attention, experts = self._kept_parts(batch, moe, parts)
        tokens = self._experts_at_once(batch, parts)
        attention_again = self._attention(batch) if "attention" in parts else 0.0
        turn_of_experts = self._backward_of_experts(batch, tokens)
        turn_of_experts += self._experts(tokens, moe) if "experts" in parts else 0.0
        turn_of_experts += attention_again if "experts" in parts else 0.0
        # What experts kept has gone when it is attention's turn.
        turn_of_attention = attention_again + self._backward_of_attention(batch) - experts
        return attention + experts, max(turn_of_experts, turn_of_attention)

    def _norm(self, tokens: int) -> float:
        """x / rms and 1 / rms in float32, and the norm's output."""
        return tokens * (self.config.hidden_size * (_FLOAT + self.precision.width) + _FLOAT)

    @property
    def _heads(self) -> tuple[int, int]:
        return self.config.num_attention_heads, int(self.config.num_key_value_heads or 0)

    def _attention(self, batch: MicroBatch) -> float:
        """Norm, q, k, v, output, and for each query what the backward pass needs of its scores."""
        heads, kv_heads = self._heads
        rows = (2 * heads + 2 * kv_heads) * self.config.attention_head_dim
        scores = heads * self._scores_of_a_query(batch.document_tokens)
        own = batch.tokens * (rows * self.precision.width + scores)
        return self._norm(batch.tokens) + own

    def _experts_at_once(self, batch: MicroBatch, parts: frozenset[Part]) -> int:
        """Tokens whose experts are in memory together in a layer's backward pass."""
        chunk = chunk_tokens(self.layout.recompute) if "experts" in parts else None
        return min(batch.tokens, chunk or batch.tokens)

    def _experts(self, tokens: int, moe: bool) -> float:
        """Norm, and the mixture or the MLP."""
        own = self._mixture(tokens) if moe else self._mlp(tokens, dense=True)
        return self._norm(tokens) + own

    def _scores_of_a_query(self, length: int) -> float:
        """Bytes kept for a query and head, the mean over a document: see model/blocks.py."""
        width = self.precision.width
        if self.on_gpu or length > KEPT_LENGTH:
            return _FLOAT  # the log-sum-exp
        if self._are_batched(length):
            return length * width
        blocks = -(-length // KEPT_BLOCK)
        block = -(-length // (blocks * ALIGNMENT)) * ALIGNMENT
        return block * block * blocks * (blocks + 1) / 2 / length * width

    def _mlp(self, tokens: int, *, dense: bool) -> float:
        """gate, silu(gate), up and their product."""
        config = self.config
        shared = config.moe_num_shared_experts * config.moe_intermediate_size
        return 4 * tokens * (config.intermediate_size if dense else shared) * self.precision.width

    def _mixture(self, tokens: int) -> float:
        config, width = self.config, self.precision.width
        pairs = tokens * config.moe_k
        kept = tokens * config.moe_num_experts * _FLOAT  # the router's probabilities
        if width != _FLOAT:
            kept += tokens * config.hidden_size * _FLOAT  # its input in float32
        elif self.layout.expert > 1 and config.moe_num_shared_experts:
            # Shared experts keep a copy of the input, which in float32 the router keeps too.
            kept += tokens * config.hidden_size * _FLOAT
        kept += 4 * pairs * _FLOAT  # those of the chosen experts, until they are weights
        kept += 3 * pairs * _INT  # the way of every pair to its row and back
        # The experts' input, their weights, and up, sigmoid, silu, wide weights, weighted product.
        row = config.hidden_size + 1 + 5 * config.moe_intermediate_size
        return kept + self.routed_rows(tokens) * row * width + self._mlp(tokens, dense=False)

    def _tables(self, batch: MicroBatch) -> float:
        """Rotary tables of tokens and heads, and on a CPU the index arrays of attention."""
        heads, kv_heads = self._heads
        rotary = 2 * (1 + heads + kv_heads) * self.config.attention_head_dim * _FLOAT
        return batch.tokens * (rotary + (0 if self.on_gpu else 2 * (heads + kv_heads) * _INT))

    def _after_layers(self, batch: MicroBatch) -> float:
        """The last norm, and what the head keeps for each token."""
        return batch.tokens * self.config.hidden_size * (_FLOAT + self.precision.width)

    def _head_transient(self, batch: MicroBatch, head: Head) -> float:
        """Chunks of logits, the head's gradients and their temporary copies, hidden states."""
        config, width, tokens = self.config, self.precision.width, batch.tokens
        chunk = max(1, CHUNK_ELEMENTS // config.vocab_size)
        part, chunks = min(tokens, chunk), -(-tokens // chunk)
        if head == "cross_entropy":
            copies = 2.0 if width == _FLOAT else 2 + width / _FLOAT  # as they come out of the head
        else:
            copies = 4 if chunks == 1 else 5  # the last chunk's logits, while the next ones come
        logits = copies * part * config.vocab_size * _FLOAT
        # A chunk's gradient, its copy with the labels' part, their sum, the one before.
        weight = (1 + min(chunks, 3)) * config.vocab_size * config.hidden_size * width
        return logits + weight + 2 * (tokens + part) * config.hidden_size * width

    def _stream_gradients(self, batch: MicroBatch) -> float:
        """Of the stream; and the head's waits for the embedding's where the two are tied."""
        config, width = self.config, self.precision.width
        waiting = config.vocab_size if config.tie_word_embeddings else 0
        return float((3 * batch.tokens + waiting) * config.hidden_size * width)

    def _backward_of_attention(self, batch: MicroBatch) -> float:
        """Gradients on their way: of the stream, of the output, q, k and v.

        A CPU has the output's three times and the values' once more, and in long documents blocks
        of all before they are joined; where documents are scored as a whole, the gradients of the
        scores stand as well.
        """
        (heads, kv_heads), width = self._heads, self.precision.width
        copies = 2 * heads + 2 * kv_heads
        if not self.on_gpu:
            is_long = batch.document_tokens > KEPT_LENGTH
            copies += 2 * heads + kv_heads + (2 * heads + 2 * kv_heads) * is_long
        scores = batch.document_tokens if self._are_batched(batch.document_tokens) else 0
        own = copies * self.config.attention_head_dim + heads * scores
        return self._stream_gradients(batch) + batch.tokens * own * width

    def _are_batched(self, length: int) -> bool:
        return not self.on_gpu and length <= BATCHED_LENGTH

    def _backward_of_experts(self, batch: MicroBatch, tokens: int) -> float:
        """Gradients on their way: of the stream, of a layer's experts, and of rows of `tokens`."""
        config, width, hidden = self.config, self.precision.width, self.config.hidden_size
        held = self._stream_gradients(batch)
        if not moe_layers(config):
            inner = config.intermediate_size
            return held + (3 * tokens * inner + hidden * inner) * width
        # Each expert's gradients, then all of them stacked.
        experts = config.moe_num_experts // self.layout.expert
        held += 2 * 3 * experts * hidden * config.moe_intermediate_size * width
        # Of the rows: incoming, of each expert, joined. An exchange before or after holds no more.
        return held + 3 * self.routed_rows(tokens) * hidden * width
