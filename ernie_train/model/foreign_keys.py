"""Foreign keys of a config.json: those that would change the function, and harmless ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A foreign key that would change the function, and the values under which it does not.
_OFF = (None, False, 0)
_ONE = (None, 1)
_NO_SCALE = (_ONE, "scaled outputs are not implemented")
_NO_CAP = (_OFF, "soft-capping is not implemented")
_NO_DROPOUT = (_OFF, "dropout is not implemented")
_NO_GROUPS = ((None, False, 0, 1), "expert groups are not implemented")
_NO_WINDOW = (_OFF, "sliding-window attention is not implemented")
_SOFTMAX = ((None, "softmax"), "the router is a softmax")
_BIASES = (_OFF, "biases follow use_bias: every projection has one, or none has")
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_dropout": _NO_DROPOUT,
    "attention_dropout_prob": _NO_DROPOUT,
    "attention_probs_dropout_prob": _NO_DROPOUT,
    "hidden_dropout_prob": _NO_DROPOUT,
    "moe_dropout_prob": _NO_DROPOUT,
    "attention_bias": _BIASES,
    "qkv_bias": _BIASES,
    "mlp_bias": _BIASES,
    "compression_ratio": (_ONE, "compressed rotary positions are not implemented"),
    "partial_rotary_factor": (_ONE, "partial rotary embedding is not implemented"),
    "rope_3d": (_OFF, "three-dimensional rotary positions are not implemented"),
    "rope_interleaved": ((None, True), "rotary pairs are interleaved"),
    "use_alibi": (_OFF, "positions are rotary"),
    "alibi": (_OFF, "positions are rotary"),
    "sliding_window": _NO_WINDOW,
    "use_sliding_window": _NO_WINDOW,
    "attention_chunk_size": (_OFF, "chunked attention is not implemented"),
    "attn_logit_softcapping": _NO_CAP,
    "final_logit_softcapping": _NO_CAP,
    "logits_soft_cap": _NO_CAP,
    "router_logit_softcapping": _NO_CAP,
    "logit_scale": _NO_SCALE,
    "logits_scaling": _NO_SCALE,
    "embedding_multiplier": _NO_SCALE,
    "residual_multiplier": _NO_SCALE,
    "attention_multiplier": ((None,), "scores are divided by sqrt(head_dim)"),
    "routed_scaling_factor": _NO_SCALE,
    "quantization_config": ((None,), "quantized weights cannot be read"),
    "is_quantized": (_OFF, "quantized weights cannot be read"),
    "vision_config": ((None,), "only text models are implemented"),
    "moe_gate_act": _SOFTMAX,
    "scoring_func": _SOFTMAX,
    "moe_gate": ((None, "topk", "top2_fused"), "the router picks the top-k experts"),
    "moe_norm_gate_logits": ((None, True), "the weights of the chosen experts are normalized"),
    "norm_topk_prob": ((None, True), "the weights of the chosen experts are normalized"),
    "moe_use_hard_gate": (_OFF, "experts are chosen by the router"),
    "moe_group_experts": _NO_GROUPS,
    "n_group": _NO_GROUPS,
    "topk_group": _NO_GROUPS,
    "use_qk_norm": (_OFF, "normalized queries and keys are not implemented"),
    "qk_layernorm": (_OFF, "normalized queries and keys are not implemented"),
    "use_rmsnorm": ((None, True), "the norm is RMSNorm"),
}
# Other names for one of this model's keys: refused if it says something else.
_SAME_AS = {
    "first_k_dense_replace": "moe_layer_start_index",
    "n_routed_experts": "moe_num_experts",
    "n_shared_experts": "moe_num_shared_experts",
}
# Written by every version anew, or about files and libraries; all other keys that are not read are
# carried through.
NOT_CARRIED = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map",
    "_name_or_path", "rope_parameters", "rope_scaling", "use_cache",
}  # fmt: skip

# Beginnings of keys about training, layout on ranks, kernels and outputs; other keys are unknown.
_HARMLESS = (
    "add_cross_attention", "chunk_size_feed_forward", "cross_attention_", "decoder_",
    "disable_ffn_model_parallel", "encoder_", "finetuning_task", "fuse_", "fused_", "gradient_",
    "id2label", "ignored_index", "is_decoder", "is_encoder_decoder", "label2id", "layer_types",
    "max_sequence_length", "max_window_layers", "moe_aux_loss", "moe_capacity", "moe_multimodal_",
    "moe_orthogonal_loss", "moe_use_aux_free", "moe_z_loss", "mtp_", "multi_token_pred",
    "num_nextn_predict_layers", "output_", "pipeline_parallel", "pretraining_tp", "problem_type",
    "pruned_heads", "recompute", "return_dict", "router_aux_loss", "router_z_loss", "sep_token_id",
    "sequence_parallel", "task_specific_params", "tensor_parallel", "tie_encoder_decoder",
    "tokenizer_class", "torchscript", "unk_token_id", "use_flash", "use_recompute", "use_sparse_",
)  # fmt: skip


def foreign_problems(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key that asks for a function that this model does not compute.

    Args:
        values: the keys of a config.json.
        defaults: those of the keys of this model.
    """
    problems = [
        f"{key} = {values[key]!r}: {reason}"
        for key, (harmless, reason) in _UNSUPPORTED.items()
        if key in values and not any(values[key] == value for value in harmless)
    ]
    kinds = values.get("layer_types") or ()
    named = kinds if isinstance(kinds, list | tuple) else [kinds]
    if odd := sorted({str(kind) for kind in named} - {"full_attention"}):
        problems.append(f"layer_types: {', '.join(odd)}: every layer attends to all before it")
    return problems + [
        f"{key} = {values[key]!r} contradicts {own}, which decides here"
        for key, own in _SAME_AS.items()
        if values.get(key) is not None and values[key] != values.get(own, defaults[own])
    ]


def unknown_keys(carried: Mapping[str, Any]) -> list[str]:
    """Return the keys of which it is not known that they mean nothing here."""
    known = {*_UNSUPPORTED, *_SAME_AS}
    return [key for key in carried if key not in known and not key.startswith(_HARMLESS)]
