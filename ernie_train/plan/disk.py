"""Estimate what a run writes to disk: checkpoints of its stages, and dumps of recorded experts."""

from __future__ import annotations

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.plan.layout import (
    Precision,
    count_parameters,
    count_trained,
    critic_parameters,
    moe_layers,
)
from ernie_train.plan.workload import Sampling
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import AnyStageConfig, UpoConfig


def checkpoint_bytes(
    config: Ernie4_5_MoeConfig,
    precision: Precision,
    stage: AnyStageConfig,
    *,
    optimizer: bool = True,
) -> float:
    """Return the bytes of one checkpoint: what the stage trains, and the state of its optimizer."""
    part = count_trained(config, stage)
    trained = count_parameters(config) if part is None else part.trained
    count = trained.total
    if isinstance(stage, UpoConfig) and stage.critic is not None:
        count += critic_parameters(config).total
    return float(count * (precision.width + optimizer * precision.state_width))


def run_bytes(recipe: Recipe, config: Ernie4_5_MoeConfig, precision: Precision) -> float:
    """Return the most bytes of checkpoints at a time.

    Each finished stage keeps its own, without optimizer state from the start of the next one on
    unless it says otherwise. An earlier checkpoint is deleted once the next is whole.
    """
    most, kept = 0.0, 0.0
    for stage in recipe.stages:
        settings = stage.checkpoint
        count = settings.keep_last + (settings.best_metric is not None)
        most = max(most, kept + (count + 1) * checkpoint_bytes(config, precision, stage))
        keeps = settings.keep_optimizer
        kept += count * checkpoint_bytes(config, precision, stage, optimizer=keeps)
    return most


def dumped_bytes(config: Ernie4_5_MoeConfig, sampling: Sampling) -> float:
    """Return the most bytes of experts that an iteration's dump has, in base64, uncompressed.

    Each completion is written with its prompt.
    """
    tokens = sampling.total * (sampling.prompt_tokens + sampling.new_tokens)
    return 2.0 * moe_layers(config) * config.moe_k * tokens * 4 / 3
