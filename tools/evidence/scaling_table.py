"""Computes the tables of docs/scaling.md for the 21B model, up to a thousand GPUs.

    python -m tools.evidence.scaling_table [--write]

Prints them, or writes them into the page between their marks. They are arithmetic on the recipes
`ernie-21b-a3b-*`, with the rates that `plan` assumes: nothing is run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ernie_train.plan import PlanSettings
from ernie_train.plan.command import plan_request
from ernie_train.plan.layout import GB
from ernie_train.plan.search import (
    MOST_RANKS,
    Candidate,
    PlanRequest,
    candidates,
    smallest_cluster,
)
from ernie_train.plan.tables import describe
from ernie_train.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
SFT, PRL = "ernie-21b-a3b-sft", "ernie-21b-a3b-prl"
GPUS = (8, 16, 64, 256, 1024)
MEMORY_GB = 80.0
STAGES = ("rl-logic", "rl-math-code", "rl-general")
CRITIC = [f"stages.{stage}.critic.optim.lr=1e-6" for stage in STAGES]


def request_of(recipe: str, overrides: list[str], ranks: int) -> PlanRequest:
    """Return what `plan` solves for a recipe of the repository, on GPUs."""
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", overrides)
    return plan_request(loaded, PlanSettings(ranks=ranks, memory_gb=MEMORY_GB))[0]


def cluster_table() -> Iterator[str]:
    """Yield the smallest cluster that holds each job, and the least that a rank takes on 8 GPUs."""
    yield "| job | GPUs | `parallel:` | GB on the fullest | largest part | least on 8 GPUs |"
    yield "|---|---:|---|---:|---|---:|"
    jobs: tuple[tuple[str, str, list[str]], ...] = (
        ("SFT with LoRA of rank 32, rows of 8K", SFT, ["stages.sft.lora={rank: 32}"]),
        ("SFT, rows of 8K", SFT, []),
        ("RL at 8K, no critic", PRL, []),
        ("RL at 8K with a critic", PRL, CRITIC),
        ("SFT, rows of 128K", SFT, ["stages.sft.seq_len=131072"]),
    )
    for name, recipe, overrides in jobs:
        request = request_of(recipe, overrides, 8)
        closest = min(candidates(request, 8), key=lambda c: c.peak)
        cluster = smallest_cluster(request)
        fits = cluster.fits(MEMORY_GB)
        ranks = cluster.layout.ranks if fits else f"none up to {MOST_RANKS}"
        layout = cluster.layout.as_yaml().removeprefix("parallel: ")
        yield (
            f"| {name} | {ranks} | `{layout}` | {_gb(cluster)} | {_binding(cluster)} | "
            f"{_gb(closest)} |"
        )


def cluster_sizes() -> Iterator[str]:
    """Yield the best layout of each number of GPUs, with a micro-batch of work for every one."""
    yield (
        "| job | GPUs | fastest layout that fits | GB | tokens/s | over 8 GPUs | GB sent | "
        "largest part | slowest part |"
    )
    yield "|---|---:|---|---:|---:|---:|---:|---|---|"
    for name, recipe, setting, stages in (
        ("SFT", SFT, "grad_accum_steps", ("sft",)),
        ("RL", PRL, "rollout.prompts_per_iteration", STAGES),
    ):
        first = 0.0
        for ranks in GPUS:
            overrides = [f"stages.{stage}.{setting}={max(64, ranks)}" for stage in stages]
            request = request_of(recipe, overrides, ranks)
            best = next(c for c in candidates(request, ranks) if c.fits(MEMORY_GB))
            cost = best.cost[0]
            rate = request.loads[0].tokens / cost.total_seconds
            first = first or rate
            yield (
                f"| {name} | {ranks} | {describe(best.layout)} | {_gb(best)} | {_rounded(rate)} | "
                f"{rate / first:.1f} | {sum(cost.sent.values()) / GB:,.0f} | {_binding(best)} | "
                f"{cost.largest_part()} |"
            )


def _rounded(rate: float) -> str:
    """Return a rate with two digits: what it is computed from is assumed."""
    return f"{float(f'{rate:.2g}'):,.0f}"


def _gb(candidate: Candidate) -> str:
    return f"{candidate.peak / GB:.1f}"


def _binding(candidate: Candidate) -> str:
    return candidate.memory[candidate.tightest].largest_part()


TABLES = {"clusters": cluster_table, "sizes": cluster_sizes}


def with_tables(page: str) -> str:
    """Return the page with all tables remade; raises `ValueError` where one has no marks."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name}: tools/evidence/scaling_table.py --write -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page must have one place for the table {name}")
        before, after = pattern.split(page)
        page = before + "\n".join([start, *table(), end]) + after
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for table in TABLES.values():
        print("\n".join(table()), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
