"""Metrics, warnings, samples to read and held-out evaluation of an RL stage."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import WarnOnce, storage_errors
from ernie_train.data import Record
from ernie_train.environments import Toolbox
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.eval.prompts import user_prompt
from ernie_train.generate.engines import Engine
from ernie_train.io.healthy import ranges_of
from ernie_train.losses import PairCounts
from ernie_train.rewards.scoring import RewardPart
from ernie_train.rl.batch import RolloutBatch
from ernie_train.rl.config import RolloutConfig, UpoConfig
from ernie_train.rl.data import Prompt
from ernie_train.rl.rollout import Rollout, ScoredCompletion
from ernie_train.train.stage import StageRun
from ernie_train.train.trainer import StepResult

# What else helps against completions that are cut off, by `rollout.truncated`.
_REMEDIES_OF_TRUNCATION = {
    "keep": ", or punish truncation (rollout.truncated: punish with a truncation_penalty)",
    "punish": " or rollout.truncation_penalty",
    "ramp": ", rollout.overlong_tokens or rollout.truncation_penalty",
    "mask": "; they are left out (rollout.truncated: mask) and teach nothing",
}


class HealthWarnings:
    """Warns of the known red flags of RL, each with its remedy."""

    def __init__(self, rollout: RolloutConfig, say: Callable[[str], None]) -> None:
        self._warnings = WarnOnce(say)
        self._remedies = {"completions/truncated": _REMEDIES_OF_TRUNCATION[rollout.truncated]}

    def check(self, metrics: dict[str, float]) -> None:
        for healthy in ranges_of(metrics):
            if healthy.warns:
                value = metrics[healthy.metric]
                told = healthy.remedy.format(value) + self._remedies.get(healthy.metric, "")
                self._warnings.check(healthy, not healthy.holds(value), told)


def rollout_metrics(rollout: Rollout, *, every_group: bool = False) -> dict[str, float]:
    """Return rewards, lengths and the number of trained groups; empty without rollouts.

    every_group: the policy learns from groups of equal verdicts too.
    """
    completions = rollout.completions()
    if not completions:
        return {}
    kept = int(rollout.trained(every_group=every_group).any(-1).sum())
    metrics: dict[str, float] = {
        "completions/mean_length": float(np.mean([c.num_sampled for c in completions])),
        "completions/truncated": float(np.mean([not c.finished for c in completions])),
        "frac_reward_zero_std": 1.0 - float(rollout.informative.mean()),
        "groups_trained": kept,
        "prompts_per_trained_group": len(rollout.groups) / max(1, kept),
    }
    judged = zip(rollout.rewards, rollout.valid, strict=True)
    spread = [group[valid].std() for group, valid in judged if valid.sum() > 1]
    if spread:
        metrics["reward_std"] = float(np.mean(spread))  # within a group
    rewards = rollout.rewards.reshape(-1)
    valid = [(c, r) for c, r in zip(completions, rewards, strict=True) if c.score.trains]
    by_domain: dict[str, list[tuple[ScoredCompletion, float]]] = defaultdict(list)
    for completion, reward in valid:
        by_domain[completion.domain].append((completion, reward))
    for suffix, own in [("", valid), *((f"/{d}", by_domain[d]) for d in sorted(by_domain))]:
        if own:
            metrics[f"reward{suffix}"] = float(np.mean([reward for _, reward in own]))
            correct = [c.score.status == "correct" for c, _ in own]
            metrics[f"accuracy{suffix}"] = float(np.mean(correct))
    for label in sorted({label for c, _ in valid for label in c.reward_parts}):
        parts = [c.reward_parts[label] for c, _ in valid if label in c.reward_parts]
        metrics[f"reward_part/{label}"] = float(np.mean(parts))
    metrics |= _episode_metrics([c.turns for c in completions if c.turns])
    excluded = Counter(c.score.status for c in completions if not c.score.trains)
    metrics |= {f"excluded/{status}": excluded[status] for status in sorted(excluded)}
    return metrics


def reward_model_metrics(rollout: Rollout, parts: Sequence[RewardPart]) -> dict[str, float]:
    """Return how each reward model's scores are spread, and what they go with.

    saturated: the share at its bounds; length_correlation: Pearson's, with the tokens of a
    completion, absent where either does not vary.
    """
    metrics: dict[str, float] = {}
    for part in parts:
        name = part.label
        # An audit puts its own parts in the place of the stage's, and a replay may have others.
        judged = [c for c in rollout.completions() if c.score.trains and name in c.reward_parts]
        if part.model is None or not judged:
            continue
        scores = np.array([c.reward_parts[name] for c in judged])
        lengths = np.array([c.num_sampled for c in judged])
        metrics[f"{name}/std"] = float(scores.std())
        metrics[f"{name}/saturated"] = float((np.abs(scores) >= part.model.clip).mean())
        if scores.std() > 0 and lengths.std() > 0:
            metrics[f"{name}/length_correlation"] = float(np.corrcoef(scores, lengths)[0, 1])
    return metrics


def _episode_metrics(episodes: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return turns and calls of an episode, and the share of calls that failed."""
    if not episodes:
        return {}
    results = [m for messages in episodes for m in messages if m["role"] == "tool"]
    turns = sum(map(len, episodes)) - len(results)
    failed = sum(bool(result["failed"]) for result in results)
    return {
        "episodes/turns": turns / len(episodes),
        "episodes/tool_calls": len(results) / len(episodes),
        "episodes/tool_errors": failed / max(1, len(results)),
    }


