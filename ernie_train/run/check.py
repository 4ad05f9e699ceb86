"""The `check` verb: validate recipe, model, tokenizer and data without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.syntax import Syntax

from ernie_train.core import devices
from ernie_train.core.errors import ConfigError, UserError
from ernie_train.data import Record, Tokenizer, forgeable_turns, load_tokenizer
from ernie_train.eval.gates import known_metrics
from ernie_train.eval.problems import load_problems, require_verifiers
from ernie_train.eval.prompts import check_problems
from ernie_train.model import Ernie4_5_MoeConfig
from ernie_train.model.partial import trained_sizes
from ernie_train.parallel import (
    Recompute,
    RecomputeConfig,
    check_expert_degree,
    has_moe_layers,
)
from ernie_train.rl import UpoConfig
from ernie_train.rl.reward import find_reward_model
from ernie_train.run.recipe import Recipe
from ernie_train.run.stages import STAGES, AnyStageConfig, StageData
from ernie_train.train.supervised_data import SupervisedConfig
from ernie_train.weights.hf import load_config
from ernie_train.weights.layout import parameter_shapes
from ernie_train.weights.model_directory import find_model

HIGHEST_LR = 0.05  # even a model of a few million parameters diverges above it
# Letters, digits, code, spaces and Chinese: different vocabularies split some of it otherwise.
_PROBE = "The quick brown foxes jumped: 2024 + 17 = ?\n\n    def f(x):\treturn x**2  # 最终答案是 é"


def check_device(recipe: Recipe, device: str) -> None:
    """Raise `ConfigError` for settings of bfloat16 weights where `device` computes in float32."""
    if devices.compute_dtype(device) == "bfloat16":
        return
    problems = []
    for index, stage in enumerate(recipe.stages):
        critic = stage.critic if isinstance(stage, UpoConfig) else None
        for path, part in (("", stage), ("critic.", critic)):
            if part is not None and part.optim.gradient_dtype == "bfloat16":
                problems.append(
                    f"stages.{index}.{path}optim.gradient_dtype=bfloat16 has no effect: weights "
                    f"are float32 on this {device}"
                )
    if problems:
        raise ConfigError(problems)


def print_resolved(recipe: Recipe, console: Console) -> None:
    """Print a recipe with all its keys, those that it leaves out with their defaults."""
    resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    console.print(Syntax(resolved, "yaml", background_color="default"))


def check_recipe(recipe: Recipe, console: Console) -> None:
    """Print the model's size, and for each stage its batch and data.

    Raises the errors that a run would raise before its first step, except for what may exist on
    another machine only: GPUs, a model, its tokenizer. Those are printed.
    """
    base_dir = Path.cwd()
    recipe.loggers(base_dir).check()
    if recipe.device == "gpu" and (missing := devices.why_no_gpu()):
        console.print(f"device: gpu, but here {missing}. A run needs a GPU.", highlight=False)
    else:
        check_device(recipe, devices.select_device(recipe.device))
    tokenizer = _tokenizer_or_fallback(recipe, base_dir, console)
    for line in recipe_warnings(recipe, tokenizer):
        console.print(line, highlight=False)
    config = recipe.model.build()
    config = config.with_overrides({"vocab_size": recipe.vocabulary(config, tokenizer)})
    if recipe.model.is_absent:
        console.print(recipe.model.missing_model_message(), highlight=False)
    check_fit(recipe, config, tokenizer)
    check_reward_models(recipe, base_dir)
    total, active = config.num_parameters()
    console.print(
        f"model: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M active for a token; "
        f"tokenizer: {tokenizer.vocab_size} tokens",
        highlight=False,
    )
    for index, stage in enumerate(recipe.stages):
        _check_stage(stage, StageData(base_dir, tokenizer, recipe.stage_seed(index)), console)
        if line := describe_training(stage, config):
            console.print(line, highlight=False)
    if problems := check_evaluation(recipe, config, tokenizer, base_dir):
        tasks = Counter(record.fields["task"] for record in problems)
        most = recipe.evaluation.max_examples if recipe.evaluation else None
        solved = sum(count if most is None else min(count, most) for count in tasks.values())
        console.print(f"evaluation: {solved} problems of {len(tasks)} tasks")


def _tokenizer_or_fallback(recipe: Recipe, base_dir: Path, console: Console) -> Tokenizer:
    source = recipe.tokenizer
    if not source.is_absent(base_dir):
        return recipe.load_tokenizer(base_dir)
    console.print(
        f"tokenizer: nothing at {source.path}; {source.stand_in} stands in for it, so the token "
        "counts below differ from a run's. A run needs the model's own: tokenizer.path=...",
        highlight=False,
    )
    return recipe.load_tokenizer(base_dir, stand_in=True)


def check_evaluation(
    recipe: Recipe, config: Ernie4_5_MoeConfig, tokenizer: Tokenizer, base_dir: Path
) -> list[Record]:
    """Return the recipe's problems, none without an evaluation, if all can be asked and scored."""
    if (asked := recipe.evaluation) is None:
        return []
    problems = load_problems(base_dir / asked.path, columns=asked.columns)
    require_verifiers(problems)
    check_gates(recipe, problems)
    room = config.max_position_embeddings - (asked.max_new_tokens or 1)
    examples = asked.examples(base_dir, recipe.seed)
    check_problems(tokenizer, problems, room, asked.environment, base_dir, examples)
    return problems


