"""Trains the model of recipes/long_context.yaml in four ways: docs/long_context.md's figures.

    python -m tools.evidence.ablate_long_context --out runs/long_context [--images docs/images]

The recipe as it stands; the same lengths with its first base all along, or with its last; and as
many tokens at the first length alone. Prints the table and writes table.md, results.json and
long_context.png. It may be stopped at any time; started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.cli.model import open_model
from ernie_train.core.config import load_yaml
from ernie_train.data import Tokenizer
from ernie_train.model import Ernie4_5_MoeForCausalLM
from tools.data import make_needles
from tools.data.make_needles import NeedleText
from tools.evidence.ablations import (
    ROOT,
    Arm,
    markdown_table,
    mean_and_spread,
    results_of,
    values_of,
)

RECIPE = "recipes/long_context.yaml"
NEEDLES = ROOT / "runs" / "needles"
LENGTHS = (64, 128, 256, 512)
TEXTS = 100  # of each length, with six needles each
TOKENS_AT_ONCE = 2048


def phases_of_recipe() -> list[dict[str, Any]]:
    schedule: list[dict[str, Any]] = load_yaml(ROOT / RECIPE)["stages"][0]["rope_schedule"]
    return schedule


def last_base() -> float:
    """The base that the recipe ends with."""
    return float(phases_of_recipe()[-1]["rope_theta"])


def arms() -> list[Arm]:
    """The recipe and what it is compared with, all with as many steps of as many tokens."""
    phases = phases_of_recipe()
    base, length = phases[0]["rope_theta"], phases[0]["seq_len"]
    steps = sum(phase["steps"] for phase in phases)
    schedule = "stages.pretrain.rope_schedule"

    def under(theta: float, first: int) -> tuple[str, ...]:
        """The base of the phases from `first` on."""
        return tuple(f"{schedule}.{at}.rope_theta={theta}" for at in range(first, len(phases)))

    short = f"{schedule}=[{{rope_theta: {base}, seq_len: {length}, steps: {steps}}}]"
    return [
        Arm("short-only", (short,)),
        Arm("base-kept", under(base, 1)),
        Arm("base-high", (f"model.rope_theta={last_base()}", *under(last_base(), 0))),
        Arm("base-raised"),
    ]


def found(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, texts: Sequence[NeedleText]
) -> list[tuple[int, bool]]:
    """(distance in tokens, whether the most probable next token is the answer) of every needle.

    The list's earlier answers stand in the text as they are; they are of other categories and tell
    nothing about the next one. All texts must have the same number of tokens.
    """
    import paddle

    ids = np.array([tokenizer.encode(text.text) for text in texts])
    if ids.shape[1] != len(texts[0].words):
        raise ValueError(f"{len(texts[0].words)} words are {ids.shape[1]} tokens, not one each")
    needles = [(row, needle) for row, text in enumerate(texts) for needle in text.needles]
    with paddle.no_grad():
        hidden = model.model(paddle.to_tensor(ids)).hidden
        asked = [row * ids.shape[1] + needle.asked_at for row, needle in needles]
        top = model.logits(paddle.gather(hidden, paddle.to_tensor(asked))).numpy().argmax(-1)
    return [
        (needle.asked_at - needle.told_at, bool(token == ids[row, needle.told_at]))
        for token, (row, needle) in zip(top, needles, strict=True)
    ]


def retrieval(run_dir: Path) -> dict[str, Any]:
    """Accuracy at each length, over all needles and by the octave of their distance.

    A model whose base stayed low is also read under the recipe's last base, without training.
    """
    model, tokenizer = open_model(run_dir)
    model.eval()
    figures: dict[str, Any] = {"rope_theta": model.model.rope_theta}
    hits: list[tuple[int, bool]] = []
    for length in LENGTHS:
        seen = hits_at(model, tokenizer, length)
        figures[f"needles_{length}"] = len(seen)
        figures[f"accuracy_{length}"] = statistics.fmean(right for _, right in seen)
        hits += seen
    if model.model.rope_theta != last_base():
        model.set_rope_theta(last_base())
        for length in LENGTHS:
            seen = hits_at(model, tokenizer, length)
            figures[f"swapped_{length}"] = statistics.fmean(right for _, right in seen)
    return figures | {"by_distance": by_distance(hits)}


def hits_at(
    model: Ernie4_5_MoeForCausalLM, tokenizer: Tokenizer, length: int
) -> list[tuple[int, bool]]:
    """`found` for the test texts of a length, a few at a time."""
    rng = random.Random(f"{make_needles.SEED}/test/{length}")
    texts = [make_needles.make_text(rng, length) for _ in range(TEXTS)]
    rows = max(1, TOKENS_AT_ONCE // length)
    batches = (texts[at : at + rows] for at in range(0, TEXTS, rows))
    return [hit for batch in batches for hit in found(model, tokenizer, batch)]


def by_distance(hits: Sequence[tuple[int, bool]]) -> dict[str, float]:
    """Accuracy over the needles at distances [2^k, 2^(k+1)), under the key 2^k."""
    octaves: dict[int, list[bool]] = {}
    for distance, right in hits:
        octaves.setdefault(1 << (distance.bit_length() - 1), []).append(right)
    return {str(octave): statistics.fmean(octaves[octave]) for octave in sorted(octaves)}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy in % of every arm at every length: mean and standard deviation over the seeds."""
    lines = [(arm.name, arm.name, "accuracy") for arm in arms()]
    low = ("short-only", "base-kept")
    lines += [(f"{arm}, read under {last_base():g}", arm, "swapped") for arm in low]
    rows = []
    for title, arm, figure in lines:
        accuracies = [values_of(results, arm, f"{figure}_{length}") for length in LENGTHS]
        percent = [[100 * value for value in values] for values in accuracies]
        rows.append([title, *(mean_and_spread(values, 1) for values in percent)])
    return markdown_table(["arm", *(f"{length} tokens" for length in LENGTHS)], rows)


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Accuracy over the length (each seed a dot) and over the distance to the fact."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.6), dpi=90, sharey=True, layout="constrained"
    )
    # The last two arms may lie on one another: dashes leave the line below to be seen.
    for arm, style in zip(arms(), ("-", "-", "-", "--"), strict=True):
        values = np.array([values_of(results, arm.name, f"accuracy_{n}") for n in LENGTHS])
        (line,) = left.plot(LENGTHS, values.mean(1), style, label=arm.name)
        left.plot(LENGTHS, values, ".", color=line.get_color(), markersize=5)
        curves = [r["by_distance"] for r in results if r["arm"] == arm.name]
        octaves = [int(octave) for octave in curves[0]]
        means = [statistics.fmean(curve[str(o)] for curve in curves) for o in octaves]
        right.plot([1.5 * octave for octave in octaves], means, f"o{style}", markersize=3)
    left.axhline(1 / len(make_needles.VALUES["color"]), color="gray", linewidth=0.8, linestyle=":")
    left.set(xlabel="tokens of the text", ylabel="needles found", ylim=(0, 1.03))
    right.set(xlabel="tokens from the fact to its question")
    for axes, ticks in ((left, LENGTHS), (right, (8, 32, 128, 512))):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
    figure.legend(
        *left.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=4
    )
    figure.savefig(file)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--images", type=Path, help="where the plot goes; --out unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (NEEDLES / "tokenizer").exists():
        make_needles.main(["--out", str(NEEDLES)])
    results = results_of(RECIPE, arms(), options.seeds, options.out, retrieval)
    text = table(results)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    plot(results, (options.images or options.out) / "long_context.png")
    print(text)


if __name__ == "__main__":
    main()
