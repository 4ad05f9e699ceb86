"""The probes of keys of RL stages, as in `recipe_probes.py`."""

from __future__ import annotations

from tests.run.recipe_probes import Probe

SOLVED = {"@rollout.skip_solved": {"rate": 0.5, "after": 1}, "@iterations": 2}
TWO_STEPS = {"@optim.lr": 0.05, "@policy.update_epochs": 2}
KL = {**TWO_STEPS, "@policy.kl": {"coef": 0.5}}
# Weights of what the policy itself sampled are 1 but for rounding, which a bound of 1 divides.
CORRECTED = {"@policy.sampler_correction": {"kind": "truncated", "bounds": [0, 1]}}
ONLINE = {"@preference": {"coef": 0.5, "pairs": "online"}}
SECOND = {"@preference.pair_reward": {"name": "exact", "share": 0.5}}
AUDITED = {"@audit_reward": {"python": "{root}/reward.py:other", "share": 0.5}}
HINTED = {
    "@data": [{"path": "{root}/train.jsonl", "max_examples": 12}],
    "@reward": {"python": "{root}/reward.py:closes"}, "@rollout.max_new_tokens": 40,
    "@preference": {"coef": 0.5, "pairs": "hint", "hint": {"share": 0.9, "samples": 8}},
}  # fmt: skip
OFFLINE = {
    "@preference": {
        "coef": 0.5, "pairs": "offline", "offline": {"prompts": 6, "per_iteration": 1}
    }
}  # fmt: skip
FILE_OF_PAIRS = {
    "@rollout.max_new_tokens": 40,
    "@preference": {
        "coef": 0.5, "pairs": "offline",
        "offline": {"path": "{root}/pairs.jsonl", "per_iteration": 1},
    }
}  # fmt: skip
CRITIC = {
    **TWO_STEPS,
    "@critic": {"optim": {"lr": 0.05, "schedule": "constant"}, "warmup_iterations": 0},
}
STARTED = {"kind": "vllm", "python": "python"}
LEVELS = {"@iterations": 3, "@curriculum": {"start": 1, "raise_at": 0.01}}
HELD_OUT = {
    "@evaluation": {"path": "{root}/two_tasks.jsonl", "every_iterations": 2}, "@iterations": 3
}  # fmt: skip
LONG_PROMPTS = {"@rollout.max_prompt_tokens": 500, "model.max_position_embeddings": 600}
TOOLS = {**LONG_PROMPTS, "@environment": {"tools": ["calculator"], "max_tool_tokens": 4}}

