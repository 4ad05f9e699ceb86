"""Training of a part of a model: which parameters train, whole or by a pair of LoRA matrices."""

from __future__ import annotations

import fnmatch
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from paddle import Tensor, nn

from ernie_train.core.errors import ConfigError, did_you_mean
from ernie_train.model.lora import (
    EMBEDDING,
    HEAD,
    Adapter,
    LoraConfig,
    Pair,
    adapted_layer,
    new_pair,
    pair_shapes,
)
from ernie_train.model.token_dispatcher import is_expert_parameter
from ernie_train.model.transformer import Ernie4_5_MoeForCausalLM

_ALL_LINEAR = ("all-linear", "all")
_ROUTER, _SELECTION_BIAS = ".mlp.gate.weight", ".e_score_correction_bias"


@dataclass(frozen=True)
class Selection:
    """Names of the parameters that train whole, and of those that get a pair of matrices."""

    whole: tuple[str, ...]
    adapted: tuple[str, ...] = ()

    @property
    def trains_routers(self) -> bool:
        return any(name.endswith(_ROUTER) for name in self.whole)


def select(
    shapes: Mapping[str, tuple[int, ...]],
    lora: LoraConfig | None,
    train: Sequence[str],
    freeze: Sequence[str],
) -> Selection:
    """Return what trains of a model with parameters of these `shapes`.

    Without LoRA all parameters train, or those that `train` names; with it the pairs do, and what
    `train` names besides. `freeze` takes out of either.

    Raises:
        ConfigError: a pattern matches nothing or what takes no pair, or nothing is left to train.
    """
    names = [name for name in shapes if not name.endswith(_SELECTION_BIAS)]
    problems: list[str] = []

    def matching(key: str, patterns: Sequence[str]) -> set[str]:
        found = {pattern: _matching(pattern, names) for pattern in patterns}
        problems.extend(
            f"{key}: {pattern!r} matches no parameter{did_you_mean(pattern, _known(names))}"
            for pattern, hits in found.items()
            if not hits
        )
        return {name for hits in found.values() for name in hits}

    wanted, frozen = matching("train", train), matching("freeze", freeze)
    whole = wanted if train or lora is not None else set(names)
    adapted: set[str] = set()
    if lora is not None:
        linear = {name for name in names if "_proj" in name and not name.endswith(".bias")}
        tied = HEAD not in shapes
        for pattern in lora.targets:
            if pattern in _ALL_LINEAR:
                adapted |= linear
                continue
            hits = set(_matching(pattern, [HEAD])) if tied else set()
            hits = hits or matching("lora.targets", [pattern])
            usable = hits & (linear | {EMBEDDING, HEAD})
            problems += _unusable(pattern, hits, usable, tied)
            adapted |= usable
        if both := sorted(whole & adapted):
            problems.append(f"{both[0]} cannot train whole and with a pair: train, lora.targets")
    if not problems and not (whole | adapted) - frozen:
        problems.append("freeze leaves nothing to train")
    problems += _split_experts(adapted - frozen)
    if problems:
        raise ConfigError(problems)
    return Selection(
        tuple(name for name in names if name in whole - frozen),
        tuple(name for name in names if name in adapted - frozen),
    )


def _unusable(pattern: str, hits: set[str], usable: set[str], tied: bool) -> list[str]:
    if hits and not usable:
        kind = "the router" if all(name.endswith(_ROUTER) for name in hits) else sorted(hits)[0]
        return [
            f"lora.targets: {pattern!r} is {kind}, which takes no pair of matrices; "
            f"train: [{pattern}] trains it whole"
        ]
    if tied and usable & {EMBEDDING, HEAD}:
        return [
            f"lora.targets: {pattern!r} is the embedding, which is the head too in this model "
            "(tie_word_embeddings), and an adapter cannot say so; train: [embed_tokens] trains "
            "it whole"
        ]
    return []


def _split_experts(adapted: set[str]) -> list[str]:
    """Refuse pairs beside some projections of routed experts only."""
    stacks = [name for name in adapted if is_expert_parameter(name)]
    if len(stacks) == 3 * len({name.rpartition(".")[0] for name in stacks}):
        return []
    return [
        "lora.targets: routed experts take pairs at gate_proj, up_proj and down_proj together, "
        "since transformers 5 fuses them: name `experts`, or leave them out: freeze: [experts]"
    ]