def pair_metrics(counts: PairCounts) -> dict[str, float]:
    """Return how many prompts gave an online pair, and why others did not."""
    return {
        "pairs": counts.pairs,
        "pairs/below_margin": counts.below_margin,
        "pairs/too_few_valid": counts.too_few_valid,
        "pairs/tied": counts.tied,
        "pairs/chosen_longer": counts.chosen_longer,
    }


def mean_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """Return the mean of each metric over the steps that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for name, value in result.metrics.items():
            values[name].append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}


def append_samples(
    path: Path,
    iteration: int,
    rollout: Rollout,
    advantages: Mapping[int, float],
    prompts: Sequence[Prompt],
    count: int,
) -> None:
    """Append `count` completions of an iteration with their reward parts, evenly picked.

    advantages: mean advantage by place among the rollout's completions, where there is one.
    """
    completions, rewards = rollout.completions(), rollout.rewards.reshape(-1)
    if not completions or not count:
        return
    number = min(count, len(completions))
    lines = []
    for at in np.unique(np.linspace(0, len(completions) - 1, number).astype(int)):
        c = completions[at]
        row = {
            "step": iteration,
            "task": c.task,
            "prompt": user_prompt(prompts[c.prompt].record),
            "completion": c.text,
            **({"turns": c.turns} if c.turns else {}),
            "tokens": c.num_sampled,
            "finished": c.finished,
            "reward": float(rewards[at]),
            "parts": c.reward_parts,
            "status": c.score.status,
            "detail": c.score.detail,
            "advantage": advantages.get(int(at)),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with storage_errors("cannot write the samples", path), path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def mean_advantages(batch: RolloutBatch) -> dict[int, float]:
    """Return the mean advantage of each trained completion, by place in the rollout."""
    return {
        at: float(array.mean())
        for at, array in enumerate(batch.advantages)
        if array is not None and batch.is_trained(at)
    }


def evaluate_held_out(
    config: UpoConfig,
    stage: StageRun,
    problems: Sequence[Record],
    toolbox: Toolbox | None = None,
    engine: Engine | None = None,
) -> dict[str, float]:
    """Return accuracy on held-out problems as eval/<task>, eval/<domain>, eval/mean.

    With several samples: pass@k and maj@n, with the ends of their intervals, by task.
    """
    settings = config.evaluation
    if settings is None:
        return {}
    found = evaluate(
        stage.model,
        stage.data.tokenizer,
        problems,
        EvalConfig(
            max_new_tokens=config.rollout.max_new_tokens,
            batch_size=config.rollout.batch_size,
            samples=settings.samples,
            temperature=settings.temperature,
            seed=stage.data.seed,
        ),
        toolbox=toolbox,
        engine=engine,
        stop_requested=stage.stop_requested,
    )
    metrics = {f"eval/{task.task}": task.accuracy for task in found.tasks}
    metrics |= {f"eval/{domain}": accuracy for domain, (accuracy, _) in found.domains().items()}
    metrics["eval/mean"] = found.mean_accuracy
    if settings.samples > 1:
        for task in found.tasks:
            for name, estimate in task.estimates.items():
                place = f"eval/{task.task}/{name}"
                metrics[place] = estimate.value
                metrics |= {f"{place}/low": estimate.low, f"{place}/high": estimate.high}
    return metrics
