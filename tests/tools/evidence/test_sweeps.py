"""The sweep files: their arms differ in what the pages say, and in nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core.config import load_yaml
from ernie_train.rl.config import UpoConfig
from ernie_train.run.recipe import Recipe, load_recipe
from ernie_train.train.supervised_data import PretrainConfig, SftConfig
from tools.data import make_needles
from tools.evidence import measure, prepare
from tools.evidence.runs import ROOT
from tools.evidence.sweep import SWEEPS, load_sweep


def recipes(name: str) -> dict[str, Recipe]:
    """Return the recipe of every arm."""
    sweep = load_sweep(name)
    return {
        arm: load_recipe(ROOT / sweep.recipe, sweep.overrides_of(arm, Path("/out")))
        for arm in sweep.arms
    }


def stages(name: str) -> dict[str, Any]:
    """Return the only stage of every arm."""
    return {arm: recipe.stages[0] for arm, recipe in recipes(name).items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in SWEEPS.glob("*.yaml")))
def test_names_are_of_functions_and_arms(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.measure.name in measure.MEASUREMENTS
    assert all(
        step is None or step.name in prepare.PREPARE for step in (sweep.prepare, sweep.fresh)
    )
    assert all(d.by in prepare.DERIVED and d.arm in sweep.arms for d in sweep.derived.values())
    arms = {*sweep.arms, *sweep.derived, "start", "loose-start", "moe-start"}
    if sweep.rates is not None:
        assert sweep.rates.measure.name in measure.MEASUREMENTS
        assert {*sweep.rates.arms} <= arms
    drawn = {arm.arm for plot in sweep.plots.values() for arm in plot.arms.values()}
    cells = [c for t in sweep.tables for c in [*t.columns.values(), *(t.rows or {}).values()]]
    assert drawn | {cell.arm for cell in cells if cell.arm} <= arms
    assert {c.minus.arm for c in cells if c.minus and c.minus.arm} <= arms


# ---- balance -------------------------------------------------------------------------------------


def test_balance_arms_all_differ() -> None:
    seen = []
    for recipe in recipes("balance").values():
        assert recipe.model.build().moe_num_experts == 32
        (stage,) = recipe.stages
        assert isinstance(stage, SftConfig)
        seen.append(stage.balance)
    assert seen[0].active() == []
    assert all(balance.active() for balance in seen[1:])
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


# ---- long context --------------------------------------------------------------------------------


def test_long_context_arms_differ_in_base_and_length_alone() -> None:
    found = stages("long_context")
    assert all(isinstance(stage, PretrainConfig) for stage in found.values())
    assert list(found) == ["short-only", "base-kept", "base-high", "base-raised"]
    short, kept, high, raised = (stage.phases() for stage in found.values())
    tokens = {
        sum(phase.seq_len * phase.micro_batch_size * (phase.steps or 0) for phase in phases)
        for phases in (short, kept, high, raised)
    }
    assert len(tokens) == 1
    assert {phase.seq_len for phase in short} == {raised[0].seq_len}
    assert {phase.rope_theta for phase in (*short, *kept)} == {raised[0].rope_theta}
    assert {phase.rope_theta for phase in high} == {raised[-1].rope_theta}
    assert load_sweep("long_context").measure.options["rope_theta"] == raised[-1].rope_theta
    for other in (kept, high):
        assert [replace(phase, rope_theta=None) for phase in other] == [
            replace(phase, rope_theta=None) for phase in raised
        ]
    assert raised[-1].seq_len == 8 * raised[0].seq_len == measure.LENGTHS[-1]
    assert found["short-only"].optim == found["base-raised"].optim
    panel = load_sweep("long_context").plots["long_context.png"].panels[0]  # type: ignore[union-attr]
    assert panel.chance == pytest.approx(1 / len(make_needles.VALUES["color"]), abs=1e-4)


def test_bases_keep_the_wavelengths_of_the_full_model() -> None:
    """Longest wavelength over length: as 10K at 8K, 160K at 32K and 500K at 128K, width 128."""

    def ratio(base: float, head_dim: int, length: int) -> float:
        return float(2 * np.pi * base ** ((head_dim - 2) / head_dim) / length)

    full = [(1e4, 8192), (1.6e5, 32768), (5e5, 131072)]
    phases = load_yaml(ROOT / "recipes/long_context.yaml")["stages"][0]["rope_schedule"]
    for (base, length), phase in zip(full, phases, strict=True):
        ours = ratio(phase["rope_theta"], 32, phase["seq_len"])
        assert ours == pytest.approx(ratio(base, 128, length), rel=0.02)


# ---- RL ------------------------------------------------------------------------------------------


def completions(stage: UpoConfig) -> int:
    """Return the completions that a stage samples, before it begins and in it."""
    before = (stage.offline.prompts or 0) if stage.offline else 0
    within = stage.iterations * (stage.rollout.prompts_per_iteration or 0)
    return (before + within) * stage.rollout.group_size


def test_rl_arms_have_one_budget() -> None:
    found = stages("rl")
    group = found["group"]
    rl = {name: stage for name, stage in found.items() if isinstance(stage, UpoConfig)}
    assert len(rl) == len(found) - 2
    for name, stage in rl.items():
        if name == "hint":  # at most, where every group is all wrong
            hinted = stage.preference.hint.samples
            most = stage.iterations * stage.rollout.prompts_per_iteration * (8 + hinted)
            assert completions(stage) < most <= 2688
        else:
            assert completions(stage) == completions(group) == 2688, name
        assert stage.iterations * stage.policy.minibatches == 56
    assert found["dpo-slow"].optim.lr == found["dpo"].optim.lr / 4
    del found["dpo-slow"]
    assert len({stage.optim.model_dump_json() for stage in found.values()}) == 1
    sft, demonstrations = found["sft"], found["demonstrations"]
    assert isinstance(sft, SftConfig) and sft.steps == 56
    assert sft == demonstrations.model_copy(update={"data": sft.data})
    assert sft.data[0].path.endswith("rows/problems/logic.jsonl.gz")
    assert demonstrations.data[0].path.endswith("data/train/logic.jsonl")


def test_rl_arms_are_what_their_titles_say() -> None:
    found = stages("rl")
    assert found["loose-kl"].policy.kl.coef > 0
    assert found["group"].preference is None and found["group"].critic is None
    assert found["ppo"].critic is not None and found["ppo"].preference is None
    pairs = {n: s.preference.pairs for n, s in found.items() if getattr(s, "preference", None)}
    assert pairs == {
        "dpo": ["offline"], "dpo-slow": ["offline"], "sums": ["online"], "online": ["online"],
        "last-iteration": ["online"], "offline": ["offline"], "gold": ["gold"],
        "likelihood": ["gold"], "gold-likelihood": ["gold"], "hint": ["hint"],
        "gold-shorter": ["gold", "shorter"],
        "simpo": ["online", "gold"], "loose-online": ["online"], "loose-offline": ["offline"],
        "loose-pair-reward": ["online"],
    }  # fmt: skip
    assert found["dpo"].policy.coef == 0 and not found["dpo"].samples_each_iteration
    assert found["online"].policy.coef == found["offline"].policy.coef == 1
    gold, likelihood = found["gold"].preference, found["likelihood"].preference
    same = {"beta", "rpo_alpha"}
    assert likelihood.model_dump(exclude=same) == gold.model_dump(exclude=same)
    assert likelihood.beta * likelihood.rpo_alpha < 1e-5 and likelihood.rpo_alpha == 1
    dear = found["loose-pair-reward"].preference.pair_reward, found["loose-audit"].audit_reward
    assert dear[0] == dear[1]
    assert found["loose-audit"].preference is None
    for name, stage in found.items():
        if name.startswith("loose-"):
            parts = [(part.label, part.weight) for part in stage.reward.parts]
            assert parts == [("mentions", 1.0), ("row", 0.0)]
        if name in ("loose-group", "loose-online", "loose-offline"):
            twin = found[name.removeprefix("loose-")]
            same = {"reward", "data", "canaries"}
            assert stage.model_dump(exclude=same) == twin.model_dump(exclude=same)


# ---- seeds of the main job -----------------------------------------------------------------------


def test_no_gate_leaves_a_seed_out() -> None:
    own = load_recipe(ROOT / "recipes/tiny.yaml")
    assert [stage.name for stage in own.stages if stage.gate] == [
        "rl-logic", "rl-math-code", "rl-general",
    ]  # fmt: skip
    (without,) = recipes("tiny_seeds").values()
    assert all(stage.gate is None for stage in without.stages)
    assert own.evaluation and own.evaluation.after_each_stage
