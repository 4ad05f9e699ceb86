"""Run the `plan` verb: print the plan for a recipe and the options of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from ernie_train.core import devices
from ernie_train.plan.cost import Rates
from ernie_train.plan.layout import Dtype, Layout, Machine, Precision
from ernie_train.plan.search import PlanRequest, candidates, smallest_cluster
from ernie_train.plan.tables import (
    describe,
    disk_notes,
    idle_ranks,
    layout_table,
    memory_table,
    own_layout,
    print_assumptions,
    rollout_notes,
    shortage,
    step_table,
)
from ernie_train.plan.workload import recipe_workloads
from ernie_train.run.check import describe_training
from ernie_train.run.recipe import Recipe

DEFAULT_RANKS, DEFAULT_MEMORY_GB = 8, 80.0
# Assumed rates of an H100 and of a processor core, not measured; every plan prints them. A layer is
# about a hundred kernels, each of which takes Python ten microseconds to start.
GPU_RATES = Rates(
    300.0, inside_gbps=2400.0, between_gbps=400.0, memory_gb_per_s=2000.0, layer_us=1000.0
)
CPU_RATES = Rates(0.05, inside_gbps=16.0, between_gbps=10.0, memory_gb_per_s=10.0, layer_us=100.0)


@dataclass(frozen=True)
class PlanSettings:
    """Hold options of the command line; None: the default, which may depend on the device.

    expert: only layouts of this expert degree.
    document_tokens: mean length of packed documents; None: a row is one document.
    """

    ranks: int | None = None
    memory_gb: float | None = None
    expert: int | None = None
    document_tokens: int | None = None
    tflops: float | None = None
    interconnect_gbps: float | None = None
    between_gbps: float | None = None  # between machines, if that differs
    memory_gb_per_s: float | None = None
    layer_us: float | None = None


def print_plan(recipe: Recipe, settings: PlanSettings, console: Console) -> None:
    """Print memory, cost and the layouts that fit.

    Raises `UserError` for an impossible expert degree.
    """
    request, why = plan_request(recipe, settings)
    ranks = settings.ranks or DEFAULT_RANKS
    found = candidates(request, ranks)
    if recipe.model.is_absent:
        console.print(recipe.model.missing_model_message(), highlight=False)
    print_assumptions(request, ranks, why, console)
    for stage in recipe.stages:
        if line := describe_training(stage, request.config):
            console.print(f"{stage.name}: {line}", highlight=False)
    fitting = [candidate for candidate in found if candidate.fits(request.memory_gb)]
    shown = fitting[0] if fitting else min(found, key=lambda c: c.peak)
    console.print(f"the {'best' if fitting else 'smallest'}: {describe(shown.layout)}")
    console.print(memory_table(request.loads, shown))
    console.print(step_table(request, shown))
    notes = [*idle_ranks(request.loads, shown), *rollout_notes(request)]
    for line in [*notes, *disk_notes(recipe, request, shown)]:
        console.print(line, highlight=False)
    own = recipe.parallel
    of_recipe = Layout(own.expert, own.data, own.sharding, own.recompute)
    for candidate in found:
        if candidate.layout == of_recipe:
            console.print(own_layout(request, candidate), highlight=False)
    if fitting:
        console.print(layout_table(request, fitting))
        console.print(f"{len(found) - len(fitting)} other layouts do not fit", highlight=False)
        console.print(f"it fits; the fastest: {shown.layout.as_yaml()}", highlight=False)
        return
    for line in shortage(request, shown, smallest_cluster(request)):
        console.print(line, highlight=False)


def plan_request(recipe: Recipe, settings: PlanSettings) -> tuple[PlanRequest, str]:
    """Return the request, and the reason for its kind of ranks."""
    machine, why = _machine(recipe, settings)
    request = PlanRequest(
        recipe.model.build(),
        recipe_workloads(recipe, settings.document_tokens),
        machine,
        settings.memory_gb or DEFAULT_MEMORY_GB,
        _rates(machine, settings),
        settings.expert,
        recipe.parallel.recompute,
    )
    return request, why


def _machine(recipe: Recipe, settings: PlanSettings) -> tuple[Machine, str]:
    """Return the kind of ranks, and the reason for it."""
    device, why = recipe.device, f"device: {recipe.device}"
    if device == "auto":
        if settings.ranks is not None or settings.memory_gb is not None:
            device, why = "gpu", "device: auto; GPUs were named"
        else:
            device = "gpu" if devices.select_device("auto") == "gpu" else "cpu"
            why = f"device: auto, {'a' if device == 'gpu' else 'no'} GPU here; --gpus plans GPUs"
    weights: Dtype = "bfloat16" if device == "gpu" else "float32"
    return Machine(device == "gpu", Precision(weights)), why


def _rates(machine: Machine, settings: PlanSettings) -> Rates:
    base = GPU_RATES if machine.on_gpu else CPU_RATES
    wires = settings.interconnect_gbps
    return Rates(
        settings.tflops or base.tflops,
        wires or base.inside_gbps,
        settings.between_gbps or wires or base.between_gbps,
        settings.memory_gb_per_s or base.memory_gb_per_s,
        settings.layer_us or base.layer_us,
    )
