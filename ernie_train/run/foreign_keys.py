"""Names that other training kits and earlier versions give to settings, and those of today."""

from __future__ import annotations

from typing import Any

from ernie_train.core.cpu import __version__

_RUN_DIR = "where to write is said by --run-dir"
_PRECISION = "delete it: by device weights are bfloat16 on GPUs and float32 on CPUs"
_LAYOUT = "a layout is set by parallel.expert, parallel.data and parallel.sharding"
_PACKED = "delete it: rows are always packed, without attention between documents"

# Key of trl, transformers, LLaMA-Factory, axolotl, ERNIEKit, ... -> path in a recipe, or advice.
FOREIGN_KEYS = {
    "learning_rate": "stages[].optim.lr",
    "min_learning_rate": "stages[].optim.min_lr",
    "lr_scheduler_type": "stages[].optim.schedule",
    "lr_scheduler": "stages[].optim.schedule",
    "warmup": "stages[].optim.warmup_steps",
    "warmup_ratio": "stages[].optim.warmup_steps",
    "num_warmup_steps": "stages[].optim.warmup_steps",
    "adam_beta1": "stages[].optim.beta1",
    "adam_beta2": "stages[].optim.beta2",
    "adam_epsilon": "stages[].optim.eps",
    "max_grad_norm": "stages[].optim.clip_grad_norm",
    "gradient_clipping": "stages[].optim.clip_grad_norm",
    "grad_clip": "stages[].optim.clip_grad_norm",
    "per_device_train_batch_size": "stages[].micro_batch_size",
    "train_batch_size": "stages[].micro_batch_size",
    "batch_size": "stages[].micro_batch_size",
    "gradient_accumulation_steps": "stages[].grad_accum_steps",
    "gradient_accumulation": "stages[].grad_accum_steps",
    "num_train_epochs": "stages[].epochs",
    "num_epochs": "stages[].epochs",
    "max_steps": "stages[].steps",
    "max_seq_length": "stages[].seq_len",
    "max_seq_len": "stages[].seq_len",
    "max_length": "stages[].seq_len",
    "sequence_len": "stages[].seq_len",
    "cutoff_len": "stages[].seq_len",
    "block_size": "stages[].seq_len",
    "dataset": "stages[].data",
    "datasets": "stages[].data",
    "dataset_name": "stages[].data",
    "train_dataset": "stages[].data",
    "train_file": "stages[].data",
    "eval_dataset": "stages[].validation",
    "validation_file": "stages[].validation",
    "eval_steps": "stages[].validate_every_steps",
    "save_steps": "stages[].checkpoint.every_steps",
    "save_total_limit": "stages[].checkpoint.keep_last",
    "metric_for_best_model": "stages[].checkpoint.best_metric",
    "early_stopping_patience": "stages[].checkpoint.early_stopping_patience",
    "load_best_model_at_end": "stages[].checkpoint.load_best_at_end",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "base_model": "model.path",
    "tokenizer_name": "tokenizer.path",
    "tokenizer_name_or_path": "tokenizer.path",
    "template": "chat.template",
    "chat_template": "chat.template",
    "peft_config": "stages[].lora",
    "use_peft": "stages[].lora",
    "adapter": "stages[].lora",
    "lora_r": "stages[].lora.rank",
    "lora_rank": "stages[].lora.rank",
    "lora_alpha": "stages[].lora.alpha",
    "lora_dropout": "stages[].lora.dropout",
    "lora_target": "stages[].lora.targets",
    "lora_target_modules": "stages[].lora.targets",
    "target_modules": "stages[].lora.targets",
    "gradient_checkpointing": "parallel.recompute",
    "use_recompute": "parallel.recompute",
    "num_generations": "stages[].rollout.group_size",
    "max_completion_length": "stages[].rollout.max_new_tokens",
    "max_prompt_length": "stages[].rollout.max_prompt_tokens",
    "reward_funcs": "stages[].reward",
    "epsilon": "stages[].policy.clip_ratio",
    "epsilon_high": "stages[].policy.clip_ratio_high",
    "clip_ratio_c": "stages[].policy.dual_clip",
    "ppo_max_token_len_per_gpu": "stages[].micro_batch_tokens",
    "loss_agg_mode": "stages[].policy.aggregation",
    "importance_sampling_level": "stages[].policy.ratio",
    "num_iterations": "stages[].policy.update_epochs",
    "kl_coef": "stages[].policy.kl.coef",
    "init_kl_coef": "stages[].policy.kl.coef",
    "data_seed": "seed",
    "output_dir": _RUN_DIR,
    "logging_dir": _RUN_DIR,
    "overwrite_output_dir": _RUN_DIR,
    "run_name": "name",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "torch_dtype": _PRECISION,
    "dtype": _PRECISION,
    "report_to": "metrics",
    "use_wandb": "metrics",
    "wandb_project": "metrics",
    "logging_steps": "delete it: every step goes to metrics.jsonl",
    "deepspeed": _LAYOUT,
    "fsdp": _LAYOUT,
    "tensor_parallel_degree": _LAYOUT,
    "pipeline_parallel_degree": _LAYOUT,
    "expert_parallel_degree": "parallel.expert",
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "resume_from_checkpoint": "delete it: a run on the same --run-dir continues by itself",
    "load_in_4bit": "delete it: quantized weights cannot be trained here",
    "load_in_8bit": "delete it: quantized weights cannot be trained here",
    # Of earlier versions.
    "thinking": "delete it: the chat format is the model's own; for thinking: false write chat: "
    "{template: ernie_plain} beside model and tokenizer",
    "sandbox": "delete it: programs of a model always run in a sandbox",
}

