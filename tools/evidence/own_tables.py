"""The tables of docs/own_model.md, from what `own_model` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MARKERS = ("<!-- tables of tools.evidence.own_model -->", "<!-- end of the tables -->")
SHOWN_CHARACTERS = 300  # of a message
SHOWN_STEPS = (1, 5, 10, 20, 30)


def render(results: dict[str, Any], out: Path) -> str:
    """Return all tables; `out` holds the exports with their receipts."""
    runs = results["runs"]
    parts = [_machine(results), _table(_losses(runs))]
    parts += ["### Held out", _table(_held_out(runs))]
    parts += ["### Time and memory", _table(_costs(runs))]
    parts += ["### Exports and adapters in other programs", _table(_exports(runs, out))]
    parts += ["### Messages of typical mistakes", _table(_stumbles(results["stumbles"]))]
    return "\n\n".join(parts) + "\n"


def largest_difference(run: dict[str, Any]) -> float:
    """Return the largest difference of a step's losses of the two sides."""
    ours, peer = (np.array(run[side]["losses"], float) for side in ("ours", "peer"))
    return float(np.abs(ours - peer).max())  # unlike Python's max it keeps a NaN


def _machine(results: dict[str, Any]) -> str:
    run = next(iter(results["runs"].values()))
    rows = "; ".join(f"{kind.replace('_', ' ')}: {file}" for kind, file in results["rows"].items())
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    threads, code = results["threads"], results["code"]
    commit = f"commit {code['commit'][:12]}" if code["commit"] else "no checkout"
    clock = "processor second" if threads == 1 else "second"
    return (
        f"Measured on: {results['processor']}, {threads} thread(s) a side; ours: ernie_train "
        f"{code['version']}, {commit}{', with changes' if code['dirty'] else ''}; "
        f"{'; '.join(run['set_up'])}; peer: {versions}. Rows: {rows}. Sides took turns of "
        f"{results['turn']} steps; rates are medians over the turns, in tokens of a {clock}. "
        f"`cores` is processor time by wall time: below {threads}, other programs had a part of "
        "the machine."
    )


def _losses(runs: dict[str, Any]) -> Iterator[Sequence[str]]:
    steps = [n for n in SHOWN_STEPS if n <= len(next(iter(runs.values()))["ours"]["losses"])]
    yield "rows", "trained", *(f"step {n}: ours / peer" for n in steps), "largest difference"
    for name, run in runs.items():
        sides = run["ours"]["losses"], run["peer"]["losses"]
        cells = (f"{sides[0][n - 1]:.4f} / {sides[1][n - 1]:.4f}" for n in steps)
        yield *_named(name), *cells, f"{largest_difference(run):.1e}"


def _held_out(runs: dict[str, Any]) -> Iterator[Sequence[str]]:
    yield "rows", "trained", "loss before", "after", "calls right before", "after"
    for name, run in runs.items():
        kind, _ = name.split("/")
        # Both methods start from the same model; it was measured where LoRA was.
        before, after = runs.get(f"{kind}/LoRA", {}).get("before", {}), run["after"]
        losses = [f"{found['loss']:.4f}" if found else "" for found in (before, after)]
        yield *_named(name), *losses, _solved(before), _solved(after)


def _solved(found: dict[str, Any]) -> str:
    return f"{found['solved']} of {found['problems']}" if "solved" in found else ""


def _costs(runs: dict[str, Any]) -> Iterator[Sequence[str]]:
    yield (
        "rows", "trained", "tokens/s ours", "peer", "ratio", "cores ours", "peer",
        "peak GB ours", "peer",
    )  # fmt: skip
    for name, run in runs.items():
        ours, peer = run["ours"], run["peer"]
        rates = ours["tokens_per_second"], peer["tokens_per_second"]
        yield (
            *_named(name), f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[0] / rates[1]:.2f}",
            f"{ours['cores']:.2f}", f"{peer['cores']:.2f}", f"{ours['peak_gb']:.2f}",
            f"{peer['peak_gb']:.2f}",
        )  # fmt: skip


def _exports(runs: dict[str, Any], out: Path) -> Iterator[Sequence[str]]:
    yield (
        "rows", "largest logit", "adapter in peft: logits differ by", "merged by peft",
        "our merged export in transformers", "allowed", "greedy tokens",
    )  # fmt: skip
    for name, run in runs.items():
        if "adapter" not in run:
            continue
        receipt = json.loads((out / name / "merged" / "export_receipt.json").read_text("utf-8"))
        found, equal = run["adapter"], receipt["greedy_tokens_equal"]
        yield (
            _named(name)[0], f"{found['largest']:.1f}", f"{found['difference']:.1e}",
            f"{found['merged']:.1e}", f"{receipt['max_logit_difference']:.1e}",
            f"{receipt['tolerance']:.1e}", "equal" if equal else "differ",
        )  # fmt: skip


def _stumbles(found: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    yield "mistake", "command", "seconds", "message"
    for one in found:
        message = one["message"].replace("|", "\\|")
        if len(message) > SHOWN_CHARACTERS:
            message = f"{message[: SHOWN_CHARACTERS // 2]} ... {message[-SHOWN_CHARACTERS // 2 :]}"
        yield one["mistake"], f"`{one['verb']}`", f"{one['seconds']:.1f}", message


def _named(name: str) -> tuple[str, str]:
    kind, method = name.split("/")
    return kind.replace("_", " "), method


def _table(rows: Iterator[Sequence[str]]) -> str:
    """Return a Markdown table of rows, the first of which is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    width = lines[0].count(" | ") + 1
    return "\n".join([lines[0], "|" + " --- |" * width, *lines[1:]])
