"""Recipes of the large model and their plans, for the tests of `plan`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train.core.config import parse_config
from ernie_train.plan import PlanSettings, print_plan
from ernie_train.plan.cost import Rates
from ernie_train.plan.layout import Machine, Precision
from ernie_train.plan.search import PlanRequest
from ernie_train.plan.workload import recipe_workloads
from ernie_train.run.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
BF16 = Precision("bfloat16")
RATES = Rates(100.0, inside_gbps=800.0, between_gbps=80.0, memory_gb_per_s=1000.0, layer_us=200.0)
SFT = {
    "name": "sft", "kind": "sft", "data": [{"path": "x"}], "seq_len": 8192,
    "micro_batch_size": 1, "grad_accum_steps": 64, "steps": 10, "optim": {"lr": 1e-5},
}  # fmt: skip
RL = {
    "name": "rl", "kind": "upo", "data": [{"path": "x"}], "reward": "logic", "iterations": 10,
    "rollout": {
        "prompts_per_iteration": 64, "group_size": 8, "max_prompt_tokens": 1024,
        "max_new_tokens": 7168, "batch_size": 16,
    },
    "micro_batch_size": 2, "policy": {"minibatches": 4},
    "optim": {"lr": 1e-6},
    "preference": {"coef": 0.1, "pairs": "online"},
}  # fmt: skip
CRITIC = {"critic": {"optim": {"lr": 1e-6}}}


def recipe_data(*stages: dict[str, Any], preset: str, device: str) -> dict[str, Any]:
    return {
        "name": "plan", "model": {"preset": preset}, "tokenizer": {"path": "data/tokenizer"},
        "device": device, "stages": list(stages),
    }  # fmt: skip


def recipe(*stages: dict[str, Any], preset: str = "21b-a3b", device: str = "gpu") -> Recipe:
    return parse_config(Recipe, recipe_data(*stages, preset=preset, device=device), "test")


def request(of: Recipe, memory_gb: float = 80.0) -> PlanRequest:
    return PlanRequest(
        of.model.build(), recipe_workloads(of), Machine(True, BF16), memory_gb, RATES
    )


def printed(of: Recipe, settings: PlanSettings) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        print_plan(of, settings, console)
    return captured.get()
