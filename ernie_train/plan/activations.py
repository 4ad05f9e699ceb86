"""Estimate the activations that a layer keeps of a token for its backward pass.

Symbols: b bytes of a weight, H hidden size, N query heads, K key/value heads, D head dimension,
I width of an expert or an MLP, r rows of a token in routed experts.
"""

from __future__ import annotations

from ernie_train.model.batch_layout import KEPT_BLOCK, KEPT_LENGTH
from ernie_train.model.batched_experts import MOST_SLOTS_PER_ROW, few_rows
from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.parallel.recompute import Part
from ernie_train.plan.layout import Layout, Machine, TrainedPart

# Tensors of an expert's or an MLP's width that are kept for a row, and for a row in slots
# (model/batched_experts.py), of which up to MOST_SLOTS_PER_ROW pad each row.
EXPERT_TENSORS, MLP_TENSORS, SLOT_TENSORS = 5, 4, 3
# Rows of the fullest rank of an expert group, compared with the mean.
LOAD_IMBALANCE = 1.25
_FLOAT = 4


def layer_bytes(
    config: Ernie4_5_MoeConfig,
    machine: Machine,
    layout: Layout,
    document_tokens: float,
    moe: bool,
    part: TrainedPart | None = None,
    *,
    padded: bool = False,
) -> dict[Part, float]:
    """Return the bytes that each part of a layer keeps of a token for its backward pass.

    attention: H (4 + b) + 2 (N + K) D b, and on a CPU the probabilities of documents up to
    KEPT_LENGTH. experts: H (4 + b) + 4 H + r (H + 5 I) b for r rows, 6 I where they are padded, and
    four times the width of shared experts (or of a dense MLP) times b. Each LoRA pair keeps as many
    numbers as its rank, experts with pairs r (2 H + 4 I) b; DoRA as many more as outputs.
    """
    width, hidden = machine.precision.width, config.hidden_size
    heads = config.num_attention_heads
    all_heads = heads + config.num_key_value_heads
    norm = hidden * (_FLOAT + width)
    attention = float(norm + 2 * all_heads * config.attention_head_dim * width)
    if not machine.on_gpu and document_tokens <= KEPT_LENGTH:
        scores = min(document_tokens, (document_tokens + KEPT_BLOCK) / 2)
        attention += heads * scores * width
    rank, dora = (part.rank, part.dora) if part is not None else (0, False)
    outputs = all_heads + config.num_key_value_heads  # of q, k and v
    attention += (4 * rank + dora * (outputs * config.attention_head_dim + hidden)) * width

    def pairs(inner: int) -> int:  # of a gate, an up and a down projection
        return 3 * rank + dora * (2 * inner + hidden)

    if not moe:
        inner = config.intermediate_size
        return {
            "attention": attention,
            "experts": norm + (MLP_TENSORS * inner + pairs(inner)) * width,
        }
    inner = config.moe_intermediate_size
    of_shared = config.moe_num_shared_experts * inner
    shared = MLP_TENSORS * of_shared + pairs(of_shared)
    row = hidden + (SLOT_TENSORS * MOST_SLOTS_PER_ROW if padded else EXPERT_TENSORS) * inner
    if part is not None and part.pairs.experts:
        row = 2 * hidden + 4 * inner + pairs(inner)
    rows = rows_per_token(config, layout)
    experts = norm + hidden * _FLOAT + (rows * row + shared) * width
    return {"attention": attention, "experts": experts}


def padded_rows(
    config: Ernie4_5_MoeConfig, machine: Machine, layout: Layout, tokens: float
) -> bool:
    """Return whether experts run in slots for a rank's `tokens` (model/batched_experts.py)."""
    experts = config.moe_num_experts // layout.expert
    return machine.on_gpu and few_rows(tokens * config.moe_k, experts)


def rows_per_token(config: Ernie4_5_MoeConfig, layout: Layout) -> float:
    """Return the rows that reach the experts of the fullest rank for each of its own tokens."""
    rows = config.moe_k * min(1.0, config.moe_capacity_factor or 1.0)
    return rows * LOAD_IMBALANCE if layout.expert > 1 else rows
