"""Whole iterations against the referee, number by number, over a grid of settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.rl import learner
from tests.rl import toy_stage
from tests.rl.planted_faults import FAULTS
from tests.rl.toy_stage import Outcome, expected, observed, toy_config

RL_CRITIC = {
    "optim": {"lr": 0.05, "schedule": "constant", "eps": 1e-3}, "warmup_iterations": 0,
    "clip_range": 0.1,
}  # fmt: skip
ONLINE = {"coef": 0.3, "pairs": "online", "margin": 0.5}
BOTH = {**ONLINE, "pairs": "both", "offline": {"path": "x", "per_iteration": 2}}
FAR = {"lr": 0.3, "schedule": "constant", "eps": 1e-3}  # so that ratios leave their range
IN_REWARD = {"kl": {"coef": 0.2, "place": "reward"}}
RAMP = {"truncated": "ramp", "truncation_penalty": 0.5, "overlong_tokens": 4}

GRID: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"optim": FAR, "policy": {"clip_ratio_high": 0.28, "update_epochs": 3}},
    "dual clip": {"optim": FAR, "policy": {"dual_clip": 1.5, "update_epochs": 3}},
    "undivided": {"policy": {"group_scale": "none"}},
    "undivided raw": {"policy": {"group_scale": "none", "normalize_rewards": "none"}},
    "leave one out": {"policy": {"baseline": "leave_one_out", "normalize_rewards": "none"}},
    "kl in the loss": {"optim": FAR, "policy": {"kl": {"coef": 0.2}}},
    "k2 in the loss": {"optim": FAR, "policy": {"kl": {"coef": 0.2, "kind": "k2"}}},
    "kl in the reward": {"optim": FAR, "policy": IN_REWARD},
    "kl in the undivided reward": {"optim": FAR, "policy": {**IN_REWARD, "group_scale": "none"}},
    "entropy": {"policy": {"entropy_coef": 0.1}},
    "sequence ratio": {"policy": {"ratio": "sequence", "aggregation": "sequence"}},
    "cispo": {"optim": FAR, "policy": {"objective": "cispo", "clip_ratio_high": 0.1}},
    "constant": {"policy": {"aggregation": "constant", "entropy_coef": 0.05}},
    "masked": {"rollout": {"truncated": "mask"}},
    "punished": {"rollout": {"truncated": "punish", "truncation_penalty": 0.7}},
    "ramp": {"rollout": RAMP, "preference": ONLINE},
    "pairs": {"preference": BOTH, "micro_batch_size": 2},
    "pairs by tokens": {
        "preference": BOTH, "micro_batch_tokens": 24, "rollout": {"max_prompt_tokens": 4},
        "critic": RL_CRITIC,
    },
    "measured": {
        "measured_completions": 4, "preference": {**BOTH, "margin": 0.2},
        "policy": {"kl": {"coef": 0.2}},
    },
    "measured without KL": {"measured_completions": 4, "preference": ONLINE},
    "pairs of sums": {"preference": {**ONLINE, "length_normalize": False, "rpo_alpha": 0.2}},
    "pairs alone": {"policy": {"coef": 0.0}, "preference": BOTH},
    "critic": {"critic": RL_CRITIC, "policy": {"update_epochs": 3}},
    "decoupled": {
        "critic": {**RL_CRITIC, "gamma": 0.9, "lam": 0.8, "policy_lam": 0.4, "clip_range": None},
        "policy": {"normalize_rewards": "none"},
    },
    "warm-up": {"critic": {**RL_CRITIC, "warmup_iterations": 1}, "iterations": 3},
    "everything": {
        "critic": {**RL_CRITIC, "gamma": 0.95, "lam": 0.9}, "preference": BOTH, "rollout": RAMP,
        "policy": {**IN_REWARD, "entropy_coef": 0.02, "minibatches": 3}, "optim": FAR,
    },
    "terms": {
        "preference": {**ONLINE, "rpo_alpha": 0.3}, "term_norms_every": 2, "iterations": 3,
        "policy": {"coef": 0.7, "entropy_coef": 0.1, "kl": {"coef": 0.3}},
    },
    "one step": {"policy": {"minibatches": 1, "update_epochs": 1}, "micro_batch_size": 64},
}  # fmt: skip
UNTIMED = ("time", "seconds", "step")


@pytest.fixture(scope="module")
def referee(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, Path]]:
    """What the referee makes of a setting, and the directory of the rollouts; each once."""

    @cache
    def of(name: str) -> tuple[Outcome, Path]:
        directory = tmp_path_factory.mktemp("rollouts")
        return expected(toy_config(**GRID[name]), directory), directory

    return of


def agree(ours: Outcome, theirs: Outcome) -> None:
    """Compare everything of a stage with what the referee makes of it."""
    for number, (want, got) in enumerate(zip(ours.lines, theirs.lines, strict=True), 1):
        shown = {n: v for n, v in got.items() if not n.endswith(UNTIMED)}
        assert shown.keys() == want.keys(), f"iteration {number}"
        for name in (name for name in shown if not np.isnan(want[name])):
            value = shown[name]
            assert value == pytest.approx(want[name], rel=3e-4, abs=3e-6), f"{name} of {number}"
    assert len(theirs.gradients) == len(ours.gradients)
    for step, (want, got) in enumerate(zip(ours.gradients, theirs.gradients, strict=True), 1):
        assert want.keys() == got.keys(), f"step {step}"
        for name in want:
            near(got[name], want[name], f"gradient of {name} at step {step}")
    for want, got in zip(ours.advantages, theirs.advantages, strict=True):
        assert [a is None for a in got] == [a is None for a in want]
        if any(a is not None for a in want):
            near(np.array(got, float), np.array(want, float), "advantages")
    for name, value in ours.weights.items():
        near(theirs.weights[name], value, name)


def near(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    found = found if found.shape == wanted.shape else found.T
    scale = float(np.nanmax(np.abs(wanted)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-4 * scale + 1e-7, err_msg=what)


@pytest.mark.parametrize("name", GRID)
def test_an_iteration_is_what_the_referee_makes_of_it(name, referee, tmp_path, monkeypatch):
    ours, rollouts = referee(name)
    agree(ours, observed(toy_config(**GRID[name]), rollouts, tmp_path, monkeypatch))


def test_completions_that_teach_nothing_pass_no_model_but_for_a_sample(
    referee, tmp_path, monkeypatch
):
    """Of 20 completions 11 train; of the sample of 4 two are of groups that do not."""
    changes: dict[str, Any] = {"optim": FAR, "policy": {"kl": {"coef": 0.2}}}
    _, rollouts = referee("kl in the loss")
    original, ends = learner.sequence_logprobs, []
    for number, most in enumerate((None, 4)):
        counts: list[int] = []

        def counted(model: Any, sequences: Any, counts: list[int] = counts, **options: Any) -> Any:
            counts.append(len(sequences))
            return original(model, sequences, **options)

        monkeypatch.setattr(learner, "sequence_logprobs", counted)
        config = toy_config(**changes, measured_completions=most)
        ends.append((observed(config, rollouts, tmp_path / str(number), monkeypatch), counts))
    (everything, all_counts), (sampled, few_counts) = ends
    trained = [sum(a is not None for a in each) for each in everything.advantages]
    assert all_counts == [20, 20] * 2  # by the policy and by its start
    assert trained == [11, 11]
    assert few_counts == [4, 9, 13] * 2  # by the policy the sample, then the others
    near(sampled.weights["head"], everything.weights["head"], "head")
    assert sampled.lines[0]["entropy"] != everything.lines[0]["entropy"]


def test_without_kl_only_the_sample_and_pairs_pass_the_reference(referee, tmp_path, monkeypatch):
    """Of 20 completions a sample of 4 and 11 that train are 13; that sample and 4 pairs are 10."""
    name, original = "measured without KL", learner.sequence_logprobs
    by_policy: list[int] = []
    by_reference: list[int] = []

    def counted(model: Any, sequences: Any, **options: Any) -> Any:
        (by_policy if options.get("with_entropy") else by_reference).append(len(sequences))
        return original(model, sequences, **options)

    monkeypatch.setattr(learner, "sequence_logprobs", counted)
    ours, rollouts = referee(name)
    agree(ours, observed(toy_config(**GRID[name]), rollouts, tmp_path, monkeypatch))
    assert (by_policy, by_reference) == ([4, 9] * 2, [10] * 2)


def test_the_grid_has_ratios_that_are_truncated_and_a_setting_without(referee):
    truncated = {name: [line["kl_loss/truncated"] for line in referee(name)[0].lines]
                 for name in ("kl in the loss", "terms")}  # fmt: skip
    assert truncated["kl in the loss"][-1] > 0.1
    assert not any(truncated["terms"])


@pytest.mark.parametrize(
    ("alone", "told"),
    [(True, "no pair was found"), (False, "no group differs in its verdicts")],
)
def test_an_iteration_that_teaches_nothing_says_why(alone, told, tmp_path, monkeypatch, capsys):
    changes: dict[str, Any] = {"preference": {"coef": 0.3, "pairs": "gold"}}
    if alone:
        changes["policy"] = {"coef": 0.0}
    else:
        monkeypatch.setattr(toy_stage, "MARKS", [[toy_stage.R] * toy_stage.GROUP] * 5)
    expected(toy_config(), tmp_path)
    learnt = observed(toy_config(**changes), tmp_path, tmp_path, monkeypatch)
    assert not learnt.gradients
    shown = capsys.readouterr().out
    for iteration in (1, 2):
        assert f"iteration {iteration}: {told}: nothing was learnt" in shown


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_wiring_is_noticed(name, referee, tmp_path, monkeypatch):
    fault = FAULTS[name]
    ours, rollouts = referee(fault.setting)
    fault.plant(monkeypatch)
    theirs = observed(toy_config(**GRID[fault.setting]), rollouts, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        agree(ours, theirs)
