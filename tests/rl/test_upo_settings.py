"""Settings of RL and DPO stages: what contradicts is refused, what acts is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ernie_train.rl.config import UpoConfig
from ernie_train.rl.dpo import DpoConfig
from tests.rl.upo_stages import OFFLINE_ONLY, ONLINE, merged, stage

CRITIC = {"optim": {"lr": 1e-3}, "warmup_iterations": 0}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout": {"group_size": 1}}, "rollout.group_size must be at least 2"),
        ({"preference": {"coef": 0.1}}, "preference.pairs\n  Field required"),
        ({"preference": {**ONLINE, "margin": 1.5}}, "is never met"),
        ({"preference": {"coef": 0.1, "pairs": ["online", "gold"], "margin": 1.5,
                         "pair_reward": {"name": "exact", "weight": 2}}}, "is never met"),
        ({"preference": {"coef": 0.1, "pairs": "shorter", "margin": 0.9}}, "margin has no effect"),
        ({"policy": {"coef": 0.0, "group_scale": "none"}, "preference": ONLINE},
         "group_scale: no effect with coef: 0"),
        ({"policy": {"coef": 0.0, "normalize_rewards": "domain"}, "preference": ONLINE},
         "normalize_rewards: no effect with coef: 0"),
        ({"audit_reward": {"name": "exact", "weight": 0.5, "share": 0.5}}, "give both the same"),
        ({"rollout": {"engine": {"kind": "vllm"}, "replay": "x"}}, "nothing is sampled"),
        ({"rollout": {"engine": {"kind": "vllm"}, "batch_size": 8}}, "of our own sampler"),
        ({"rollout": {"engine": {"kind": "vllm"}, "batch_size": 8},
          "evaluation": {"path": "x", "every_iterations": 2}}, "of our own sampler"),
        ({"rollout": {"engine": {"kind": "fastdeploy", "python": "p"}},
          "policy": {"router_replay": True}}, "which fastdeploy does not give"),
        ({"policy": {"minibatches": 7}}, "minibatches=7 is more than the 6 groups"),
        ({"policy": {"minibatches": 7}, "rollout": {"refill_rounds": 1}}, "than the 6 groups"),
        ({"policy": {"minibatches": 9}, "preference": {"coef": 0.1, "pairs": "offline",
          "offline": {"path": "x", "per_iteration": 2}}}, "than the 8 groups and offline pairs"),
        *(({"policy": {"minibatches": 1, **policy}}, f"policy.{name} has no effect with one optim")
          for name, policy in {"clip_ratio": {"clip_ratio": 0.1}, "ratio": {"ratio": "sequence"},
                               "clip_ratio_high": {"clip_ratio_high": 0.3},
                               "dual_clip": {"dual_clip": 2.0}}.items()),
        *(({"policy": {"minibatches": 2, "dual_clip": 2.0, **policy}}, "dual_clip has no effect")
          for policy in ({"objective": "cispo"}, {"ratio": "sequence"})),
        ({"policy": {"minibatches": 1}, "critic": {**CRITIC, "clip_range": 0.1}},
         "critic.clip_range has no effect with one optimizer step"),
        ({"policy": {"kl": {"coef": 0.0, "place": "reward"}}}, "no effect with coef: 0"),
        ({"policy": {"kl": {"coef": 0.0, "kind": "k2"}}}, "no effect with coef: 0"),
        *(({"rollout": {"replay": "x", **rollout}, **changes}, f"{name} has no effect with rollout")
          for name, rollout, changes in [
              ("rollout.refill_rounds", {"refill_rounds": 1}, {}),
              ("rollout.top_p", {"top_p": 0.9}, {}),
              ("rollout.top_k", {"top_k": 5}, {}),
              ("rollout.batch_size", {"batch_size": 8}, {}),
              ("curriculum", {}, {"curriculum": {}}),
              ("audit_reward", {}, {"audit_reward": {"name": "exact", "share": 0.5}}),
          ]),
        *(({**OFFLINE_ONLY, "rollout": {"prompts_per_iteration": None, name: value}},
           f"rollout.{name} has no effect where iterations sample nothing")
          for name, value in
          {"refill_rounds": 1, "skip_solved": {}, "dump": True, "replay": "x"}.items()),
        ({**OFFLINE_ONLY, "audit_reward": "exact", "rollout": {"prompts_per_iteration": None}},
         "audit_reward has no effect where"),
        ({**OFFLINE_ONLY, "curriculum": {"raise_at": 0.5}}, "curriculum.raise_at has no effect"),
        ({"audit_reward": {"name": "exact", "share": 0.01}}, "share=0.01 of the stage's 24 groups"),
        ({"preference": {**ONLINE, "pair_reward": {"name": "exact", "share": 0.01}}},
         "pair_reward.share=0.01 of the stage's 24 groups"),
        ({"measured_completions": 24}, "as an iteration has 24 completions at most"),
        ({"measured_completions": 8, "critic": CRITIC}, "measured_completions has no effect with"),
        ({**OFFLINE_ONLY, "measured_completions": 8}, "measured_completions has no effect where"),
        ({"micro_batch_tokens": 72}, "holds less than a sequence of rollout"),
        ({"micro_batch_tokens": 584}, "micro_batch_tokens=584 has no effect"),
        ({"micro_batch_tokens": 145, "preference": ONLINE}, "holds less than the two of a pair"),
        ({"share_prompts": True, "micro_batch_size": 1}, "no effect with micro_batch_size=1"),
        ({"share_prompts": True, "critic": CRITIC, "rollout": {"group_size": 1}},
         "no effect with rollout.group_size=1"),
        ({"environment": {"tools": ["calculator"], "max_tool_tokens": 4},
          "preference": {"coef": 0.1, "pairs": "hint"}}, "pairs: hint needs a solution of one"),
        ({"environment": {"tools": ["calculator"], "max_tool_tokens": 4},
          "preference": {**ONLINE, "pairs": ["online", "gold"]}}, "pairs: gold .* environment"),
        ({"preference": {"coef": 0.1, "pairs": "offline"}}, "needs offline: where they come from"),
        ({"preference": ONLINE, "micro_batch_size": 1}, "micro_batch_size of at least 2"),
        ({"critic": CRITIC, "policy": {"group_scale": "none"}}, "no effect beside a critic"),
        ({"critic": CRITIC, "policy": {"baseline": "mean"}}, "policy.baseline has no effect"),
        ({"critic": CRITIC, "policy": {"coef": 0.0}, "preference": ONLINE}, "critic has no effect"),
        ({"policy": {"kl": {"coef": 0.1, "kind": "k1"}}}, "no useful gradient in the loss"),
        *(({"policy": {"kl": {"coef": 0.1, "kind": kind, "place": "reward"}}},
           f"kind='{kind}' in the reward hardly pulls") for kind in ("k2", "k3")),
        ({"critic": {"optim": {"lr": 1e-3}}}, "warmup_iterations=5 leaves none of iterations=4"),
        ({"reward": None}, "reward\n  Field required"),
        ({"data": None}, "data\n  Field required"),
        ({"rollout": {"prompts_per_iteration": None}}, "prompts_per_iteration must be given"),
        ({"reward": "mathh"}, "unknown reward 'mathh'"),
        ({"policy": {"coef": 0.0}}, "nothing would be learnt"),
        ({"rollout": {"truncated": "mask", "truncation_penalty": 0.5}},
         "no effect with truncated: mask"),
        ({"rollout": {"truncation_penalty": 0.5}}, "no effect with truncated: keep"),
        ({"rollout": {"truncated": "punish"}}, "give a penalty, such as 0.5, or say truncated: k"),
        ({"rollout": {"truncated": "ramp", "overlong_tokens": 2}}, "ramp takes .* which is 0"),
        ({"rollout": {"truncated": "ramp", "truncation_penalty": 1}}, "give how many, such as 1"),
        ({"rollout": {"truncated": "ramp", "truncation_penalty": 1, "overlong_tokens": 11}},
         "the last overlong_tokens of max_new_tokens=10"),
        ({"rollout": {"overlong_tokens": 2}}, "overlong_tokens has no effect with truncated: keep"),
        ({"preference": {**ONLINE, "margin": 0}}, "greater than 0"),
        ({"preference": {**ONLINE, "offline": {"prompts": 4, "per_iteration": 1}}},
         "no effect without pairs"),
        ({"preference": {**ONLINE, "pairs": ["gold", "hint"]}}, "all wrong: name one"),
        ({"preference": {**ONLINE, "pairs": ["gold", "gold"]}}, "names a source twice"),
        ({"preference": {**ONLINE, "pairs": []}}, "at least 1 item"),
        ({"preference": {**ONLINE, "pairs": "golden"}}, "'gold', 'hint' or 'shorter'"),
        ({"preference": {**ONLINE, "hint": {"share": 0.3}}}, "no effect without pairs: hint"),
        ({"preference": {**ONLINE, "pairs": "gold", "pair_reward": "exact"}},
         "ranks online pairs, which pairs does not name"),
        ({"preference": {**ONLINE, "pair_reward": {"name": "exact", "share": 0}}},
         "greater than 0"),
        ({"preference": {**ONLINE, "pair_reward": "exact", "margin": 1.5}}, "is never met"),
        ({"preference": {**ONLINE, "loss": "simpo", "reference": "last_iteration"}},
         "simpo has no reference"),
        ({"preference": {**ONLINE, "loss": "orpo", "reference": "last_iteration"}},
         "orpo has no reference"),
        ({"audit_reward": {"share": 0.5}}, "exactly one of name, python, judge and model"),
        ({"preference": {**ONLINE, "simpo_gamma": 0.3}}, "no effect with loss: sigmoid"),
        ({"preference": {**ONLINE, "loss": "simpo", "length_normalize": False}},
         "length_normalize must not be false"),
        ({"preference": {**ONLINE, "loss": "kto"}}, "'sigmoid', 'ipo', 'simpo' or 'orpo'"),
        ({"policy": {"normalize_rewards": "domain"}}, "normalize_rewards: domain has no effect"),
        ({"reward": [{"name": "exact", "weight": 0.0}, {"name": "logic"}]},
         "exact decides which completions are correct .* with weight 0"),
        ({"policy": {"gamma": 0.9}}, "policy.gamma\n  Extra inputs"),
        ({**OFFLINE_ONLY, "rollout": {}}, "prompts_per_iteration has no effect"),
        (merged(OFFLINE_ONLY, {"policy": {"kl": {"coef": 0.1}}}), "kl act on the policy term"),
        (merged(OFFLINE_ONLY, {"preference": {"offline": {"path": "x", "prompts": None}}}),
         "that is kind: dpo"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        UpoConfig(**stage(Path("x"), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": [{"name": "row", "weight": 0.3}],
         "preference": {"coef": 0.1, "pairs": "shorter"}},
        {"rollout": {"engine": {"kind": "vllm"}}, "lora": {"rank": 2},
         "evaluation": {"path": "x", "every_iterations": 2}},
        {"rollout": {"engine": {"kind": "vllm"}, "replay": "x"},
         "preference": {"coef": 0.1, "pairs": "hint"}},
        {"audit_reward": {"name": "exact", "weight": 0.5, "share": 0.5}, "critic": CRITIC},
        {"policy": {"minibatches": 1, "clip_ratio": 0.1}, "lora": {"rank": 2, "dropout": 0.1}},
        {"policy": {"minibatches": 7}, "rollout": {"refill_rounds": 1}, "critic": CRITIC},
        {"rollout": {"replay": "x", "top_p": 0.9, "batch_size": 8}, "curriculum": {},
         "preference": {"coef": 0.1, "pairs": "hint"}},
        {"audit_reward": {"name": "exact", "share": 0.05}},
    ],
)  # fmt: skip
def test_settings_that_act_are_taken(changes):
    config = UpoConfig(**stage(Path("x"), **changes))
    again = UpoConfig(**config.model_dump())  # as a run records them
    assert again == config


def test_leave_one_out_is_not_normalized_within_a_domain_by_itself():
    plain = UpoConfig(**stage(Path("x"), policy={"baseline": "leave_one_out"}))
    asked = {"baseline": "leave_one_out", "normalize_rewards": "domain"}
    assert not plain.normalizes_by_domain
    assert UpoConfig(**stage(Path("x"), policy=asked)).normalizes_by_domain


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"micro_batch_size": 1}, "micro_batch_size must be at least 2"),
        ({"checkpoint": {"best_metric": "x"}}, "best_metric needs validation"),
        ({"validation": "v", "checkpoint": {"best_metric": "x"}}, "'x' is not measured, only"),
        ({"validate_every_steps": 2}, "validate_every_steps needs validation"),
        (
            {
                "validation": "v",
                "validate_every_steps": 2,
                "checkpoint": {"best_metric": "validation_loss", "every_steps": 3},
            },
            "a multiple of",
        ),
        ({"beta": 0}, "greater than 0"),
        ({"loss": "ipo", "simpo_gamma": 0.5}, "no effect with loss: ipo"),
        ({"rpo_alpha": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_dpo_settings_are_refused(changes, says):
    values = {"name": "d", "kind": "dpo", "data": "x", "seq_len": 32, "steps": 3,
              "pairs_per_step": 2, "micro_batch_size": 2, "optim": {"lr": 1e-4}}  # fmt: skip
    with pytest.raises(ValidationError, match=says):
        DpoConfig(**{**values, **changes})
