"""Every setting of an RL stage that is taken changes something in an iteration, beside any others.

Hypothesis draws a stage, a few settings beside it and one more. That one is refused by its name, or
the stage comes out otherwise, bit for bit: metrics, gradients, advantages or weights. Settings that
act on sampling alone are refused here, where rollouts are replayed; `test_recipe_keys_act.py` shows
what they do.
"""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from ernie_train.core.config import HARMLESS, schemas_in
from ernie_train.core.errors import ErnieTrainError
from ernie_train.rl.config import UpoConfig
from ernie_train.train.stage import StageConfig
from tests.rl.test_iteration import BOTH, FAR, IN_REWARD, ONLINE, RAMP, RL_CRITIC
from tests.rl.toy_stage import GROUP, Outcome, expected, observed, toy_config

BASES: list[dict[str, Any]] = [
    {"policy": {"minibatches": 1, "update_epochs": 1}},
    {"optim": FAR, "preference": ONLINE},
    {"policy": IN_REWARD, "preference": BOTH},
    {"policy": {"coef": 0.0}, "preference": ONLINE},
    {"policy": {"kl": {"coef": 0.2}, "minibatches": 3}, "rollout": RAMP},
    {"critic": RL_CRITIC, "optim": FAR},
    {"critic": {**RL_CRITIC, "clip_range": 0.2}, "policy": {"minibatches": 1, "update_epochs": 1}},
]
VALUES: dict[str, list[Any]] = {
    "micro_batch_size": [2],
    "iterations": [1],
    "measured_completions": [4],
    "audit_reward": [{"name": "exact", "weight": 1.5, "share": 0.5}],
    "curriculum": [{"start": 1}],
    "preference": [ONLINE, BOTH, {"coef": 0.3, "pairs": "shorter"}],
    "critic": [RL_CRITIC],
    "policy.coef": [0.5, 0.0],
    "policy.objective": ["cispo"],
    "policy.ratio": ["sequence"],
    "policy.clip_ratio": [0.01],
    "policy.clip_ratio_high": [0.01],
    "policy.dual_clip": [1.01],
    "policy.aggregation": ["sequence", "constant"],
    "policy.entropy_coef": [0.1],
    "policy.kl": [{"coef": 0.2}, {"coef": 0.0, "kind": "k2"}],
    "policy.kl.coef": [0.9],
    "policy.kl.kind": ["k1", "k2", "k3"],
    "policy.kl.place": ["reward"],
    "policy.update_epochs": [3],
    "policy.minibatches": [4, 6, 9],
    "policy.sampler_correction": [{"kind": "truncated"}, {"kind": "masked", "level": "sequence"}],
    "policy.router_replay": [True],
    "policy.baseline": ["leave_one_out"],
    "policy.group_scale": ["none"],
    "policy.normalize_rewards": ["domain", "none"],
    "critic.gamma": [0.9],
    "critic.lam": [0.8],
    "critic.policy_lam": [0.7],
    "critic.clip_range": [0.001],
    "critic.warmup_iterations": [1, 2],
    "preference.coef": [0.6],
    "preference.pairs": ["online", "both"],
    "preference.margin": [1.6],
    "preference.reference": ["last_iteration"],
    "preference.loss": ["ipo", "simpo", "orpo"],
    "preference.beta": [0.7],
    "preference.length_normalize": [False],
    "preference.simpo_gamma": [0.9],
    "preference.rpo_alpha": [0.4],
    "preference.offline": [{"path": "x", "per_iteration": 1}],
    "preference.offline.per_iteration": [1, 3],
    "preference.hint": [{"share": 0.3}],
    "rollout.group_size": [1, GROUP + 1],
    "rollout.engine": [{"kind": "vllm"}],
    "rollout.temperature": [0.9],
    "rollout.top_p": [0.9],
    "rollout.top_k": [5],
    "rollout.batch_size": [8],
    "rollout.refill_rounds": [1],
    "rollout.skip_solved": [{"rate": 0.5}],
    "rollout.truncated": ["mask", "punish"],
    "rollout.truncation_penalty": [0.4],
    "rollout.overlong_tokens": [3],
}  # fmt: skip
# Of data, models and sampling, not of an iteration's arithmetic: other tests show what they do.
ELSEWHERE = {
    "name", "kind", "data", "reward", "policy", "rollout", "environment", "evaluation",
    "share_prompts", "micro_batch_tokens", "preference.pair_reward",
    "rollout.prompts_per_iteration", "rollout.max_prompt_tokens", "rollout.max_new_tokens",
    "preference.offline.prompts", "preference.offline.columns", "critic.optim",
    *(name for name in StageConfig.model_fields if name != "micro_batch_size"),
}  # fmt: skip
WHOLE = ("reward", "audit_reward", "curriculum", "policy.sampler_correction", "preference.hint",
         "preference.pair_reward", "rollout.engine", "rollout.skip_solved", "environment",
         "evaluation", "critic.optim", "data", "preference.offline.columns")  # fmt: skip


