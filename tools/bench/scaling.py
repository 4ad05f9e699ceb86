"""Speed and memory of a second rank on two cores, and the cost of more experts.

    python -m tools.bench.scaling [--rounds 5] [--only ranks|experts]

Ranks: one rank with one thread, one with two threads, two ranks of data parallelism and two of
expert parallelism train preset `mini` on the same batches in processes that take turns; their
losses must agree. For each: tokens per second, the median over the rounds and the best, with ratios
to one rank with one thread; the most memory that a rank had resident and that Paddle had given out
to tensors beyond what was there before the model; what weights, gradients and moments take.

Traffic: the bytes of rows that left each rank, counted where they are exchanged, beside the least
that could be sent: for each chosen expert that lives elsewhere, H numbers four times (to the
expert and back, forward and backward).

Experts: one rank with one thread and 8 to 128 experts of which 4 are active, so with the same
active parameters; seconds per token relative to 8 experts, with and without the optimizer's update,
which visits all parameters however few tokens a step has.

Other programs disturb the figures; `cores` is processor time / wall time of all ranks of a side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.bench.ranks import Ranks, paddle_environments
from tools.bench.scaling_rank import LENGTH, MICRO_BATCHES, ROWS

EXPERTS = (8, 16, 32, 64, 128)
WARM_UP_STEPS = 2
LOSS_TOLERANCE = 1e-3  # layouts add up in other orders, and the weights drift apart


@dataclass(frozen=True)
class Layout:
    """A side of the benchmark."""

    name: str
    threads: int = 1
    expert: int = 1
    data: int = 1
    experts: int = 16

    @property
    def ranks(self) -> int:
        return self.expert * self.data


LAYOUTS = [
    Layout("1 rank, 1 thread"),
    Layout("1 rank, 2 threads", threads=2),
    Layout("data 2", data=2),
    Layout("expert 2", expert=2),
]


# ---- the driver ----------------------------------------------------------------------------------


class LayoutRanks(Ranks):
    """The ranks of one layout, built and warmed up, and what their rounds took."""

    def __init__(self, layout: Layout) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tools.bench.scaling_rank"]
        super().__init__(command, paddle_environments(layout.ranks, layout.threads))
        self.layout = layout
        self.runs: list[dict[str, Any]] = []  # one a round

    def __enter__(self) -> LayoutRanks:
        super().__enter__()
        degrees = {name: getattr(self.layout, name) for name in ("expert", "data", "experts")}
        self.ask_all(build=degrees)
        self.ask_all(steps=WARM_UP_STEPS)
        return self

    def run(self, steps: int) -> None:
        answers = self.ask_all(steps=steps)
        seconds = max(answer["seconds"] for answer in answers)
        tokens = steps * MICRO_BATCHES * ROWS * LENGTH
        self.runs.append(
            {
                "rate": tokens / seconds,
                "cores": sum(answer["cpu_seconds"] for answer in answers) / seconds,
                "token_s": seconds / tokens,
                "passes_s": (seconds - answers[0]["update_seconds"]) / tokens,
                "losses": answers[0]["losses"],
                "sent": sum(answer["sent"] for answer in answers),
                "least": sum(answer["least"] for answer in answers),
            }
        )

    def median(self, name: str) -> float:
        return statistics.median(run[name] for run in self.runs)

    def best(self) -> float:
        return max(float(run["rate"]) for run in self.runs)

    def losses(self) -> list[float]:
        return [loss for run in self.runs for loss in run["losses"]]


def measure(layouts: list[Layout], rounds: int, steps: int, held: ExitStack) -> list[LayoutRanks]:
    """Run all layouts in turn, `rounds` times; they stay loaded and idle between their turns."""
    sides = [held.enter_context(LayoutRanks(layout)) for layout in layouts]
    for number in range(rounds):
        for side in sides:
            side.run(steps)
        rates = ", ".join(f"{side.layout.name}: {side.runs[-1]['rate']:.0f}" for side in sides)
        print(f"round {number + 1}, tokens/s: {rates}", flush=True)
    return sides


def check_losses(layout: str, losses: Sequence[float], expected: Sequence[float]) -> None:
    """Exit where the losses of a layout are not the expected ones."""
    off = float(np.abs(np.subtract(losses, expected)).max())  # unlike Python's it keeps a NaN
    if not off <= LOSS_TOLERANCE:
        raise SystemExit(f"{layout}: losses differ by {off:.1e}")


def compare_ranks(rounds: int, steps: int) -> None:
    with ExitStack() as held:
        sides = measure(LAYOUTS, rounds, steps, held)
        first, expected = sides[0].median("rate"), sides[0].losses()
        print(
            "\nlayout               tokens/s  ratio  best  ratio  cores"
            "  peak MB  tensors MB  experts MB  dense MB"
        )
        for side in sides:
            check_losses(side.layout.name, side.losses(), expected)
            memory = side.ask_all(memory=None)
            most = {name: max(answer[name] for answer in memory) / 1e6 for name in memory[0]}
            rate = side.median("rate")
            print(
                f"{side.layout.name:20} {rate:8.0f}  {rate / first:5.2f}"
                f"  {side.best():4.0f}  {side.best() / sides[0].best():5.2f}"
                f"  {side.median('cores'):5.2f}"
                f"  {most['resident']:7.0f}  {most['tensors']:10.0f}  {most['experts']:10.1f}"
                f"  {most['dense']:8.1f}"
            )
        print("memory of the fullest rank; experts and dense: weights, gradients, moments\n")
        sent, least = sides[-1].median("sent"), sides[-1].median("least")
        print(
            f"{sides[-1].layout.name}: {sent / steps / 1e6:.2f} MB of rows a step left the ranks, "
            f"at least {least / steps / 1e6:.2f} MB: ratio {sent / least:.4f}"
        )


def compare_experts(rounds: int, steps: int) -> None:
    layouts = [Layout(f"{count} experts", experts=count) for count in EXPERTS]
    with ExitStack() as held:
        sides = measure(layouts, rounds, steps, held)
        print("\nexperts       ms/token  relative  without the update  relative  cores")
        for side in sides:
            whole, passes = side.median("token_s"), side.median("passes_s")
            print(
                f"{side.layout.name:13} {1e3 * whole:8.3f}"
                f"  {whole / sides[0].median('token_s'):8.2f}"
                f"  {1e3 * passes:18.3f}  {passes / sides[0].median('passes_s'):8.2f}"
                f"  {side.median('cores'):5.2f}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a side's turn")
    parser.add_argument("--only", choices=("ranks", "experts"))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"steps of {MICRO_BATCHES} x {ROWS} x {LENGTH} tokens; load before: {load:.1f}")
    if options.only != "experts":
        compare_ranks(options.rounds, options.steps)
    if options.only != "ranks":
        compare_experts(options.rounds, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
