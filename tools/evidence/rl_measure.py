"""Measures a policy on held-out problems, and how far it is from the policy that it came from.

    python -m tools.evidence.rl_measure MODEL --start START --tasks logic --others math --out FILE

Greedy completions give the accuracy, on `tasks` and on `others` that the policy was not trained on.
Completions of `tasks` sampled at temperature 1 give the rest: KL to the start is the mean of
log p(completion) - log p_start(completion) over the policy's own, for a completion and for a token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.cli.model import open_model
from ernie_train.data import Record, Tokenizer
from ernie_train.eval.evaluation import EvalConfig, evaluate, load_problems
from ernie_train.eval.prompts import completion_text, encode_prompt, problem_row
from ernie_train.generate.engine import generate
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import micro_batches, policy_logprobs
from ernie_train.rl.rollout import Sample
from tools.evidence.ablate_rl_rewards import mentions

HELD_OUT = Path(__file__).resolve().parents[2] / "data" / "test"
MAX_NEW_TOKENS = 96
BATCH = 64  # completions that go through a model together
SEED = 0  # of sampling: the same for every policy


def solved(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, problems: Sequence[Record]
) -> dict[str, float]:
    """Greedy accuracy, a mean over tasks, and of each; what the loose reward says beside it."""
    found = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=MAX_NEW_TOKENS))
    told = zip(problems, found.samples, strict=True)
    loose = [mentions(problem_row(row, True), sample["completion"]) for row, sample in told]
    return {
        "accuracy": found.mean_accuracy,
        **{f"accuracy/{task.task}": task.accuracy for task in found.tasks},
        "loose": float(np.mean(loose)),
        "greedy_length": float(np.mean([sample["tokens"] for sample in found.samples])),
        "greedy_truncated": float(np.mean([task.truncated for task in found.tasks])),
    }


def sample(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, problems: Sequence[Record]
) -> list[Sample]:
    """One completion of each problem at temperature 1."""
    prompts = [encode_prompt(tokenizer, problem, thinking=True) for problem in problems]
    completions = generate(
        model,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        seed=SEED,
        eos_token_id=tokenizer.stop_token_ids,
    )
    return [
        Sample(i, prompt, c.ids, text=completion_text(tokenizer, c), finished=c.finished)
        for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True))
    ]


def distance(
    policy: Ernie4_5_MoeForCausalLM, start: Ernie4_5_MoeForCausalLM, samples: Sequence[Sample]
) -> dict[str, float]:
    """KL to the start and entropy in nats, and lengths, of completions that `policy` sampled."""
    import paddle

    gaps: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    with paddle.no_grad():
        for batch in micro_batches(samples, [], BATCH):
            ours, entropy, _ = policy_logprobs(policy, batch, temperature=1.0, with_entropy=True)
            theirs, _, _ = policy_logprobs(start, batch, temperature=1.0)
            gaps.append((ours - theirs).numpy().astype(np.float64))
            entropies.append(np.zeros(0) if entropy is None else entropy.numpy())
    total = float(np.concatenate(gaps).sum())
    tokens = sum(len(s.completion_ids) for s in samples)
    return {
        "kl_completion": total / len(samples),
        "kl_token": total / tokens,
        "entropy": float(np.concatenate(entropies).mean()),
        "length": tokens / len(samples),
        "truncated": float(np.mean([not s.finished for s in samples])),
    }


def measure(
    model: Path, start: Path, tasks: list[str], others: list[str], problems: int
) -> dict[str, Any]:
    """All figures of a policy, on the first `problems` held-out ones of each task."""
    policy, tokenizer = open_model(model)
    reference, _ = open_model(start)
    policy.eval()
    reference.eval()
    held_out = load_problems(HELD_OUT, tasks=tasks, max_examples=problems)
    samples = sample(policy, tokenizer, held_out)
    figures = {**solved(policy, tokenizer, held_out), **distance(policy, reference, samples)}
    if others:
        elsewhere = load_problems(HELD_OUT, tasks=others, max_examples=max(1, problems // 3))
        figures["elsewhere"] = solved(policy, tokenizer, elsewhere)["accuracy"]
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--others", nargs="*", default=[])
    parser.add_argument("--problems", type=int, default=300, help="of each of the tasks")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    figures = measure(options.model, options.start, options.tasks, options.others, options.problems)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
