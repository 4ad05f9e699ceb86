"""Settings of the policy's objective: defaults that depend on each other, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ernie_train.rl.config import PolicyConfig, SamplerCorrectionConfig


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
