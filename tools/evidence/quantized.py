"""Measure what quantization loses: exports of a run in each scheme, solving its held-out problems.

    python -m tools.evidence.quantized runs/tiny [--n 60]

It prints a table as Markdown. KL is that of next tokens along held-out prompts and their greedy
completions, from the model that is not quantized; the change in solved problems is paired.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from ernie_train.cli.model import export_model, open_model
from ernie_train.core.terminal import progress_bar
from ernie_train.eval.estimates import Estimate, bootstrap
from ernie_train.eval.evaluation import EvalConfig, evaluate
from ernie_train.eval.problems import load_problems
from ernie_train.run.proof import Trace, own_logits, trace
from ernie_train.run.quantize import QuantizeConfig
from tools.evidence.serving import prompts_of

VARIANTS: dict[str, QuantizeConfig | None] = {"not quantized": None} | {
    f"{to}, {method}": QuantizeConfig.model_validate({"to": to, "method": method})
    for to in ("int8", "int4")
    for method in ("rtn", "gptq")
}


def kl(expected: Trace, found: Sequence[np.ndarray]) -> float:
    """Return the mean over positions of KL(p || q) in nats, p of `expected` and q of `found`."""
    total = positions = 0.0
    for ours, theirs in zip(expected.logits, found, strict=True):
        log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (ours, theirs))
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
        positions += len(ours)
    return total / positions


def change(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Return the mean paired difference of scores in 0..1 and its interval."""
    halves = [(b - a + 1) / 2 for a, b in zip(before, after, strict=True)]
    found = bootstrap(halves)
    return Estimate(*(2 * x - 1 for x in (found.value, found.low, found.high)))


def shown(estimate: Estimate, sign: str = "") -> str:
    """Return an estimate in percent with its interval."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def main() -> None:
    """Export, evaluate and print the table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=60, help="problems of each task")
    options = parser.parse_args()
    problems, console = load_problems("data/test", max_examples=options.n), Console(stderr=True)
    lines, base = [], None
    with tempfile.TemporaryDirectory(prefix="ernie_train_quantized_") as folder:
        for number, (name, config) in enumerate(VARIANTS.items()):
            out = Path(folder) / str(number)
            export_model(options.run, out, "float32", "5GB", None, console, quantize=config)
            model, tokenizer = open_model(out)
            megabytes = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
            solved = evaluate(model, tokenizer, problems, EvalConfig(max_new_tokens=128),
                              progress=partial(progress_bar, console, name))  # fmt: skip
            scores = [float(sample["value"] or 0.0) for sample in solved.samples]
            if base is None:
                base = trace(model, prompts_of(tokenizer)), scores
            far = kl(base[0], list(own_logits(model, base[0].sequences)))
            lost = "" if config is None else shown(change(base[1], scores), "+")
            lines.append(
                f"| {name} | {megabytes:.1f} | {shown(bootstrap(scores))} | {lost} | {far:.1e} |"
            )
    print("| export | MB | solved, % | change | KL, nats a token |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
