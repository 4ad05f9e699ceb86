"""Warnings about a recipe that is valid and still unlikely to be meant."""

from __future__ import annotations

from pathlib import Path

from ernie_train.core.errors import UserError
from ernie_train.data import Tokenizer, load_tokenizer
from ernie_train.rl.config import UpoConfig
from ernie_train.run.recipe import Recipe
from ernie_train.weights.model_directory import find_model

HIGHEST_LR = 0.05  # even a model of a few million parameters diverges above it
# Letters, digits, code, spaces and Chinese: different vocabularies split some of it otherwise.
_PROBE = "The quick brown foxes jumped: 2024 + 17 = ?\n\n    def f(x):\treturn x**2  # 最终答案是 é"


def recipe_warnings(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Return a line for each setting that is unlikely to be meant."""
    lines = []
    for index, stage in enumerate(recipe.stages):
        path, optim = f"stages.{index}.optim", stage.optim
        if optim.lr > HIGHEST_LR:
            lines.append(
                f"warning: {path}.lr={optim.lr:g} is far above what trains; fine-tuning takes 1e-6 "
                "to 1e-3"
            )
        steps = getattr(stage, "steps", None)
        if steps is not None and optim.warmup_steps >= steps:
            lines.append(
                f"warning: {path}.warmup_steps={optim.warmup_steps} does not end within the "
                f"stage's {steps} steps: the rate never reaches lr"
            )
        if isinstance(stage, UpoConfig) and stage.balance.bias_update_rate:
            lines.append(
                f"warning: stages.{index}.balance.bias_update_rate="
                f"{stage.balance.bias_update_rate:g} moves the choice of experts after each step: "
                "ratios and KL of an iteration's later steps measure that as well as learning; 0 "
                "freezes it in RL"
            )
    return lines + _other_vocabulary(recipe, tokenizer)


def _other_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    source = recipe.model
    if source.path is None or source.is_absent:
        return []
    try:
        beside = find_model(source.path).tokenizer
        own = load_tokenizer(beside)
    except UserError:
        return []  # the model has no tokenizer of its own, or none that can be read
    if own.encode(_PROBE) == tokenizer.encode(_PROBE):
        return []
    return [
        f"warning: tokenizer.path={recipe.tokenizer.path} has another vocabulary than the "
        f"tokenizer of model.path in {Path(beside)}: the model knows none of its ids; set "
        f"tokenizer.path={source.path} unless it is meant to learn them anew"
    ]
