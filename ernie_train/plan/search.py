"""Search for layouts that hold a recipe, the fastest of them, and the smallest cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute
from ernie_train.plan.cost import Rates, StepCost, step_cost
from ernie_train.plan.layout import GB, Layout, Machine, layouts
from ernie_train.plan.memory import MemoryDemand, memory_demand
from ernie_train.plan.workload import Workload

CLUSTERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # ranks that are tried
MOST_RANKS = CLUSTERS[-1]


@dataclass(frozen=True)
class PlanRequest:
    """Hold a model, the workloads of its stages and the kind of rank that runs them."""

    config: Ernie4_5_MoeConfig
    loads: Sequence[Workload]
    machine: Machine
    memory_gb: float
    rates: Rates
    expert: int | None = None  # only layouts of this expert degree
    recompute: Recompute = False  # tried in addition to the usual settings


@dataclass(frozen=True)
class Candidate:
    """Hold a layout with the memory and the cost of every phase."""

    layout: Layout
    memory: list[MemoryDemand]
    cost: list[StepCost]
    seconds: float  # of all steps; of one step if a phase runs for epochs

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memory)

    @property
    def tightest(self) -> int:
        """Return the index of the phase that needs most memory."""
        peaks = [memory.peak for memory in self.memory]
        return peaks.index(max(peaks))

    def fits(self, memory_gb: float) -> bool:
        return self.peak <= memory_gb * GB


def candidates(request: PlanRequest, ranks: int) -> list[Candidate]:
    """Return every layout of `ranks` ranks, the fastest first; equally fast ones by memory."""
    tokens = max(load.micro_batch.tokens for load in request.loads)
    tried = layouts(request.config, ranks, request.expert, request.recompute, tokens)
    found = [_candidate(request, layout) for layout in tried]
    return sorted(found, key=lambda c: (c.seconds, c.peak))


def _candidate(request: PlanRequest, layout: Layout) -> Candidate:
    config, machine, loads = request.config, request.machine, request.loads
    memory = [memory_demand(config, machine, layout, load) for load in loads]
    cost = [step_cost(config, machine.precision, layout, request.rates, load) for load in loads]
    seconds = sum(c.total_seconds * (w.steps or 1) for c, w in zip(cost, loads, strict=True))
    return Candidate(layout, memory, cost, seconds)


def smallest_cluster(request: PlanRequest) -> Candidate:
    """Return the fastest layout on the fewest ranks that hold the recipe.

    They are `CLUSTERS`, or as many expert groups of the degree that is asked for. If none does: the
    layout that needs least memory, on the fewest ranks that are within 1 % of it.
    """
    smallest: list[Candidate] = []
    degree = request.expert or 1
    for ranks in [degree * n for n in CLUSTERS if degree * n <= MOST_RANKS] or [degree]:
        found = candidates(request, ranks)
        for candidate in found:
            if candidate.fits(request.memory_gb):
                return candidate
        smallest.append(min(found, key=lambda c: c.peak))
    least = min(candidate.peak for candidate in smallest)
    return next(candidate for candidate in smallest if candidate.peak <= 1.01 * least)