RL_PROBES: dict[str, Probe] = {
    "stages[] of kind upo.data": Probe("upo", {"@data": [{"path": "{root}/two_tasks.jsonl"}]}),
    "stages[].data[] of kind upo.path": Probe("upo", {"@data.0.path": "{root}/two_tasks.jsonl"}),
    "stages[].data[] of kind upo.format": Probe("upo", {"@data.0.format": "alpaca"}),
    "stages[].data[] of kind upo.without": Probe(
        "upo", {"@data.0.without": "{root}/two_tasks.jsonl"}
    ),
    "stages[].data[] of kind upo.weight": Probe(
        "upo", {"@data.1.weight": 3.0},
        {"@data": [{"path": "{root}/prompts.jsonl"}, {"path": "{root}/two_tasks.jsonl"}]},
    ),
    "stages[].data[] of kind upo.tasks": Probe(
        "upo", {"@data.0.tasks": ["product"]}, {"@data": [{"path": "{root}/two_tasks.jsonl"}]}
    ),
    "stages[].data[] of kind upo.max_examples": Probe("upo", {"@data.0.max_examples": 3}),
    "stages[].data[] of kind upo.columns": Probe("upo", {"@data.0.columns": {"task": "domain"}}),
    "stages[] of kind upo.reward": Probe("upo", {"@reward": "exact"}),
    **{
        f"stages[].reward.parts[].model.{name}": Probe(
            "upo", {f"@reward.model.{name}": value},
            {"@reward": {"model": {"path": "{root}/reward_model"}}}, observe,
        )
        for name, value, observe in (
            ("path", "{root}/reward_model2", "run"), ("normalize", False, "model_score"),
            ("clip", 0.01, "run"), ("batch_size", 3, "scored"),
        )
    },
    "stages[].reward.parts[].model": Probe(
        "upo", {"@reward": [{"name": "exact"}, {"model": {"path": "{root}/reward_model"}}]},
        {"@reward": [{"name": "exact"}]},
    ),
    "stages[].reward.parts": Probe("upo", {"@reward": {"parts": [{"name": "exact"}]}}),
    "stages[].reward.max_excluded_fraction": Probe(
        "upo", {"@reward.max_excluded_fraction": 1.0},
        {"@reward": {"parts": [{"python": "{root}/reward.py:raises"}]}},
    ),
    "stages[].reward.parts[].name": Probe("upo", {"@reward": "format"}, {"@reward": "exact"}),
    "stages[].reward.parts[].python": Probe(
        "upo", {"@reward": {"python": "{root}/reward.py:other"}}
    ),
    "stages[].reward.parts[].judge.rubric": Probe(
        "upo", {"rubric": [{"criterion": "is kind"}]}, {"model": "n"}, "judge"
    ),
    **{
        f"stages[].reward.parts[].judge.rubric[].{name}": Probe(
            "upo", {"rubric": [{"criterion": "is kind", name: value}]},
            {"rubric": [{"criterion": "is kind"}]}, "judge",
        )
        for name, value in {"criterion": "is short", "marks": 2.0, "reference": "please"}.items()
    },
    "stages[].reward.parts[].judge": Probe("upo", {}, observe="judge"),
    "stages[].reward.parts[].weight": Probe("upo", {"@reward.weight": 2.0}),
    "stages[].reward.parts[].timeout_s": Probe("upo", {"timeout_s": 3.0}, observe="deadline"),
    "stages[].reward.parts[].max_tokens": Probe(
        "upo", {"max_tokens": 1}, observe="format part"
    ),
    **{
        f"stages[].reward.parts[].judge.{name}": Probe("upo", {name: value}, observe="judge")
        for name, value in {
            "url": "http://other/v1", "model": "other", "api_key_env": "HOME", "timeout_s": 1.0,
            "retries": 1, "parallel": 3,
        }.items()
    },
    "stages[] of kind upo.iterations": Probe("upo", {"@iterations": 2}),
    "stages[] of kind upo.rollout": Probe("upo", {"@rollout.max_new_tokens": 5}),
    **{
        f"stages[].rollout.{name}": Probe("upo", {f"@rollout.{name}": value})
        for name, value in {
            "prompts_per_iteration": 2, "group_size": 2, "max_prompt_tokens": 29,
            "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.3, "top_k": 2,
            "max_logprob_mismatch": 1e-12, "dump": True, "truncated": "mask",
            "replay": "{root}/rollouts",
        }.items()
    },
    "stages[].rollout.overlong_tokens": Probe(
        "upo", {"@rollout.overlong_tokens": 5},
        {"@rollout.truncated": "ramp", "@rollout.truncation_penalty": 0.3,
         "@rollout.overlong_tokens": 2},
    ),
    "stages[].rollout.engine": Probe("upo", STARTED, observe="engine"),
    "stages[].rollout.engine.url": Probe(
        "upo", {"url": "http://there:2"}, {"kind": "vllm", "url": "http://here:1"}, "engine"
    ),
    **{
        f"stages[].rollout.engine.{name}": Probe("upo", {name: value}, STARTED, "engine")
        for name, value in {
            "kind": "fastdeploy", "python": "other", "args": ["--enforce-eager"],
            "gpus": [1], "dtype": "bfloat16", "directory": "{root}/elsewhere", "parallel": 3,
            "sleep": True, "timeout_s": 5.0, "start_timeout_s": 6.0,
        }.items()
    },
    "stages[].rollout.batch_size": Probe("upo", {"@rollout.batch_size": 2}, observe="batches"),
    "stages[] of kind upo.micro_batch_tokens": Probe("upo", {"@micro_batch_tokens": 70}),
    "stages[] of kind upo.measured_completions": Probe("upo", {"@measured_completions": 2}),
    "stages[] of kind upo.share_prompts": Probe("upo", {"@share_prompts": True}),
    "stages[].rollout.skip_solved": Probe(
        "upo", {"@rollout.skip_solved": {"after": 1}}, {**SOLVED, "@rollout.skip_solved": None}
    ),
    **{
        f"stages[].rollout.skip_solved.{name}": Probe(
            "upo", {f"@rollout.skip_solved.{name}": value}, SOLVED
        )
        for name, value in {"rate": 1.0, "after": 9, "revisit": 1}.items()
    },
    "stages[].rollout.refill_rounds": Probe(
        "upo", {"@rollout.refill_rounds": 2}, {"@rollout.group_size": 2}
    ),
    "stages[].rollout.truncation_penalty": Probe(
        "upo", {"@rollout.truncation_penalty": 2.0},
        {"@rollout.truncated": "punish", "@rollout.truncation_penalty": 0.1},
    ),
    "stages[] of kind upo.policy": Probe("upo", {"@policy": {"minibatches": 2}}),
    **{
        f"stages[].policy.{name}": Probe("upo", {f"@policy.{name}": value}, TWO_STEPS)
        for name, value in {
            "coef": 0.5, "clip_ratio": 0.001, "clip_ratio_high": 0.001, "dual_clip": 1.001,
            "entropy_coef": 0.1, "kl": {"coef": 0.5}, "update_epochs": 1, "minibatches": 2,
            "group_scale": "none", "objective": "cispo", "ratio": "sequence",
            "aggregation": "constant", "baseline": "leave_one_out", "router_replay": True,
        }.items()
    },
    "stages[].policy.sampler_correction": Probe(
        "upo", {"@policy.sampler_correction": {"kind": "truncated"}}
    ),
    **{
        f"stages[].policy.sampler_correction.{name}": Probe(
            "upo", {f"@policy.sampler_correction.{name}": value}, CORRECTED
        )
        for name, value in
        {"kind": "masked", "level": "sequence", "bounds": [0.0, 2.0]}.items()
    },
    "stages[].policy.normalize_rewards": Probe(
        "upo", {"@policy.normalize_rewards": "none"}, CRITIC
    ),
    **{
        f"stages[].policy.kl.{name}": Probe("upo", {f"@policy.kl.{name}": value}, KL)
        for name, value in {"coef": 0.1, "kind": "k2", "place": "reward"}.items()
    },
    "stages[] of kind upo.preference": Probe("upo", ONLINE),
    "stages[].preference.coef": Probe("upo", {"@preference.coef": 0.1}, ONLINE),
    "stages[].preference.pairs": Probe("upo", {"@preference.pairs": "both"}, OFFLINE),
    "stages[].preference.margin": Probe(
        "upo", {"@preference.margin": 0.6},
        {**ONLINE, "@reward": {"python": "{root}/reward.py:half"}},
    ),
    **{
        f"stages[].preference.{name}": Probe("upo", {f"@preference.{name}": value}, ONLINE)
        for name, value in {
            "beta": 0.5, "loss": "ipo", "length_normalize": False, "rpo_alpha": 0.5,
        }.items()
    },
    "stages[].preference.simpo_gamma": Probe(
        "upo", {"@preference.simpo_gamma": 0.9}, {**ONLINE, "@preference.loss": "simpo"}
    ),
    "stages[].preference.reference": Probe(
        "upo", {"@preference.reference": "last_iteration"}, {**ONLINE, "@iterations": 2}
    ),
    "stages[].preference.pair_reward": Probe("upo", SECOND, ONLINE),
    "stages[].preference.hint": Probe(
        "upo", {"@preference.hint": {"share": 0.1, "samples": 1}}, HINTED
    ),
    "stages[].preference.hint.share": Probe("upo", {"@preference.hint.share": 0.1}, HINTED),
    "stages[].preference.hint.samples": Probe("upo", {"@preference.hint.samples": 1}, HINTED),
    "stages[] of kind upo.audit_reward": Probe("upo", AUDITED),
    "stages[].audit_reward.share": Probe("upo", {"@audit_reward.share": 1.0}, AUDITED),
    "stages[].audit_reward.parts": Probe(
        "upo", {"@audit_reward": {"parts": [{"name": "exact"}], "share": 0.5}}, AUDITED
    ),
    "stages[].audit_reward.max_excluded_fraction": Probe(
        "upo", {"@audit_reward.max_excluded_fraction": 1.0},
        {"@audit_reward": {"parts": [{"python": "{root}/reward.py:raises"}], "share": 1.0}},
    ),
    "stages[].preference.offline": Probe("upo", FILE_OF_PAIRS, OFFLINE),
    "stages[].preference.offline.path": Probe(
        "upo", {"@preference.offline.path": "{root}/pairs2.jsonl"}, FILE_OF_PAIRS
    ),
    "stages[].preference.offline.columns": Probe(
        "upo", {"@preference.offline.columns": {"prompt": "chosen"}}, FILE_OF_PAIRS
    ),
    "stages[].preference.offline.prompts": Probe(
        "upo", {"@preference.offline.prompts": 3}, OFFLINE
    ),
    "stages[].preference.offline.per_iteration": Probe(
        "upo", {"@preference.offline.per_iteration": 2}, FILE_OF_PAIRS
    ),
    "stages[] of kind upo.critic": Probe("upo", {"@critic": CRITIC["@critic"]}),
    "stages[].critic.optim": Probe("upo", {"@critic.optim": {"lr": 0.01}}, CRITIC),
    "stages[].critic.gamma": Probe("upo", {"@critic.gamma": 0.5}, CRITIC),
    "stages[].critic.lam": Probe("upo", {"@critic.lam": 0.1}, {**CRITIC, "@iterations": 2}),
    "stages[].critic.policy_lam": Probe("upo", {"@critic.policy_lam": 0.1}, CRITIC),
    "stages[].critic.path": Probe(
        "upo", {"@critic.path": "{root}/with_critic/01-u/checkpoints/step_000001"}, CRITIC
    ),
    "stages[].critic.clip_range": Probe("upo", {"@critic.clip_range": 1e-4}, CRITIC),
    "stages[].critic.warmup_iterations": Probe(
        "upo", {"@critic.warmup_iterations": 1}, {**CRITIC, "@iterations": 2}
    ),
    "stages[] of kind upo.curriculum": Probe("upo", {"@curriculum": {"start": 2}}),
    "stages[].curriculum.start": Probe("upo", {"@curriculum.start": 2}, LEVELS),
    "stages[].curriculum.raise_at": Probe("upo", {"@curriculum.raise_at": 1.0}, LEVELS),
    "stages[] of kind upo.evaluation": Probe("upo", HELD_OUT, {"@iterations": 3}),
    "stages[].evaluation.path": Probe(
        "upo", {"@evaluation.path": "{root}/test.jsonl"}, HELD_OUT
    ),
    "stages[].evaluation.columns": Probe(
        "upo", {"@evaluation.columns": {"task": "domain"}}, HELD_OUT
    ),
    "stages[].evaluation.every_iterations": Probe(
        "upo", {"@evaluation.every_iterations": 1}, HELD_OUT
    ),
    "stages[].evaluation.max_examples": Probe(
        "upo", {"@evaluation.max_examples": 1}, HELD_OUT, "problems"
    ),
    "stages[].evaluation.tasks": Probe("upo", {"@evaluation.tasks": ["product"]}, HELD_OUT),
    "stages[].evaluation.samples": Probe(
        "upo", {"@evaluation.samples": 2},
        {**HELD_OUT, "@evaluation.temperature": 1.0},
    ),
    "stages[].evaluation.temperature": Probe(
        "upo", {"@evaluation.temperature": 1.0}, HELD_OUT, "problems"
    ),
    "stages[] of kind upo.environment": Probe("upo", TOOLS, LONG_PROMPTS),
    "stages[].environment.tools": Probe(
        "upo", {"@environment.tools": ["calculator", "python"]}, TOOLS
    ),
    "stages[].environment.tools[].python": Probe(
        "upo", {"@environment.tools": [{"python": "{root}/other_tools.py"}]},
        {**TOOLS, "@environment.tools": [{"python": "{root}/my_tools.py"}]},
    ),
    **{
        f"stages[].environment.{name}": Probe("upo", {name: value}, observe="episode")
        for name, value in {
            "max_turns": 2, "max_tool_seconds": 0.2, "max_tool_tokens": 3
        }.items()
    },
    "stages[] of kind upo.canaries": Probe("upo", {"@canaries": 4}),
    "stages[] of kind upo.samples_per_iteration": Probe("upo", {"@samples_per_iteration": 2}),
    "stages[] of kind upo.term_norms_every": Probe("upo", {"@term_norms_every": 1}),
}  # fmt: skip