def trained_sizes(
    shapes: Mapping[str, tuple[int, ...]], selection: Selection, lora: LoraConfig | None
) -> dict[str, int]:
    """Return the number of elements of each parameter that trains, those of pairs included."""
    sizes = {name: math.prod(shapes[name]) for name in selection.whole}
    if lora is None:
        return sizes
    for name in selection.adapted:
        made = pair_shapes(name, shapes[name], lora.rank, dora=lora.dora)
        sizes |= {matrix: math.prod(shape) for matrix, shape in made.items()}
    return sizes


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that hold `pattern`, a glob, as whole parts between dots.

    Experts are stacked, so a number of an expert is matched by `*` alone.
    """
    # `.*norm` is a habit from regexes.
    glob = re.sub(r"^\.\*", "*", pattern.removesuffix(".weight"))
    inner = fnmatch.translate(glob).removesuffix(r"\Z")
    regex = re.compile(rf"(?:.+\.)?{inner}(?:\..+)?")

    def matches(name: str) -> bool:
        if is_expert_parameter(name):
            one = name.replace(".mlp.experts.", ".mlp.experts.#.") + ".weight"
            return any(map(regex.fullmatch, (name, one)))
        return regex.fullmatch(name) is not None

    return [name for name in names if matches(name)]


def _known(names: Sequence[str]) -> list[str]:
    parts = (part for name in names for part in name.split("."))
    return [part for part in dict.fromkeys(parts) if not part.isdigit() and part != "weight"]


# ---- a model that trains in part -----------------------------------------------------------------


@dataclass(frozen=True)
class PartialTraining:
    """Describe the part of a model that trains, and say where the rest of it is on disk.

    base: the path of the directory, and a hash of its weights.
    """

    selection: Selection
    adapter: Adapter | None
    base: Mapping[str, str]

    @property
    def adapter_alone(self) -> bool:
        """Return whether the model without its adapter is the one that the stage started from."""
        return not self.selection.whole


def begin_partial_training(
    model: Ernie4_5_MoeForCausalLM,
    selection: Selection,
    lora: LoraConfig | None,
    base: Mapping[str, str],
    seed: int,
) -> None:
    """Freeze what `selection` does not name, and give the adapted parameters their pairs.

    A starts as PEFT's does, uniform within 1 / sqrt(in), and B as zeros; of an embedding A is zero
    and B normal. The numbers depend on `seed` and names alone, not on the number of ranks.
    """
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = name not in selection.whole
    adapter = None if lora is None else Adapter(lora)
    model.partial = PartialTraining(selection, adapter, base)
    if adapter is None:
        return
    parameters = dict(model.named_parameters())
    by_layer: dict[str, dict[str, Pair]] = {}
    for number, name in enumerate(selection.adapted):
        adapter.pairs[name] = pair = new_pair(model, name, parameters[name], adapter, seed, number)
        layer, _, attribute = name.rpartition(".")
        by_layer.setdefault(layer, {})[attribute] = pair
    for layer, pairs in by_layer.items():
        _replace(model, layer, partial(adapted_layer, pairs=pairs))


def end_partial_training(model: Ernie4_5_MoeForCausalLM) -> None:
    """Drop the pairs and let all parameters train again; does nothing where they do."""
    before, model.partial = model.partial, None
    if before is None:
        return
    for name in before.selection.adapted:
        _replace(model, name.rpartition(".")[0], lambda layer: getattr(layer, "base", layer))
    for parameter in model.parameters():
        parameter.stop_gradient = False


def trained_parameters(model: nn.Layer) -> dict[str, Tensor]:
    """Return the parameters that train, those of pairs included, by name."""
    named = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    adapter = adapter_of(model)
    return named if adapter is None else named | adapter.parameters()


def set_dropout_key(model: nn.Layer, *key: int) -> None:
    """Determine what the pairs drop until the next call; does nothing without pairs."""
    adapter = adapter_of(model)
    if adapter is not None:
        adapter.step_key = zlib.crc32(repr(key).encode())


def adapter_of(model: object) -> Adapter | None:
    """Return the adapter of a model that has one."""
    part: PartialTraining | None = getattr(model, "partial", None)
    return None if part is None else part.adapter


@contextmanager
def adapter_off(model: Ernie4_5_MoeForCausalLM) -> Iterator[None]:
    """Compute with the base model inside the context."""
    adapter = adapter_of(model)
    if adapter is None:
        yield
        return
    adapter.enabled = False
    try:
        yield
    finally:
        adapter.enabled = True


def _replace(model: nn.Layer, path: str, change: Callable[[Any], Any]) -> None:
    """Replace the sublayer at a dotted path by `change` of it."""
    *parents, last = path.split(".")
    holder: Any = model
    for part in parents:
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    old = getattr(holder, last)
    new = change(old)
    new.training = old.training
    setattr(holder, last, new)
