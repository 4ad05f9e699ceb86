"""The arms of the RL ablation: what each of them changes in recipes/ablate_rl.yaml."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.core.config import load_yaml
from tools.evidence.ablations import ROOT, Arm

RECIPE = "recipes/ablate_rl.yaml"
LOOSE = "loose-"  # what the names of arms begin with that train on the exploitable reward
DOMAIN, LOOSE_DOMAIN = "logic", "math"  # which are trained on; the loose reward needs numbers
PREFERENCE_COEF = 0.1
KL_COEF = 0.1  # of the usual remedy, beside which the preference term stands
SLOW = 0.25  # of the others' learning rate: pairs alone go far from the start at theirs
PAIR_SHARE = 0.25  # of the completions, for the pairs that are made before offline-UPO begins


@dataclass(frozen=True)
class Budget:
    """What is the same in every arm: completions and optimizer steps."""

    iterations: int
    prompts: int  # of an iteration
    group_size: int
    minibatches: int

    @classmethod
    def of_recipe(cls, iterations: int | None = None) -> Budget:
        """The recipe's, or that of fewer or more iterations."""
        stage = _stage()
        return cls(
            iterations or stage["iterations"],
            stage["prompts_per_iteration"],
            stage["group_size"],
            stage["minibatches"],
        )

    @property
    def all_prompts(self) -> int:
        return self.iterations * self.prompts


@dataclass(frozen=True)
class Place:
    """Where the start and the rows with verifiers lie."""

    start: Path
    rows: Path

    def rows_of(self, domain: str) -> str:
        return str(self.rows / f"{domain}.jsonl")


def _stage() -> dict[str, Any]:
    stage: dict[str, Any] = load_yaml(ROOT / RECIPE)["stages"][0]
    return stage


def _settings(**settings: Any) -> tuple[str, ...]:
    """Overrides of the RL stage; JSON is YAML."""
    return tuple(f"stages.rl.{key}={json.dumps(value)}" for key, value in settings.items())


def _critic() -> dict[str, Any]:
    optim = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 4, "weight_decay": 0.0}
    return {"advantage": "gae", "critic": {"optim": optim}}


def _online() -> dict[str, Any]:
    return {"preference_coef": PREFERENCE_COEF, "pairs": "online"}


def _offline(budget: Budget) -> dict[str, Any]:
    """A share of the completions goes into pairs before the stage; the rest is sampled in it."""
    before = round(PAIR_SHARE * budget.prompts)
    return {
        "preference_coef": PREFERENCE_COEF,
        "pairs": "offline",
        "prompts_per_iteration": budget.prompts - before,
        "offline": {
            "prompts": before * budget.iterations,
            "per_iteration": budget.prompts - before,
        },
    }


def _pairs_alone(budget: Budget, rate: float = 1.0) -> dict[str, Any]:
    """All completions are the start's; the pairs that they give are gone through in turn.

    `rate` multiplies the learning rate of the other arms.
    """
    optim = _stage()["optim"]
    return {
        "optim": {**optim, "lr": rate * optim["lr"]},
        "policy_coef": 0.0,
        "preference_coef": 1.0,
        "pairs": "offline",
        "prompts_per_iteration": None,
        "clip_ratio_high": None,
        "offline": {
            "prompts": budget.all_prompts,
            "per_iteration": budget.prompts,
        },
    }


def _more_sft(budget: Budget, place: Place) -> Arm:
    """The prompts' worked solutions, as often as the others complete each prompt."""
    stage = _stage()
    sft = {
        "name": "rl",
        "kind": "sft",
        "data": [{"path": place.rows_of(DOMAIN)}],
        "seq_len": 1024,
        "micro_batch_size": 4,  # about as many solutions as a minibatch has completions
        "epochs": budget.group_size,
        "optim": stage["optim"],
        "checkpoint": stage["checkpoint"],
    }
    return Arm("sft", (f"model.path={place.start}", f"stages=[{json.dumps(sft)}]"))


def arms(budget: Budget, place: Place) -> list[Arm]:
    """The comparison with verifiers, then the one with the exploitable reward."""

    def arm(name: str, domain: str = DOMAIN, **settings: Any) -> Arm:
        shared = (f"model.path={place.start}", f"stages.rl.data.0.path={place.rows_of(domain)}")
        every = {"iterations": budget.iterations, **settings}
        return Arm(name, (*shared, *_settings(**every)))

    def loose(name: str, **settings: Any) -> Arm:
        # The true verifier has no weight: it is only logged. The canaries would find the hole, as
        # one of them holds a number.
        parts = [
            {"python": "tools/evidence/ablate_rl_rewards.py:mentions"},
            {"name": "row", "weight": 0.0},
        ]
        return arm(LOOSE + name, LOOSE_DOMAIN, reward=parts, canaries=0, **settings)

    chance = {"python": "tools/evidence/ablate_rl_rewards.py:coin"}
    return [
        _more_sft(budget, place),
        arm("group"),
        arm("ppo", **_critic()),
        arm("dpo", **_pairs_alone(budget)),
        arm("dpo-slow", **_pairs_alone(budget, SLOW)),
        arm("upo-online", **_online()),
        arm("upo-offline", **_offline(budget)),
        arm("random", reward=chance, canaries=0),
        loose("group"),
        loose("kl", kl={"coef": KL_COEF, "kind": "k3"}),
        loose("upo-online", **_online()),
        loose("upo-offline", **_offline(budget)),
    ]
