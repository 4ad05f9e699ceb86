"""Memory of sampling on a CPU: a copy of the weights, the cache and a step's arrays.

What `model/decode.py` holds, in float32. Shapes: B sequences at once, V vocabulary, H hidden size,
I expert width, k experts per token.
"""

from __future__ import annotations

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.layout import count_parameters

_FLOAT = 4
# Those of model/decode.py.
GROWTH, CHUNK_TOKENS = 32, 2048


def decoder_bytes(
    config: Ernie4_5_MoeConfig, sequences: int, prompt_tokens: int, new_tokens: int
) -> float:
    """The most that sampling takes beside the model, all completions at full length."""
    embedding = config.vocab_size * config.hidden_size * _FLOAT
    weights = count_parameters(config).total * _FLOAT
    weights += embedding if config.tie_word_embeddings else 0  # once to look up, once as the head
    making = 2.0 * embedding  # the head turned, and turned into panels
    return weights + max(
        making,
        _cache(config, sequences, _slots(prompt_tokens, prompt_tokens + 1))
        + _prompts_at_once(config, sequences, prompt_tokens),
        # The last layer's old slots stand while its new ones are filled.
        _cache(config, sequences, _slots(prompt_tokens, prompt_tokens + new_tokens))
        * (1 + 0.8 / config.num_hidden_layers)
        + 3.0 * sequences * config.vocab_size * _FLOAT,  # logits, shifted, exponentials
    )


def _cache(config: Ernie4_5_MoeConfig, sequences: int, slots: int) -> float:
    row = int(config.num_key_value_heads or 0) * config.attention_head_dim * _FLOAT
    return 2.0 * config.num_hidden_layers * sequences * slots * row


def _slots(prompt_tokens: int, needed: int) -> int:
    """Slots of a sequence that holds `needed` tokens but for the last: they grow by a quarter."""
    slots = -(-(prompt_tokens + 1) // GROWTH) * GROWTH
    while slots < needed - 1:
        slots += max(GROWTH, slots // 4 // GROWTH * GROWTH)
    return slots


def _prompts_at_once(config: Ernie4_5_MoeConfig, sequences: int, prompt_tokens: int) -> float:
    """Rows of a chunk of prompts in a layer's experts: in, gate and up, inner, out, in order."""
    tokens = min(sequences * prompt_tokens, max(CHUNK_TOKENS, prompt_tokens))
    width = config.moe_k * (3 * config.hidden_size + 3 * config.moe_intermediate_size)
    if not config.moe_num_experts:
        width = 3 * config.intermediate_size
    return float(tokens * (width + 3 * config.hidden_size) * _FLOAT)
