"""Fused passes for processors, compiled by numba: tensors in, tensors out, no autograd.

`usable` says whether they can be called; each has a plain twin where it is used, to which it falls
back and against which tests hold it. `ERNIE_TRAIN_KERNELS=plain` switches them off.
"""

from ernie_train.kernels.attention import attention, attention_backward
from ernie_train.kernels.blocks import (
    AttentionShape,
    MoEShape,
    Routed,
    attention_block,
    attention_block_backward,
    mlp_block,
    mlp_block_backward,
    moe_block,
    moe_block_backward,
)
from ernie_train.kernels.experts import experts, experts_backward, gather_rows, sum_pairs
from ernie_train.kernels.loading import (
    KERNELS,
    agree_over_ranks,
    describe_kernels,
    plain_operators,
    usable,
)
from ernie_train.kernels.logprobs import (
    LogprobsState,
    token_logprobs,
    token_logprobs_backward,
)
from ernie_train.kernels.rows import (
    linear_cross_entropy,
    rms_norm,
    rms_norm_backward,
    rope,
    swiglu,
    swiglu_backward,
)

__all__ = [
    "KERNELS",
    "AttentionShape",
    "LogprobsState",
    "MoEShape",
    "Routed",
    "agree_over_ranks",
    "attention",
    "attention_backward",
    "attention_block",
    "attention_block_backward",
    "describe_kernels",
    "experts",
    "experts_backward",
    "gather_rows",
    "linear_cross_entropy",
    "mlp_block",
    "mlp_block_backward",
    "moe_block",
    "moe_block_backward",
    "plain_operators",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "sum_pairs",
    "swiglu",
    "swiglu_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "usable",
]
