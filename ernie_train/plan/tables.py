"""Write a plan as text and tables: assumptions, memory by part, cost of a step, layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from ernie_train.plan.disk import checkpoint_bytes, dumped_bytes, run_bytes
from ernie_train.plan.layout import GB, Layout, count_parameters
from ernie_train.plan.memory import MemoryDemand, recorded_bytes
from ernie_train.plan.search import MOST_RANKS, Candidate, PlanRequest
from ernie_train.plan.workload import Workload
from ernie_train.run.recipe import Recipe

# A parameter of the float32 model by which a single rank proves an export, and of its sampler.
PROOF_WIDTH = 8

_REMEDIES = {
    "activations": "a smaller micro_batch_size or shorter rows take less",
    "rollouts": "a smaller rollout.batch_size takes less",
}


def print_assumptions(request: PlanRequest, ranks: int, why: str, console: Console) -> None:
    """Print the model and all assumptions behind the numbers."""
    total, active = request.config.num_parameters()
    counts, precision = count_parameters(request.config), request.machine.precision
    console.print(
        f"model: {_count(total)} parameters ({_count(counts.dense)} dense, "
        f"{_count(counts.experts)} in routed experts), {_count(active)} active for a token",
        highlight=False,
    )
    on_gpu = request.machine.on_gpu
    kind = "GPUs" if on_gpu else "CPU ranks"
    less = "" if on_gpu else "; plain operators, while native kernels keep less for the way back"
    console.print(
        f"assumed: {ranks} {kind} of {request.memory_gb:g} GB (10^9 bytes); weights "
        f"{precision.weights} ({why}){less}",
        highlight=False,
    )
    rates = request.rates
    console.print(
        f"assumed rates of a rank: {rates.tflops:g} TFLOPS, {rates.inside_gbps:g} Gbit/s within a "
        f"machine of 8 and {rates.between_gbps:g} beyond, {rates.memory_gb_per_s:g} GB/s from its "
        f"memory, {rates.layer_us:g} us to start a layer in sampling; communication is counted "
        "without overlap",
        highlight=False,
    )


def memory_table(loads: Sequence[Workload], candidate: Candidate) -> Table:
    """Return a table of a rank's memory in GB by part, one column per phase."""
    table = _table("memory of a rank, GB", *(phase.name for phase in loads))
    for part in fields(MemoryDemand):
        values = [getattr(memory, part.name) for memory in candidate.memory]
        if any(values):
            table.add_row(part.name, *(_gb(value) for value in values))
    table.add_section()
    table.add_row("peak", *(_gb(memory.peak) for memory in candidate.memory))
    table.add_row("largest part", *(memory.largest_part() for memory in candidate.memory))
    return table


def step_table(request: PlanRequest, candidate: Candidate) -> Table:
    """Return a table of the cost of a step, one column per phase."""
    loads = request.loads
    table = _table("a step", *(phase.name for phase in loads))
    table.add_row("tokens trained", *(f"{phase.tokens:,}" for phase in loads))
    table.add_row("GFLOP per token", *(f"{c.flops_per_token / 1e9:.4g}" for c in candidate.cost))
    ranks = candidate.layout.ranks
    if any(c.busy_ranks < ranks for c in candidate.cost):
        table.add_row("ranks with work", *(f"{c.busy_ranks} of {ranks}" for c in candidate.cost))
    for kind in _kinds([c.sent for c in candidate.cost]):
        table.add_row(f"{kind}: GB sent", *(_gb(c.sent.get(kind, 0.0)) for c in candidate.cost))
    table.add_section()
    for kind in _kinds([c.seconds for c in candidate.cost]):
        cells = (f"{c.seconds.get(kind, 0.0):.3g}" for c in candidate.cost)
        table.add_row(f"{kind}: seconds", *cells)
    table.add_row("seconds in all", *(f"{c.total_seconds:.3g}" for c in candidate.cost))
    return table


def layout_table(request: PlanRequest, fitting: Sequence[Candidate]) -> Table:
    """Return a table of layouts that fit, best first; s/step joins phases of equal time."""
    columns = ("expert", "data", "sharded", "recompute", "GB", "in", "s/step")
    table = _table("that fit", *columns, "binds")
    for place, candidate in enumerate(fitting):
        layout = candidate.layout
        slowest = max(candidate.cost, key=lambda c: c.total_seconds)
        table.add_row(
            "best" if place == 0 else "",
            str(layout.expert),
            str(layout.data),
            "yes" if layout.sharding else "no",
            layout.recompute_label,
            _gb(candidate.peak),
            request.loads[candidate.tightest].name,
            " / ".join(dict.fromkeys(f"{c.total_seconds:.3g}" for c in candidate.cost)),
            slowest.largest_part(),
            style="bold green" if place == 0 else "",
        )
    return table


def own_layout(request: PlanRequest, candidate: Candidate) -> str:
    """Return memory and time of the recipe's own layout, as a line."""
    fits = "fits" if candidate.fits(request.memory_gb) else "does not fit"
    seconds = " / ".join(dict.fromkeys(f"{c.total_seconds:.3g}" for c in candidate.cost))
    return (
        f"the recipe's own {describe(candidate.layout)} {fits}: {_gb(candidate.peak)} GB in "
        f"{request.loads[candidate.tightest].name}, {seconds} s a step"
    )


