"""Settings of the policy's objective: defaults that depend on each other, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from ernie_train.rl.config import PolicyConfig, SamplerCorrectionConfig, UpoConfig
from ernie_train.rl.learner import _policy_loss


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, (0.2, 0.2)),
        ({"clip_ratio_high": 0.28}, (0.2, 0.28)),
        ({"clip_ratio": 0.1}, (0.1, 0.1)),
        ({"ratio": "sequence"}, (3e-4, 4e-4)),
        ({"ratio": "sequence", "clip_ratio": 0.01}, (0.01, 0.01)),
        ({"objective": "cispo"}, (1.0, 4.0)),
        ({"objective": "cispo", "clip_ratio": 0.5}, (0.5, 4.0)),
        ({"objective": "cispo", "ratio": "sequence", "clip_ratio_high": 0.5}, (1.0, 0.5)),
    ],
)
def test_the_range_of_ratios_follows_the_objective(settings, expected):
    assert PolicyConfig(**settings).clip_range == expected


def test_leave_one_out_is_not_divided_by_the_deviation_unless_asked_for():
    assert PolicyConfig().advantage_scale == "std"
    assert PolicyConfig(baseline="leave_one_out").advantage_scale == "none"
    assert PolicyConfig(baseline="leave_one_out", group_scale="std").advantage_scale == "std"


def test_settings_of_a_policy_term_that_is_absent_are_refused():
    with pytest.raises(ValidationError, match="ratio, aggregation: no effect with coef: 0"):
        PolicyConfig(coef=0, ratio="sequence", aggregation="constant")


@pytest.mark.parametrize("bounds", [[0.5, 0.9], [1.1, 2.0], [2.0, 0.5]])
def test_bounds_of_weights_that_leave_out_1_are_refused(bounds):
    with pytest.raises(ValidationError, match="must hold 1"):
        SamplerCorrectionConfig(kind="masked", bounds=bounds)


def test_bounds_of_weights_follow_the_kind():
    assert SamplerCorrectionConfig(kind="truncated").range == (0.0, 2.0)
    assert SamplerCorrectionConfig(kind="masked").range == (0.5, 2.0)


def test_the_settings_of_a_stage_reach_its_loss():
    """Two stages that differ in one of them have losses that differ in what it means."""
    expected = {
        "objective": ("cispo", {"objective": "cispo", "clip_ratio": (1.0, 4.0), "dual_clip": None}),
        "ratio": ("sequence", {
            "sequence_ratio": True, "clip_ratio": (3e-4, 4e-4), "dual_clip": None,
        }),
        "aggregation": ("constant", {"aggregation": "constant"}),
        "router_replay": (True, {"router_replay": True}),
        "clip_ratio_high": (0.28, {"clip_ratio": (0.2, 0.28)}),
        "dual_clip": (None, {"dual_clip": None}),
    }  # fmt: skip
    stage = {
        "name": "u", "kind": "upo", "data": [{"path": "p"}], "reward": "math", "iterations": 1,
        "micro_batch_size": 1, "optim": {"lr": 1e-3},
        "rollout": {"prompts_per_iteration": 1, "max_new_tokens": 7},
    }  # fmt: skip
    twice = {"update_epochs": 2}
    plain = _policy_loss(UpoConfig(**stage, policy=twice))
    assert plain.max_new_tokens == 7 and not plain.router_replay and plain.dual_clip == 3.0
    for key, (value, changes) in expected.items():
        assert _policy_loss(UpoConfig(**stage, policy={**twice, key: value})) == replace(
            plain, **changes
        )