# Kinds of a stage elsewhere -> the kind and the settings that are that algorithm.
FOREIGN_KINDS = {
    "rl": "write kind: upo",
    "rlhf": "write kind: upo",
    "grpo": "write kind: upo, which is GRPO unless its settings say otherwise",
    "dr_grpo": "write kind: upo with "
    "policy: {aggregation: constant, group_scale: none, normalize_rewards: none}",
    "dapo": "write kind: upo with policy: {clip_ratio_high: 0.28, minibatches: 2}",
    "gspo": "write kind: upo with policy: {ratio: sequence, minibatches: 2}",
    "cispo": "write kind: upo with policy: {objective: cispo, minibatches: 2}",
    "rloo": "write kind: upo with policy: {baseline: leave_one_out}",
    "ppo": "write kind: upo with critic: {optim: {lr: 1e-5}}",
}


# ---- versions ------------------------------------------------------------------------------------


def later_version(version: str) -> bool:
    """Return whether `version`, such as `0.3`, is later than this one."""
    return minor_version(version) > minor_version(__version__)


def version_advice(version: object) -> str | None:
    """Return what to tell of a recipe with mistakes that was written for an earlier version."""
    try:
        if not isinstance(version, str) or minor_version(version) >= minor_version(__version__):
            return None
    except ValueError:  # no version, as the schema tells
        return None
    return (
        f"version: the recipe was written for ernie_train {version}, this is {__version__}; "
        "CHANGELOG.md lists under each version what recipes must change"
    )


def minor_version(version: str) -> tuple[int, int]:
    """Return major and minor number of a version; raises `ValueError` if it is none."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def as_written_today(data: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe of an earlier version with what is refused today as it is now."""
    data.pop("sandbox", None)  # until 0.3 it had one value
    formats = []
    for stage in data.get("stages") or []:
        rollout = stage.get("rollout") or {}
        if rollout.get("truncated") == "punish" and not rollout.get("truncation_penalty"):
            rollout["truncated"] = "keep"
        policy = stage.get("policy") or {}
        if not stage.get("critic") and policy.get("group_scale") != "none":
            policy.pop("normalize_rewards", None)  # it had no effect
        if stage.get("kind") == "sft" and isinstance(stage.get("thinking"), bool):
            formats.append("ernie_thinking" if stage.pop("thinking") else "ernie_plain")
    if formats and not data.get("chat"):  # the last SFT stage chose the format
        data["chat"] = {"template": formats[-1]}
    return data