def shortage(request: PlanRequest, closest: Candidate, cluster: Candidate) -> list[str]:
    """Explain why nothing fits, and name a cluster that would, from `smallest_cluster`."""
    tight = closest.tightest
    binding = closest.memory[tight].largest_part()
    lines = [
        f"nothing fits: {describe(closest.layout)} comes closest with {_gb(closest.peak)} GB in "
        f"{request.loads[tight].name}, above {request.memory_gb:g}; what binds is "
        f"{_binding(closest)}" + (f": {_REMEDIES[binding]}" if binding in _REMEDIES else "")
    ]
    where = f"{cluster.layout.ranks} ranks ({describe(cluster.layout)})"
    if cluster.fits(request.memory_gb):
        lines.append(
            f"the smallest cluster that holds it: {where}, {_gb(cluster.peak)} GB; there "
            f"{_binding(cluster)} is the largest part"
        )
    else:
        lines.append(
            f"no cluster of up to {MOST_RANKS} ranks holds it: on {where} a rank still needs "
            f"{_gb(cluster.peak)} GB, and {_binding(cluster)} does not shrink with more ranks"
        )
    return lines


def idle_ranks(loads: Sequence[Workload], candidate: Candidate) -> list[str]:
    """Return a line for each phase that has fewer micro-batches than there are ranks."""
    return [
        f"{phase.name}: {candidate.layout.ranks - cost.busy_ranks} of {candidate.layout.ranks} "
        "ranks have no micro-batch: more of them a step, or smaller ones, would use them"
        for phase, cost in zip(loads, candidate.cost, strict=True)
        if cost.busy_ranks < candidate.layout.ranks
    ]


def rollout_notes(request: PlanRequest) -> list[str]:
    """Return what the tables do not show of stages that sample: experts, prompts, engines."""
    lines = []
    for load in request.loads:
        if (sampling := load.sampling) is None:
            continue
        if recorded := recorded_bytes(request.config, sampling):
            lines.append(
                f"{load.name}: router_replay keeps up to {_gb(recorded)} GB of experts in the "
                "memory of each rank's processor"
            )
            if sampling.dumps:
                size = dumped_bytes(request.config, sampling)
                lines.append(
                    f"{load.name}: dump writes up to {_gb(size)} GB of experts an iteration, "
                    f"{_gb(size * (load.steps or 1))} in the stage, less as far as they compress"
                )
        if load.micro_batch.shared_tokens:
            lines.append(
                f"{load.name}: share_prompts leaves out {load.micro_batch.shared:.1%} of the "
                "tokens of scoring and training"
            )
        if not sampling.by_ranks:
            size = count_parameters(request.config).total * request.machine.precision.width
            lines += [
                f"{load.name}: completions come from {sampling.engine}, whose memory and time are "
                "not counted: give it GPUs of its own, or sleep: true",
                f"{load.name}: a version of the weights takes {_gb(size)} GB of disk for it, two "
                "versions while one is loaded",
            ]
    return lines


def disk_notes(recipe: Recipe, request: PlanRequest, candidate: Candidate) -> list[str]:
    """Return what checkpoints take of the disk, and of memory while one is saved."""
    config, precision = request.config, request.machine.precision
    largest = max(checkpoint_bytes(config, precision, stage) for stage in recipe.stages)
    most = run_bytes(recipe, config, precision)
    drops = not all(stage.checkpoint.keep_optimizer for stage in recipe.stages[:-1])
    earlier = ", of earlier stages without optimizer state" if drops else ""
    lines = [
        f"checkpoints: {_gb(largest)} GB each; those that are kept (checkpoint.keep_last){earlier} "
        f"and one that is being written take up to {_gb(most)} GB of disk"
    ]
    if request.machine.on_gpu:
        states = max(memory.optimizer + memory.critic for memory in candidate.memory)
        lines.append(
            f"while one is saved, up to {_gb(states)} GB of optimizer state are in the memory of "
            "each rank's processor"
        )
        if recipe.export is not None and candidate.layout.ranks == 1:
            proof = PROOF_WIDTH * count_parameters(config).total
            lines.append(
                "the export is proved in float32 on the processor, in up to "
                f"{_gb(proof)} GB of its memory"
            )
    return lines


def describe(layout: Layout) -> str:
    """Return a layout in words."""
    words = f"expert {layout.expert} x data {layout.data}"
    words += ", sharded optimizer" if layout.sharding else ""
    return words + (f", recompute {layout.recompute_label}" if layout.recompute else "")


def _binding(candidate: Candidate) -> str:
    memory = candidate.memory[candidate.tightest]
    name = memory.largest_part()
    return f"{name} ({_gb(getattr(memory, name))} GB)"


def _kinds(columns: Sequence[dict[str, float]]) -> list[str]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [name for name in names if any(column.get(name) for column in columns)]


def _table(heading: str, *columns: str) -> Table:
    # A title, unlike the first column's heading, would be broken to the table's width.
    table = Table(Column(heading, no_wrap=True), box=SIMPLE, padding=0, pad_edge=False)
    for name in columns:
        # Folding keeps the whole cell in a narrow terminal.
        table.add_column(name, justify="right", overflow="fold")
    return table


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size >= 0.1 * GB else f"{size / GB:.4f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.3f} M"
