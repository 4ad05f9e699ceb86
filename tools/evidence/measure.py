"""Measurements of finished runs: a sweep names one of them.

    python -m tools.evidence.measure balance RUN_DIR OUT.json ['{"option": 1}']

Each returns the figures that tables and plots name.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ernie_train.cli.model import open_model
from ernie_train.core.config import load_yaml
from ernie_train.data import Record, Tokenizer
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import encode_prompt, problem_row
from ernie_train.generate.engine import generate
from ernie_train.io.metrics_log import read_metrics
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import RolloutBatch, TokenizedCompletion, micro_batches
from ernie_train.rl.estimators import policy_logprobs, sequence_logprobs
from tools.data import make_needles
from tools.data.make_needles import NeedleText
from tools.evidence import main_job
from tools.evidence.passes import solve
from tools.evidence.rivals import tokens_of
from tools.evidence.rl_rewards import mentions
from tools.evidence.runs import write_json

Figures = dict[str, Any]

# ---- balance -------------------------------------------------------------------------------------

LAST_STEPS = 20  # over which the router's figures are averaged
ROUTER_FIGURES = ("load_cv", "load_max", "dead_experts", "router_entropy", "router_cosine")


def balance(run_dir: Path) -> Figures:
    """Return the router's figures, means over the last steps, and the last validation loss.

    Also the load's coefficient of variation after every step, for the plot.
    """
    rows = list(read_metrics(run_dir / "01-sft" / "metrics.jsonl"))
    keys = [f"moe/{name}" for name in ROUTER_FIGURES]
    return {
        **{key: statistics.fmean(row[key] for row in rows[-LAST_STEPS:]) for key in keys},
        "validation_loss": rows[-1]["validation_loss"],
        "load_cv_by_step": [round(row["moe/load_cv"], 4) for row in rows],
    }


# ---- needles -------------------------------------------------------------------------------------

LENGTHS = (64, 128, 256, 512)
TOKENS_AT_ONCE = 2048


def needles(run_dir: Path, *, rope_theta: float, texts: int = 100) -> Figures:
    """Return the share of facts found at each length, and by the octave of their distance.

    A model of another base than `rope_theta` is also read under that one, without training. `texts`
    of each length are tested, with six needles each.
    """
    model, tokenizer = open_model(run_dir)
    model.eval()
    figures: Figures = {"rope_theta": model.model.rope_theta}
    hits: list[tuple[int, bool]] = []
    for length in LENGTHS:
        seen = _hits_at(model, tokenizer, length, texts)
        figures[f"needles_{length}"] = len(seen)
        figures[f"accuracy_{length}"] = statistics.fmean(right for _, right in seen)
        hits += seen
    if model.model.rope_theta != rope_theta:
        model.set_rope_theta(rope_theta)
        for length in LENGTHS:
            seen = _hits_at(model, tokenizer, length, texts)
            figures[f"swapped_{length}"] = statistics.fmean(right for _, right in seen)
    return figures | {"by_distance": accuracy_by_distance(hits)}


def _hits_at(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, length: int, count: int
) -> list[tuple[int, bool]]:
    """Return `find_needles` of the test texts of a length, a few texts at a time."""
    rng = random.Random(f"{make_needles.SEED}/test/{length}")
    texts = [make_needles.make_text(rng, length) for _ in range(count)]
    rows = max(1, TOKENS_AT_ONCE // length)
    batches = (texts[at : at + rows] for at in range(0, count, rows))
    return [hit for batch in batches for hit in find_needles(model, tokenizer, batch)]


def find_needles(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, texts: Sequence[NeedleText]
) -> list[tuple[int, bool]]:
    """Return (distance in tokens, is the most probable next token the answer?) of every needle.

    Earlier answers stand in the text as they are; they are of other categories and give no hint
    about the next one. All texts must have the same number of tokens.
    """
    import paddle

    ids = np.array([tokenizer.encode(text.text) for text in texts])
    if ids.shape[1] != len(texts[0].words):
        raise ValueError(f"{len(texts[0].words)} words are {ids.shape[1]} tokens, not one each")
    found = [(row, needle) for row, text in enumerate(texts) for needle in text.needles]
    with paddle.no_grad():
        hidden = model.model(paddle.to_tensor(ids)).hidden
        asked = [row * ids.shape[1] + needle.asked_at for row, needle in found]
        top = model.logits(paddle.gather(hidden, paddle.to_tensor(asked))).numpy().argmax(-1)
    return [
        (needle.asked_at - needle.stated_at, bool(token == ids[row, needle.stated_at]))
        for token, (row, needle) in zip(top, found, strict=True)
    ]


def accuracy_by_distance(hits: Sequence[tuple[int, bool]]) -> dict[str, float]:
    """Return the accuracy at distances [2^k, 2^(k+1)), under the middle 1.5 * 2^k as text."""
    octaves: dict[int, list[bool]] = {}
    for distance, right in hits:
        octaves.setdefault(1 << (distance.bit_length() - 1), []).append(right)
    return {f"{1.5 * octave:g}": statistics.fmean(octaves[octave]) for octave in sorted(octaves)}


# ---- an RL policy --------------------------------------------------------------------------------

DOMAIN, LOOSE_DOMAIN = "logic", "math"  # of the arms with verifiers, of those with a loose reward
MAX_NEW_TOKENS = 96
BATCH = 64  # completions that go through a model together
SEED = 0  # of sampling: the same for every policy
# Curve of a run -> metric of its RL stage, by iteration.
CURVES = {"reward": "reward", "solved": "reward_part/row", "length": "completions/mean_length"}


def policy(run_dir: Path, *, problems: int, held_out: str) -> Figures:
    """Return the figures of a policy in the domain of its RL stage, and its curves, if it has any.

    The distance is that from the model that its recipe begins with.
    """
    recipe = load_yaml(run_dir / "recipe.yaml")
    start, data = recipe["model"]["path"], recipe["stages"][0]["data"][0]["path"]
    domain = Path(data).name.partition(".")[0]
    figures = policy_in_domain(
        run_dir, domain=domain, start=start, problems=problems, held_out=held_out
    )
    rows = list(read_metrics(run_dir / "01-rl" / "metrics.jsonl"))
    curves = {
        f"curve/{name}": [round(row[key], 4) for row in rows if key in row]
        for name, key in CURVES.items()
    }
    return {**figures, **curves}


def policy_in_domain(
    model: Path, *, domain: str, start: str, problems: int, held_out: str
) -> Figures:
    """Return all figures of a policy, on the first `problems` of each task in `held_out`.

    Greedy completions give the accuracy, in the domain and `elsewhere`, where it was not trained.
    Completions at temperature 1 give the distance from `start`.
    """
    policy, tokenizer = open_model(model)
    reference, _ = open_model(Path(start))
    policy.eval()
    reference.eval()
    own = load_problems(held_out, tasks=[domain], max_examples=problems)
    samples = _sample(policy, tokenizer, own)
    figures = {**_solve(policy, tokenizer, own), **distance(policy, reference, samples)}
    if domain != LOOSE_DOMAIN:
        others = load_problems(held_out, tasks=[LOOSE_DOMAIN], max_examples=max(1, problems // 3))
        figures["elsewhere"] = _solve(policy, tokenizer, others)["accuracy"]
    return figures


def _solve(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, problems: Sequence[Record]
) -> dict[str, float]:
    """Return greedy accuracy, a mean over tasks and of each, and what the loose reward accepts."""
    found = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=MAX_NEW_TOKENS))
    pairs = zip(problems, found.samples, strict=True)
    loose = [mentions(problem_row(row, tokenizer), sample["completion"]) for row, sample in pairs]
    return {
        "accuracy": found.mean_accuracy,
        **{f"accuracy/{task.task}": task.accuracy for task in found.tasks},
        "loose": float(np.mean(loose)),
        "greedy_length": float(np.mean([sample["tokens"] for sample in found.samples])),
        "greedy_truncated": float(np.mean([task.truncated for task in found.tasks])),
    }


class Sampled(NamedTuple):
    """A completion that a policy sampled, and whether it reached a stop token."""

    sequence: TokenizedCompletion
    finished: bool


def _sample(
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[Record],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Sampled]:
    """Return one completion of each problem at temperature 1."""
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    completions = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=SEED,
        eos_token_id=tokenizer.stop_token_ids,
    )
    return [
        Sampled(TokenizedCompletion(prompt, c.ids), c.finished)
        for prompt, c in zip(prompts, completions, strict=True)
    ]


def distance(
    policy: Ernie4_5_MoeForCausalLM, start: Ernie4_5_MoeForCausalLM, samples: Sequence[Sampled]
) -> dict[str, float]:
    """Return KL to the start and entropy in nats, and lengths, of completions of `policy`.

    KL is the mean of log p(completion) - log p_start(completion), for a completion and for a token.
    """
    import paddle

    gaps: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    sequences = [sample.sequence for sample in samples]
    with paddle.no_grad():
        for batch in micro_batches(RolloutBatch(sequences), range(len(sequences)), [], BATCH):
            ours, entropy, _ = policy_logprobs(policy, batch, temperature=1.0, with_entropy=True)
            theirs, _, _ = policy_logprobs(start, batch, temperature=1.0)
            gaps.append((ours - theirs).numpy().astype(np.float64))
            entropies.append(np.zeros(0) if entropy is None else entropy.numpy())
    total = float(np.concatenate(gaps).sum())
    tokens = sum(len(s.completion_ids) for s in sequences)
    return {
        "kl_completion": total / len(samples),
        "kl_token": total / tokens,
        "entropy": float(np.concatenate(entropies).mean()),
        "length": tokens / len(samples),
        "truncated": float(np.mean([not s.finished for s in samples])),
    }


# ---- pass@k of a policy --------------------------------------------------------------------------


def passes(run_dir: Path, **options: Any) -> Figures:
    """Return what `passes_of` does of a finished run, with its tokens and its curves."""
    recipe = load_yaml(run_dir / "recipe.yaml")
    figures = passes_of(run_dir, start=recipe["model"]["path"], **options)
    figures |= {f"tokens/{name}": n for name, n in tokens_of(run_dir).items()}
    rows = list(read_metrics(run_dir / "01-rl" / "metrics.jsonl"))
    curve = [round(row["accuracy"], 4) for row in rows if "accuracy" in row]
    return {**figures, "curve/solved": curve}


def passes_of(
    model: Path,
    *,
    start: str,
    problems: str,
    samples: int,
    ks: Sequence[int],
    max_new_tokens: int,
    unseen: str | None = None,
    unseen_samples: int = 8,
) -> Figures:
    """Return pass@k, length and distance from `start` of completions at temperature 1.

    Each figure is a mean over the problems of a file, and has its values under `by_problem`; pass@1
    also by task, and of the problems of `unseen`. The distance is that of a problem's first
    completion: log p - log p_start of all of its tokens.
    """
    policy, tokenizer = open_model(model)
    policy.eval()
    found = load_problems(problems)
    config = EvalConfig(max_new_tokens, samples=samples, temperature=1.0, seed=SEED, k=tuple(ks))
    values = solve(policy, tokenizer, found, config)
    if unseen is not None:
        fewer = replace(config, samples=unseen_samples, k=(1,))
        values["unseen"] = solve(policy, tokenizer, load_problems(unseen), fewer)["pass@1"]
    own = Path(start).resolve() == model.resolve()
    drawn = [s.sequence for s in _sample(policy, tokenizer, found, max_new_tokens)]
    values["kl"] = [0.0] * len(drawn) if own else _log_ratios(policy, Path(start), drawn)
    means = {name: float(np.mean(row)) for name, row in values.items()}
    return {**means, "by_problem": values}


def _log_ratios(
    policy: Ernie4_5_MoeForCausalLM, start: Path, drawn: Sequence[TokenizedCompletion]
) -> list[float]:
    """Return log p(completion) - log p_start(completion) in nats."""
    reference, _ = open_model(start)
    ours, theirs = (
        sequence_logprobs(model, drawn, temperature=1.0, batch_size=BATCH).logprobs
        for model in (policy, reference)
    )
    return [float(np.sum(a, dtype=np.float64) - np.sum(b, dtype=np.float64))
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip


MEASUREMENTS: dict[str, Callable[..., Figures]] = {
    "balance": balance,
    "needles": needles,
    "policy": policy,
    "policy_in_domain": policy_in_domain,
    "passes": passes,
    "passes_of": passes_of,
    "main_job": main_job.measured,
}


def main(arguments: list[str]) -> None:
    name, run_dir, out, *options = arguments
    figures = MEASUREMENTS[name](Path(run_dir), **json.loads(options[0] if options else "{}"))
    write_json(Path(out), figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
