"""What an RL stage shows: metrics of rollouts and pairs, samples to read, warnings, evaluation."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import WarnOnce, storage_errors
from ernie_train.data import Record
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.losses import PairCounts
from ernie_train.rl.config import UpoConfig
from ernie_train.rl.rollout import Group, Problem
from ernie_train.train.stage import StageRun
from ernie_train.train.trainer import StepResult

# Metric, what is wrong with it, and the remedy. The bounds are those at which runs are known to
# have gone astray, not laws.
_RED_FLAGS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "completions/truncated",
        lambda value: value > 0.2,
        "{:.0%} of the completions are cut off: raise max_new_tokens, or punish truncation",
    ),
    (
        "frac_reward_zero_std",
        lambda value: value > 0.8,
        "{:.0%} of the groups have one reward for all completions and teach nothing: take prompts "
        "of middling difficulty, a larger group_size, or refill_rounds",
    ),
    (
        "kl",
        lambda value: value > 0.5,
        "the policy is {:.2f} nats a token away from its start: raise kl.coef or lower optim.lr",
    ),
    (
        "entropy",
        lambda value: value < 0.01,
        "entropy fell to {:.4f} nats: completions are nearly all alike; raise entropy_coef, "
        "clip_ratio_high or temperature, or lower optim.lr",
    ),
    (
        "entropy",
        lambda value: value > 3.0,
        "entropy rose to {:.1f} nats: completions become noise; lower optim.lr or entropy_coef",
    ),
)


class Watch:
    """Warns of the known red flags of RL, each with its remedy."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._alerts = WarnOnce(say)

    def look(self, metrics: dict[str, float]) -> None:
        for number, (name, wrong, text) in enumerate(_RED_FLAGS):
            if name in metrics:
                value = metrics[name]
                self._alerts.check(number, wrong(value), text.format(value))


def rollout_metrics(groups: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths and what became of the groups; empty without rollouts."""
    samples = [s for group in groups for s in group]
    if not samples:
        return {}
    valid = [s for s in samples if s.score.trains]
    metrics: dict[str, float] = {
        "completions/mean_length": float(np.mean([len(s.completion_ids) for s in samples])),
        "completions/truncated": float(np.mean([not s.finished for s in samples])),
        "frac_reward_zero_std": 1.0 - len(kept) / len(groups),
        "groups_trained": len(kept),
        "prompts_per_trained_group": len(groups) / max(1, len(kept)),
    }
    if valid:
        metrics["reward"] = float(np.mean([s.reward for s in valid]))
        metrics["accuracy"] = float(np.mean([s.score.status == "correct" for s in valid]))
    by_domain: dict[str, list[Any]] = defaultdict(list)
    for s in valid:
        by_domain[s.domain].append(s)
    for domain in sorted(by_domain):
        own = by_domain[domain]
        metrics[f"reward/{domain}"] = float(np.mean([s.reward for s in own]))
        metrics[f"accuracy/{domain}"] = float(np.mean([s.score.status == "correct" for s in own]))
    for label in sorted({label for s in valid for label in s.parts}):
        metrics[f"reward_part/{label}"] = float(np.mean([s.parts.get(label, 0.0) for s in valid]))
    excluded = Counter(s.score.status for s in samples if not s.score.trains)
    metrics |= {f"excluded/{status}": excluded[status] for status in sorted(excluded)}
    return metrics


def pair_metrics(counts: PairCounts) -> dict[str, float]:
    """What became of the prompts on the way to online pairs."""
    return {
        "pairs": counts.pairs,
        "pairs/below_margin": counts.below_margin,
        "pairs/too_few_valid": counts.too_few_valid,
        "pairs/tied": counts.tied,
        "pairs/chosen_longer": counts.chosen_longer,
    }


def mean_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """The mean of each metric over the steps that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for name, value in result.metrics.items():
            values[name].append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}


def sample_lines(
    path: Path, iteration: int, groups: Sequence[Group], problems: Sequence[Problem], count: int
) -> None:
    """Appends `count` completions of an iteration with their reward parts, evenly picked."""
    samples = [s for group in groups for s in group]
    if not samples or not count:
        return
    picked = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int))
    lines = []
    for at in picked:
        s = samples[at]
        advantage = None if s.advantages is None else float(s.advantages.mean())
        row = {
            "step": iteration,
            "task": s.task,
            "prompt": problems[s.problem].record.prompt_messages[-1]["content"],
            "completion": s.text,
            "tokens": len(s.completion_ids),
            "finished": s.finished,
            "reward": s.reward,
            "parts": s.parts,
            "status": s.score.status,
            "detail": s.score.detail,
            "advantage": advantage,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with storage_errors("cannot write the samples", path), path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def evaluate_held_out(
    config: UpoConfig, stage: StageRun, problems: Sequence[Record]
) -> dict[str, float]:
    """Accuracy on held-out problems as eval/<task>, eval/<domain> and eval/mean; pass@k beside."""
    settings = config.evaluation
    if settings is None:
        return {}
    found = evaluate(
        stage.model,
        stage.data.tokenizer,
        problems,
        EvalConfig(
            max_new_tokens=config.max_new_tokens,
            batch_size=config.rollout_batch_size,
            samples=settings.samples,
            temperature=settings.temperature,
            seed=stage.data.seed,
        ),
        stop_requested=lambda: stage.stop.requested,
    )
    metrics = {f"eval/{task.task}": task.accuracy for task in found.tasks}
    metrics |= {f"eval/{domain}": accuracy for domain, (accuracy, _) in found.domains().items()}
    metrics["eval/mean"] = found.mean_accuracy
    if settings.samples > 1:
        for task in found.tasks:
            metrics[f"eval/{task.task}/pass@{settings.samples}"] = task.pass_at_k
    return metrics