def keys(cls: type[BaseModel] = UpoConfig, above: str = "") -> list[str]:
    """The keys of a stage and of its sections but `WHOLE` ones; harmless ones change no results."""
    found = []
    for name, field in cls.model_fields.items():
        path = above + name
        if HARMLESS in field.metadata:
            continue
        found.append(path)
        if path not in WHOLE and not (cls is UpoConfig and name in StageConfig.model_fields):
            for inner in schemas_in(field.annotation):
                found += keys(inner, path + ".")
    return found


def test_every_key_has_values_to_try() -> None:
    assert set(keys()) - VALUES.keys() == ELSEWHERE - {"max_bad_fraction", "moe_health", "gate"}
    assert VALUES.keys() <= set(keys())


def with_value(changes: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(changes)
    *parents, last = path.split(".")
    place = changed
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = value
    return changed


def taken(changes: dict[str, Any], path: str, value: Any) -> UpoConfig | str | None:
    """The stage with one more setting, or how it is refused; None where its section is missing."""
    place: Any = toy_config(**changes)
    for name in path.split(".")[:-1]:
        if (place := getattr(place, name)) is None:
            return None
    try:
        return toy_config(**with_value(changes, path, value))
    except ValidationError as error:
        assert len(error.errors()) == 1, f"more than one message: {error}"
        return str(error.errors()[0]["loc"]) + error.errors()[0]["msg"]


class Stages:
    """Runs of the toy stage; each of equal settings once."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory, self.patch, self.runs = directory, patch, itertools.count()
        expected(toy_config(), directory)  # for its rollouts
        self.outcome = cache(self._outcome)

    def _outcome(self, config: str) -> Outcome | str:
        try:
            return observed(UpoConfig(**json.loads(config)), self.directory,
                            self.directory / f"run{next(self.runs)}", self.patch)  # fmt: skip
        except ErnieTrainError as error:
            return str(error)

    def of(self, config: UpoConfig) -> Outcome | str:
        return self.outcome(config.model_dump_json())


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    with pytest.MonkeyPatch.context() as patch:
        yield Stages(tmp_path_factory.mktemp("stages"), patch)


def plain(outcome: Outcome) -> str:
    """All numbers of an outcome, to the bit."""
    lines = [{k: v for k, v in line.items() if k != "time"} for line in outcome.lines]
    arrays = [outcome.gradients, outcome.weights]
    return repr((lines, outcome.advantages)) + json.dumps(arrays, default=np.ndarray.tolist)


def test_a_replay_of_groups_of_another_size_is_refused(stages: Stages) -> None:
    told = stages.of(toy_config(rollout={"group_size": GROUP + 1}))
    assert f"group of {GROUP} completions, though rollout.group_size={GROUP + 1}" in str(told)


def meaning(config: UpoConfig) -> Any:
    """The settings, with those in place that stand for a default."""
    policy, preference, kl = config.policy, config.preference, config.policy.kl
    given = config.model_dump()
    given["policy"] |= {
        "clip_ratio": policy.clip_range, "clip_ratio_high": None, "baseline": policy.baseline,
        "group_scale": policy.advantage_scale, "normalize_rewards": config.normalizes_by_domain,
    }  # fmt: skip
    if kl is not None:
        given["policy"]["kl"]["kind"] = (kl.kind_in_loss, kl.coef_in_reward)
    if preference is not None:
        given["preference"] |= {
            "beta": preference.beta_of_loss, "length_normalize": preference.is_length_normalized
        }  # fmt: skip
    return given


settings_of = st.sampled_from([(path, value) for path in VALUES for value in VALUES[path]])


@settings(
    max_examples=8, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.sampled_from(BASES), st.lists(settings_of, max_size=3), settings_of)
def test_a_setting_acts_or_is_refused_by_its_name(stages, base, beside, one):
    changes = base
    for path, value in beside:
        if isinstance(taken(changes, path, value), UpoConfig):
            changes = with_value(changes, path, value)
    path, value = one
    without, changed = toy_config(**changes), taken(changes, path, value)
    if changed is None or changed == without:
        return  # no place for it, or the value that it had
    if isinstance(changed, str):
        assert path.rpartition(".")[2] in changed, f"refused for something else: {changed}"
        return
    if meaning(changed) == meaning(without):
        return  # its default, in words
    before, after = stages.of(without), stages.of(changed)
    if isinstance(before, str):
        return
    if isinstance(after, str):
        assert path.rpartition(".")[2] in after, f"failed for something else: {after}"
        return
    assert plain(before) != plain(after), f"{path}={value} has no effect beside {changes}"