def check_gates(recipe: Recipe, problems: Sequence[Record]) -> None:
    """Raise `ConfigError` for a gate on a metric that evaluating `problems` does not produce."""
    known = known_metrics(problems)
    wrong = [
        f"stages.{index}.gate.metric={stage.gate.metric}: never produced; there are "
        f"{', '.join(sorted(known))}"
        for index, stage in enumerate(recipe.stages)
        if stage.gate is not None and stage.gate.metric not in known
    ]
    if wrong:
        raise ConfigError(wrong)


def _recompute_problems(recompute: Recompute, config: Ernie4_5_MoeConfig) -> list[str]:
    if not isinstance(recompute, RecomputeConfig):
        return []
    problems = []
    if (recompute.layers or 0) > config.num_hidden_layers:
        problems.append(
            f"parallel.recompute.layers={recompute.layers}: the model has "
            f"{config.num_hidden_layers} layers"
        )
    if recompute.chunk_tokens and config.moe_capacity_factor is not None:
        problems.append(
            f"parallel.recompute.chunk_tokens={recompute.chunk_tokens}: moe_capacity_factor="
            f"{config.moe_capacity_factor} counts over a whole micro-batch; leave one of them out"
        )
    return problems


def check_fit(recipe: Recipe, config: Ernie4_5_MoeConfig, tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` if tokenizer, sequence lengths layout or export do not fit the model."""
    problems = []
    degree = recipe.parallel.expert
    if degree > 1 and not has_moe_layers(config):
        problems.append(f"parallel.expert={degree} has no effect: the model has no MoE layer")
    try:
        check_expert_degree(degree, config)
    except ConfigError as error:
        problems += error.problems
    problems += _recompute_problems(recipe.parallel.recompute, config)
    if recipe.export is not None and recipe.export.quantize is not None:
        try:
            recipe.export.quantize.scheme(config)
        except UserError as error:
            problems.append(f"export.quantize: {error}")
    if tokenizer.vocab_size > config.vocab_size:
        problems.append(
            f"tokenizer.path: {recipe.tokenizer.path} has {tokenizer.vocab_size} tokens, "
            f"the model only vocab_size={config.vocab_size}"
        )
    theta, limit = config.rope_theta, config.max_position_embeddings
    for index, stage in enumerate(recipe.stages):
        scheduled = isinstance(stage, SupervisedConfig) and stage.rope_schedule is not None
        # A schedule raises the limit of a loaded model; with a preset the recipe sets it.
        if scheduled and recipe.model.path is not None:
            limit = max(limit, *stage.lengths().values())
        problems += _length_problems(stage, f"stages.{index}", limit)
        problems += _capacity_problems(stage, f"stages.{index}", config)
        problems += _balance_problems(stage, f"stages.{index}", config)
        added = index == 0 and bool(recipe.tokenizer.add)
        problems += _training_problems(stage, f"stages.{index}", config, new_tokens=added)
        if isinstance(stage, SupervisedConfig) and stage.rope_schedule:
            first = stage.rope_schedule[0].rope_theta
            if first < theta:
                problems.append(
                    f"stages.{index}.rope_schedule.0.rope_theta={first:g} lies below the "
                    f"{theta:g} that the model has then: a schedule never goes down "
                    "(a preset starts where model.rope_theta says)"
                )
            theta = stage.rope_schedule[-1].rope_theta
    if problems:
        raise ConfigError(problems)


def check_reward_models(recipe: Recipe, base_dir: Path) -> None:
    """Raise `ConfigError` where ranks cannot hold equal parts of a reward model's experts.

    One that is not there yet is left to its stage.
    """
    problems = []
    for index, stage in enumerate(recipe.stages):
        rewards = stage.rewards() if isinstance(stage, UpoConfig) else []
        for model in [p.model for reward in rewards for p in reward.parts if p.model is not None]:
            try:
                weights = find_reward_model(base_dir / model.path).weights
            except UserError:
                continue
            try:
                check_expert_degree(recipe.parallel.expert, load_config(weights))
            except ConfigError as error:
                where = f"stages.{index}: the reward model {model.path}: "
                problems += [where + problem for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def _length_problems(stage: AnyStageConfig, path: str, limit: int) -> list[str]:
    return [
        f"{path}.{name}={length} exceeds the model's max_position_embeddings={limit}, which a "
        "rope_schedule raises where the model is loaded, model.max_position_embeddings elsewhere"
        for name, length in stage.lengths().items()
        if length > limit
    ]


def _capacity_problems(stage: AnyStageConfig, path: str, config: Ernie4_5_MoeConfig) -> list[str]:
    if not (isinstance(stage, UpoConfig) and config.moe_capacity_factor):
        return []
    return [
        f"{path}: moe_capacity_factor={config.moe_capacity_factor} drops tokens in updates, by "
        "what else is in a micro-batch, and none in rollouts: their log-probabilities would "
        "differ; set model.moe_capacity_factor=null"
    ]


def _balance_problems(stage: AnyStageConfig, path: str, config: Ernie4_5_MoeConfig) -> list[str]:
    if has_moe_layers(config):
        return []
    idle = [
        f"{path}.balance.{name}={getattr(stage.balance, name):g} has no effect: the model has no "
        "MoE layer, so neither router nor selection bias"
        for name in stage.balance.active()
    ]
    if isinstance(stage, UpoConfig) and stage.policy.router_replay:
        idle.append(f"{path}.policy.router_replay has no effect: the model has no MoE layer")
    return idle


def _training_problems(
    stage: AnyStageConfig, path: str, config: Ernie4_5_MoeConfig, *, new_tokens: bool
) -> list[str]:
    """Return what is wrong with `lora`, `train` and `freeze` for a model of `config`."""
    try:
        selection = stage.selection(parameter_shapes(config))
    except ConfigError as error:
        return [f"{path}.{problem}" for problem in error.problems]
    if selection is None:
        return []
    problems = []
    if stage.lora is not None and stage.lora.dropout and stage.kind in ("dpo", "upo"):
        problems.append(
            f"{path}.lora.dropout={stage.lora.dropout:g}: policy and reference must compute alike; "
            "only pretrain, sft and reward may drop"
        )
    if new_tokens and not any("embed_tokens" in n for n in selection.whole + selection.adapted):
        problems.append(
            f"{path}: the embedding is frozen, so that tokens of tokenizer.add would stay the mean "
            "of the others; train: [embed_tokens] trains it"
        )
    routers = any(name.endswith(".mlp.gate.weight") for name in parameter_shapes(config))
    for name in ("orthogonal_coef", "bias_update_rate"):
        if routers and not selection.trains_routers and getattr(stage.balance, name):
            problems.append(
                f"{path}.balance.{name}={getattr(stage.balance, name):g} has no effect: routers "
                "are frozen; train: [mlp.gate] trains them"
            )
    return problems


def describe_training(stage: AnyStageConfig, config: Ernie4_5_MoeConfig) -> str:
    """Return how much of the model a stage trains, as a line; "" for all of it."""
    shapes = parameter_shapes(config)
    selection = stage.selection(shapes)
    if selection is None:
        return ""
    count = sum(trained_sizes(shapes, selection, stage.lora).values())
    total, _ = config.num_parameters()
    parts = []
    if stage.lora:
        method = "DoRA" if stage.lora.dora else "LoRA"
        parts = [f"{method} of rank {stage.lora.rank} on {len(selection.adapted)} weights"]
    parts += [f"{len(selection.whole)} tensors as a whole"] if selection.whole else []
    return f"trains {count:,} of {total:,} parameters ({count / total:.2%}): {' and '.join(parts)}"


def _check_stage(stage: AnyStageConfig, data: StageData, console: Console) -> None:
    prepared = STAGES[stage.kind].prepare(stage, data)
    console.rule(f"stage {stage.name} ({stage.kind})")
    console.print(prepared.report.as_table())
    STAGES[stage.kind].describe(stage, data, prepared, console)


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
    if any(stage.kind != "pretrain" for stage in recipe.stages):
        lines += [line] if (line := forgeable_turns(tokenizer)) else []
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
