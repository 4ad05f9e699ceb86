"""Which layouts hold a recipe, which of them is fastest, and how many ranks it takes at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie_train.model.configuration import Ernie4_5_MoeConfig
from ernie_train.parallel import Recompute
from ernie_train.plan.cost import Rates, StepCost, step_cost
from ernie_train.plan.layout import GB, Layout, layouts
from ernie_train.plan.memory import Machine, Memory, rank_memory
from ernie_train.plan.work import Work

MOST_RANKS = 1024
_WHOLE_MACHINE = 8


@dataclass(frozen=True)
class Problem:
    """A model, the work of its stages and the machine that is to do it."""

    config: Ernie4_5_MoeConfig
    work: Sequence[Work]
    machine: Machine
    memory_gb: float
    rates: Rates
    expert: int | None = None  # only layouts of this expert degree
    recompute: Recompute = False  # tried beside what is always tried


@dataclass(frozen=True)
class Candidate:
    """A layout with the memory and the cost of every phase."""

    layout: Layout
    memory: list[Memory]
    cost: list[StepCost]
    seconds: float  # of all steps; of one step where a phase lasts for epochs

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memory)

    @property
    def tightest(self) -> int:
        """The phase that needs most memory."""
        peaks = [memory.peak for memory in self.memory]
        return peaks.index(max(peaks))

    def fits(self, memory_gb: float) -> bool:
        return self.peak <= memory_gb * GB


def candidates(problem: Problem, ranks: int) -> list[Candidate]:
    """Every layout of `ranks` ranks, the fastest first; equally fast ones by their memory."""
    tokens = max(work.job.micro_batch.tokens for work in problem.work)
    tried = layouts(problem.config, ranks, problem.expert, problem.recompute, tokens)
    found = [_candidate(problem, layout) for layout in tried]
    return sorted(found, key=lambda c: (c.seconds, c.peak))


def _candidate(problem: Problem, layout: Layout) -> Candidate:
    config, machine = problem.config, problem.machine
    memory = [rank_memory(config, machine, layout, work.job) for work in problem.work]
    cost = [
        step_cost(config, machine.precision, layout, problem.rates, work) for work in problem.work
    ]
    seconds = sum(
        c.total_seconds * (work.steps or 1) for c, work in zip(cost, problem.work, strict=True)
    )
    return Candidate(layout, memory, cost, seconds)


def smallest_cluster(problem: Problem) -> Candidate:
    """The fastest layout on the fewest ranks that hold the recipe.

    Tried are 1, 2 and 4 ranks, then whole machines of 8. Where none of up to `MOST_RANKS` does,
    the layout that needs least memory, on the fewest ranks that get as low to within 1 %.
    """
    smallest: list[Candidate] = []
    for ranks in (1, 2, 4, *range(_WHOLE_MACHINE, MOST_RANKS + 1, _WHOLE_MACHINE)):
        if problem.expert is not None and ranks % problem.expert:
            continue
        found = candidates(problem, ranks)
        for candidate in found:
            if candidate.fits(problem.memory_gb):
                return candidate
        smallest.append(min(found, key=lambda c: c.peak))
    least = min(candidate.peak for candidate in smallest)
    return next(candidate for candidate in smallest if candidate.peak <= 1.01 * least)
