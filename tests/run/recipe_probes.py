"""For each key of a recipe a small run, and the change of this key alone that its outcome shows.

`@` stands for `stages.0.`, `{root}` for the directory of the test's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Changes = dict[str, Any]
REMOVED = "(removed)"


@dataclass(frozen=True)
class Probe:
    """A run of `base` with the settings `given`, against the same with `changed` as well."""

    base: str
    changed: Changes
    given: Changes = field(default_factory=dict)
    observe: str = "run"


VALIDATION = {"@validation": [{"path": "{root}/validation.jsonl"}]}
BEST = {
    **VALIDATION, "@steps": 3, "@optim.lr": 0.02, "@checkpoint.best_metric": "validation_loss",
    "@checkpoint.best_is": "higher",
}  # fmt: skip
ONE_STEP = {
    "kind": "sft", "data": [{"path": "{root}/train.jsonl", "max_examples": 12}], "seq_len": 64,
    "steps": 1, "micro_batch_size": 1, "optim": {"lr": 3e-3},
}  # fmt: skip
TWO_STAGES = {"stages": [{**ONE_STEP, "name": name} for name in ("s", "t")]}
GATED = {"@gate": {"metric": "eval/math", "at_least": 0.5}}
PHASES = [
    {"rope_theta": 1e6, "seq_len": 32, "steps": 1},
    {"rope_theta": 2e6, "seq_len": 64, "steps": 2},
]
PHASED = {
    "@kind": "pretrain", "@data": [{"path": "{root}/texts.jsonl"}],
    "@seq_len": REMOVED, "@steps": REMOVED, "@rope_schedule": PHASES,
}  # fmt: skip
EXPORT = {"export": {"dtype": "float32"}}
QUANTIZED = {"export": {"dtype": "float32", "quantize": {"to": "int4", "group_size": 16}}}
EPOCHS = {"@steps": REMOVED, "@epochs": 1}
DIALOGUES = {"@data": [{"path": "{root}/dialogues.jsonl"}], "@seq_len": 160}
OTHER_COLUMNS = {"@data.0.path": "{root}/other_columns.jsonl"}
SAMPLED = {"evaluation.temperature": 1.0}
FEW_SHOT = {"evaluation.few_shot": "{root}/train.jsonl", "model.max_position_embeddings": 600}
SAME = {"columns": {"answer": "answer"}}

PROBES: dict[str, Probe] = {
    # ---- the recipe
    "name": Probe("sft", {"name": "other"}, observe="directory"),
    "seed": Probe("sft", {"seed": 6}),
    "version": Probe("sft", {"version": "9.0"}),
    "model": Probe("sft", {"model.moe_k": 1}),
    "model.preset": Probe("sft", {"model": {"preset": "mini"}}, observe="model"),
    "model.path": Probe("sft", {"model": {"path": "{root}/of_base"}}),
    "tokenizer": Probe("sft", {"tokenizer": {"path": "{root}/tokenizer2"}}),
    "tokenizer.path": Probe("sft", {"tokenizer.path": "{root}/tokenizer2"}),
    "tokenizer.stand_in": Probe(
        "sft", {"tokenizer.stand_in": "{root}/tokenizer"}, {"tokenizer.path": "gone"}, "check"
    ),
    "tokenizer.add": Probe("sft", {"tokenizer.add": ["<step>"]}),
    "chat": Probe("sft", {"chat": {"template": "ernie_plain"}}),
    "chat.template": Probe("sft", {"chat.template": "ernie_plain"}),
    "chat.history_reasoning": Probe("sft", {"chat.history_reasoning": "keep"}, DIALOGUES),
    "chat.control_tokens": Probe(
        "sft",
        {"chat.control_tokens": "refuse"},
        {"@data": [{"path": "{root}/control.jsonl"}]},
    ),
    "chat.date": Probe(
        "sft",
        {"chat.date": "2026-01-05"},
        {"chat.template": "{root}/dated.jinja", "chat.date": "2025-12-31"},
    ),
    "device": Probe("sft", {"device": "gpu"}, {"device": "cpu"}),
    "parallel": Probe("sft", {"parallel": {"data": 2}}),
    "parallel.expert": Probe("sft", {"parallel.expert": 2}),
    "parallel.data": Probe("sft", {"parallel.data": 2}),
    "parallel.sharding": Probe("sft", {"parallel.sharding": True}),  # refused on one rank
    "parallel.recompute": Probe("sft", {"parallel.recompute": True}, observe="passes"),
    "parallel.recompute.parts": Probe(
        "sft", {"parallel.recompute": {"parts": ["experts"]}}, {"parallel.recompute": {}}, "passes"
    ),
    "parallel.recompute.layers": Probe(
        "sft", {"parallel.recompute.layers": 1}, {"parallel.recompute": {}}, "passes"
    ),
    "parallel.recompute.chunk_tokens": Probe(
        "sft", {"parallel.recompute.chunk_tokens": 8}, {"parallel.recompute": {}}, "passes"
    ),
    "metrics": Probe("sft", {"metrics": ["visualdl", "tensorboard"]}),
    "metrics[].python": Probe(
        "sft",
        {"metrics": [{"python": "{root}/logger.py:Writes"}]},
        {"metrics": [{"python": "{root}/logger.py:Quiet"}]},
    ),
    "stages": Probe("sft", {"stages.0.name": "first"}),
    "evaluation": Probe("sft", {"evaluation": {"path": "{root}/test.jsonl", "max_new_tokens": 4}}),
    "export": Probe("sft", {"export": {"dtype": "float32"}}),
    "export.dtype": Probe("sft", {"export.dtype": "bfloat16"}, {"export": {"dtype": "float32"}}),
    "export.quantize": Probe("sft", {"export.quantize": {"to": "int8"}}, EXPORT),
    "export.quantize.to": Probe(
        "sft", {"export.quantize.to": "int8", "export.quantize.group_size": None}, QUANTIZED
    ),
    "export.quantize.method": Probe("sft", {"export.quantize.method": "rtn"}, QUANTIZED),
    "export.quantize.group_size": Probe("sft", {"export.quantize.group_size": 8}, QUANTIZED),
    "export.quantize.calibration_tokens": Probe(
        "sft", {"export.quantize.calibration_tokens": 90}, QUANTIZED
    ),
    "export.max_shard_size": Probe(
        "sft", {"export.max_shard_size": "50KB"}, {"export": {"dtype": "float32"}}
    ),
    "evaluation.path": Probe("evaluated", {"evaluation.path": "{root}/two_tasks.jsonl"}),
    "evaluation.columns": Probe("evaluated", {"evaluation.columns": {"task": "domain"}}),
    "evaluation.max_new_tokens": Probe("evaluated", {"evaluation.max_new_tokens": 5}),
    "evaluation.batch_size": Probe("evaluated", {"evaluation.batch_size": 3}, observe="batches"),
    "evaluation.max_examples": Probe("evaluated", {"evaluation.max_examples": 2}),
    "evaluation.untrained_examples": Probe("evaluated", {"evaluation.untrained_examples": 2}),
    "evaluation.environment": Probe(  # its tools make prompts longer than the model can read
        "evaluated", {"evaluation.environment": {"tools": ["calculator"], "max_tool_tokens": 2}}
    ),
    "evaluation.samples": Probe("evaluated", {"evaluation.samples": 2}, SAMPLED),
    "evaluation.temperature": Probe("evaluated", {"evaluation.temperature": 1.0}),
    "evaluation.k": Probe("evaluated", {"evaluation.k": [2]}, {**SAMPLED, "evaluation.samples": 3}),
    "evaluation.few_shot": Probe("evaluated", FEW_SHOT),
    # so many examples leave a prompt no room
    "evaluation.shots": Probe("evaluated", {"evaluation.shots": 30}, FEW_SHOT),
    "evaluation.after_each_stage": Probe("evaluated", {"evaluation.after_each_stage": True}),
    # ---- every stage
    "stages[].name": Probe("sft", {"@name": "other"}),
    "stages[].kind": Probe("sft", {"@kind": "pretrain"}),
    "stages[].micro_batch_size": Probe("sft", {"@micro_batch_size": 2}),
    "stages[].optim": Probe("sft", {"@optim": {"lr": 1e-3}}),
    "stages[].optim.lr": Probe("sft", {"@optim.lr": 1e-3}),
    "stages[].optim.min_lr": Probe("sft", {"@optim.min_lr": 1e-3}),
    "stages[].optim.schedule": Probe("sft", {"@optim.schedule": "constant"}),
    "stages[].optim.warmup_steps": Probe("sft", {"@optim.warmup_steps": 2}),
    "stages[].optim.decay_fraction": Probe(
        "sft",
        {"@optim.decay_fraction": 1.0},
        {"@optim": {"lr": 3e-3, "schedule": "wsd", "decay_fraction": 0.1}},
    ),
    "stages[].optim.weight_decay": Probe("sft", {"@optim.weight_decay": 0.5}),
    "stages[].optim.beta1": Probe("sft", {"@optim.beta1": 0.5}),
    "stages[].optim.beta2": Probe("sft", {"@optim.beta2": 0.5}),
    "stages[].optim.eps": Probe("sft", {"@optim.eps": 1e-2}),
    "stages[].optim.clip_grad_norm": Probe("sft", {"@optim.clip_grad_norm": None}),
    "stages[].optim.gradient_dtype": Probe(
        "sft", {"@optim.gradient_dtype": "bfloat16"}, observe="gradients"
    ),
    "stages[].balance": Probe("sft", {"@balance": {"z_loss_coef": 0.1}}),
    "stages[].balance.orthogonal_coef": Probe("sft", {"@balance.orthogonal_coef": 0.1}),
    "stages[].balance.orthogonal_mode": Probe(
        "sft", {"@balance.orthogonal_mode": "decoupled"}, {"@balance": {"orthogonal_coef": 0.1}}
    ),
    "stages[].balance.load_balance_coef": Probe("sft", {"@balance.load_balance_coef": 0.1}),
    "stages[].balance.load_balance_type": Probe(
        "sft",
        {"@balance.load_balance_type": "global_aux_loss"},
        {"@balance": {"load_balance_coef": 0.1}, "@grad_accum_steps": 2},
    ),
    "stages[].balance.z_loss_coef": Probe("sft", {"@balance.z_loss_coef": 0.1}),
    "stages[].balance.bias_update_rate": Probe("sft", {"@balance.bias_update_rate": 0.1}),
    "stages[].moe_health": Probe("sft", {"@moe_health": {"layers_every_steps": 1}}),
    "stages[].moe_health.layers_every_steps": Probe("sft", {"@moe_health.layers_every_steps": 1}),
    "stages[].moe_health.probe_every_steps": Probe("sft", {"@moe_health.probe_every_steps": 1}),
    "stages[].moe_health.probe_tokens": Probe(
        "sft",
        {"@moe_health.probe_tokens": 3},
        {"@moe_health": {"probe_every_steps": 1}, "@optim.lr": 0.1},
    ),
    "stages[].moe_health.warn_load_max": Probe(
        "sft", {"@moe_health.warn_load_max": 1.01}, {"@moe_health": {"warn_after_steps": 1}}
    ),
    "stages[].moe_health.warn_after_steps": Probe(
        "sft", {"@moe_health.warn_after_steps": 1}, {"@moe_health": {"warn_load_max": 1.01}}
    ),
    "stages[].checkpoint": Probe("sft", {"@checkpoint": {"every_steps": 1}}),
    "stages[].checkpoint.every_steps": Probe(
        "sft", {"@checkpoint.every_steps": 2}, {"@checkpoint.keep_last": 5}
    ),
    "stages[].checkpoint.keep_last": Probe("sft", {"@checkpoint.keep_last": 2}),
    "stages[].checkpoint.best_metric": Probe(
        "sft",
        {"@checkpoint.best_metric": "validation_loss"},
        {**BEST, "@checkpoint.best_metric": None},
    ),
    "stages[].checkpoint.best_is": Probe("sft", {"@checkpoint.best_is": "lower"}, BEST),
    "stages[].checkpoint.load_best_at_end": Probe(
        "sft", {"@checkpoint.load_best_at_end": True}, BEST
    ),
    "stages[].checkpoint.early_stopping_patience": Probe(
        "sft",
        {"@checkpoint.early_stopping_patience": 1},
        {**BEST, "@checkpoint.best_is": "higher"},
    ),
    "stages[].checkpoint.keep_optimizer": Probe(
        "sft", {"@checkpoint.keep_optimizer": True}, TWO_STAGES
    ),
    "stages[].checkpoint.max_shard_size": Probe("sft", {"@checkpoint.max_shard_size": "50KB"}),
    "stages[].max_bad_fraction": Probe(
        "sft", {"@max_bad_fraction": 0.5}, {"@data": [{"path": "{root}/bad.jsonl"}]}
    ),
    "stages[].gate": Probe("gated", {"@gate": None}, GATED),
    "stages[].gate.metric": Probe("gated", {"@gate.metric": "eval/mean"}, GATED),
    "stages[].gate.at_least": Probe("gated", {"@gate.at_least": 0.0}, GATED),
    "stages[].gate.max_regression": Probe("gated", {"max_regression": 0.1}, observe="gate"),
    "stages[].lora": Probe("sft", {"@lora": {"rank": 4}}),
    **{
        f"stages[].lora.{name}": Probe("sft", {f"@lora.{name}": value}, {"@lora": {"rank": 4}})
        for name, value in {
            "rank": 2,
            "alpha": 3.0,
            "dropout": 0.5,
            "targets": ["q_proj"],
            "rslora": True,
            "dora": True,
        }.items()
    },
    "stages[].train": Probe("sft", {"@train": ["q_proj"]}),
    "stages[].freeze": Probe("sft", {"@freeze": ["experts"]}),
    # ---- pre-training and SFT
    "stages[] of kind pretrain, sft.data": Probe(
        "sft", {"@data": [{"path": "{root}/validation.jsonl"}]}
    ),
    "stages[] of kind pretrain, sft.validation": Probe("sft", VALIDATION),
    "stages[] of kind pretrain, sft.grad_accum_steps": Probe("sft", {"@grad_accum_steps": 2}),
    "stages[] of kind pretrain, sft.validate_every_steps": Probe(
        "sft", {"@validate_every_steps": 1}, {**VALIDATION, "@checkpoint.every_steps": 2}
    ),
    "stages[] of kind pretrain, sft.seq_len": Probe("sft", {"@seq_len": 128}),
    "stages[] of kind pretrain, sft.epochs": Probe("sft", {"@epochs": 2}, EPOCHS),
    "stages[] of kind pretrain, sft.steps": Probe("sft", {"@steps": 3}),
    "stages[] of kind pretrain, sft.rope_schedule": Probe("sft", PHASED),
    "stages[].data[].path": Probe("sft", {"@data.0.path": "{root}/validation.jsonl"}),
    "stages[].data[].weight": Probe("sft", {"@data.0.weight": 2.0}, EPOCHS),
    "stages[].data[].format": Probe("sft", {"@data.0.format": "alpaca"}),
    "stages[].data[].max_examples": Probe("sft", {"@data.0.max_examples": 3}),
    "stages[].data[].without": Probe("sft", {"@data.0.without": "{root}/validation.jsonl"}),
    "stages[].data[].include_thinking": Probe("sft", {"@data.0.include_thinking": False}),
    "stages[].data[].overlong": Probe(
        "sft", {"@data.0.overlong": "truncate"}, {"@seq_len": 45, "@data.0.overlong": "drop"}
    ),
    "stages[].data[].columns": Probe(
        "sft", {"@data.0.columns": {"prompt": "q", "completion": "a"}}, OTHER_COLUMNS
    ),
    "stages[].data[].columns.column": Probe(
        "sft",
        {"columns": {"prompt": "a", "completion": {"column": "a"}}},
        {"columns": {"prompt": "a", "completion": {"column": "q"}}},
        "rows",
    ),
    "stages[].data[].columns.after": Probe(
        "sft",
        {"columns": {"prompt": "q", "completion": {"column": "a", "after": "#"}}},
        {"columns": {"prompt": "q", "completion": {"column": "a"}}},
        "rows",
    ),
    "stages[].data[].columns.value": Probe(
        "sft",
        {"columns": {"prompt": "q", "completion": {"value": "no"}}},
        {"columns": {"prompt": "q", "completion": {"value": "yes"}}},
        "rows",
    ),
    **{
        f"stages[].rope_schedule[].{name}": Probe("sft", {f"@rope_schedule.1.{name}": v}, PHASED)
        for name, v in {
            "rope_theta": 5e6,
            "seq_len": 60,
            "steps": 3,
            "transition": "smooth",
            "micro_batch_size": 2,
            "upsample": {"longer_than": 44, "factor": 9.0},
        }.items()
    },
    "stages[].rope_schedule[].tokens": Probe(
        "sft", {"@rope_schedule.1.tokens": 500, "@rope_schedule.1.steps": REMOVED}, PHASED
    ),
    **{
        f"stages[].rope_schedule[].upsample.{name}": Probe(
            "sft",
            {f"@rope_schedule.1.upsample.{name}": value},
            {**PHASED, "@rope_schedule.1.upsample": {"longer_than": 44, "factor": 2.0}},
        )
        for name, value in {"longer_than": 20, "factor": 9.0}.items()
    },
    "stages[] of kind sft.normalization": Probe("sft", {"@normalization": "token_balanced"}),
    "stages[] of kind sft.train_turns": Probe("sft", {"@train_turns": "last"}, DIALOGUES),
    "stages[] of kind sft.train_reasoning": Probe("sft", {"@train_reasoning": False}),
    # ---- pairs
    "stages[] of kind dpo, reward.data": Probe("dpo", {"@data": "{root}/pairs2.jsonl"}),
    "stages[] of kind dpo, reward.columns": Probe("dpo", {"@columns": {"prompt": "chosen"}}),
    "stages[] of kind dpo, reward.without": Probe("dpo", {"@without": "{root}/asked.jsonl"}),
    "stages[] of kind dpo, reward.seq_len": Probe("dpo", {"@seq_len": 50}),
    "stages[] of kind dpo, reward.steps": Probe("dpo", {"@steps": 1}),
    "stages[] of kind dpo, reward.pairs_per_step": Probe("dpo", {"@pairs_per_step": 3}),
    **{
        f"stages[] of kind dpo.{name}": Probe("dpo", {f"@{name}": value})
        for name, value in {
            "beta": 0.5,
            "loss": "ipo",
            "length_normalize": True,
            "rpo_alpha": 0.5,
        }.items()
    },
    "stages[] of kind dpo, reward.validation": Probe("dpo", {"@validation": "{root}/pairs2.jsonl"}),
    "stages[] of kind dpo, reward.validate_every_steps": Probe(
        "dpo",
        {"@validate_every_steps": 1},
        {"@validation": "{root}/pairs2.jsonl", "@checkpoint.every_steps": 2},
    ),
    "stages[] of kind dpo.simpo_gamma": Probe("dpo", {"@simpo_gamma": 0.9}, {"@loss": "simpo"}),
    # ---- reward models
    "stages[] of kind reward.center_coef": Probe("reward", {"@center_coef": 0.5}),
}
