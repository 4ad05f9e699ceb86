"""Health of the experts in training: metrics by layer, and warnings with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import paddle
from pydantic import Field

from ernie_train.core.config import PositiveInt, StrictConfig
from ernie_train.core.errors import WarnOnce
from ernie_train.losses import mean_absolute_cosine
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.train.moe_balance import RouterStatsAccumulator, moe_layers

REMEDY = "raise balance.bias_update_rate (0.001 is usual) or balance.load_balance_coef"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Reduction of a metric of each layer to one of all layers.
_OVER_LAYERS: dict[str, Callable[[list[float]], float]] = {
    "load_max": max,
    "load_cv": _mean,
    "dead_experts": sum,
    "router_entropy": _mean,
    "bias_range": max,
    "bias_mean": lambda values: max(values, key=abs),
    "router_cosine": _mean,
    "drop_rate": _mean,
    "routing_changed": _mean,
}


class MoeHealthConfig(StrictConfig):
    """Settings of the experts' metrics and warnings."""

    layers_every_steps: PositiveInt = 10
    """Steps between metrics of single layers; those over all layers are logged every step."""
    probe_every_steps: PositiveInt = 100
    """Steps between comparisons of today's choice of experts with that at the stage's start."""
    probe_tokens: PositiveInt = 512
    """Tokens of the stage's first batch on which that choice is compared."""
    warn_load_max: Annotated[float, Field(gt=1)] = 4.0
    """Load of the busiest expert over the mean load above which a warning counts."""
    warn_after_steps: PositiveInt = 20
    """Steps in a row in which an expert got no token, or exceeded its bound, before a warning."""


def layer_health(
    model: Ernie4_5_MoeForCausalLM, load: RouterStatsAccumulator
) -> dict[int, dict[str, float]]:
    """Return the metrics of each MoE layer over the tokens in `load`.

    load_max: busiest expert's tokens over the mean; load_cv: standard deviation over the mean;
    dead_experts: how many got no token; router_entropy: mean over tokens in nats; bias_range:
    largest less smallest selection bias; bias_mean: its mean, which choices do not depend on and
    updates keep at 0; router_cosine: mean |cosine| between two experts' router
    columns; drop_rate: share of choices dropped, where the model has a capacity factor.
    """
    figures = {}
    for at, (layer, moe) in enumerate(moe_layers(model).items()):
        tokens = load.tokens_per_expert[at]
        mean = max(tokens.mean(), 1e-30)
        bias = moe.moe_statics.e_score_correction_bias.numpy()
        values = {
            "load_max": float(tokens.max() / mean),
            "load_cv": float(tokens.std() / mean),
            "dead_experts": float((tokens == 0).sum()),
            "router_entropy": float(load.entropy[at] / max(load.tokens[at], 1.0)),
            "bias_range": float(np.ptp(bias)),
            "bias_mean": float(bias.mean()),
            "router_cosine": mean_absolute_cosine(moe.gate.weight),
        }
        if model.config.moe_capacity_factor is not None:
            values["drop_rate"] = float(load.dropped[at] / max(tokens.sum(), 1.0))
        figures[layer] = values
    return figures


def over_layers(figures: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Reduce the metrics of all layers to `moe/<name>`: the worst, the sum or the mean."""
    names = {name: None for values in figures.values() for name in values}
    return {
        f"moe/{name}": float(_OVER_LAYERS[name]([values[name] for values in figures.values()]))
        for name in names
    }


class PromptProbe(NamedTuple):
    """A row of prompts, each a document; every array [1,T]."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    position_ids: np.ndarray

    @classmethod
    def of(cls, prompts: Iterable[list[int]], max_tokens: int) -> PromptProbe:
        """The first prompts that hold `max_tokens` together, or all of them."""
        chosen: list[list[int]] = []
        for prompt in prompts:
            chosen.append(prompt)
            if sum(map(len, chosen)) >= max_tokens:
                break
        lengths = [len(prompt) for prompt in chosen]
        documents = np.repeat(np.arange(1, len(chosen) + 1), lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        return cls(np.concatenate(chosen)[None], documents[None], positions[None])


@dataclass(frozen=True)
class RoutingProbe:
    """Some tokens, with the experts that they had at the start of the stage."""

    input_ids: np.ndarray  # [B,S]
    document_ids: np.ndarray  # [B,S]
    position_ids: np.ndarray  # [B,S]
    expert_ids: np.ndarray  # [L,T,K] sorted; T real tokens

    @classmethod
    def take(cls, model: Ernie4_5_MoeForCausalLM, batch: Any, max_tokens: int) -> RoutingProbe:
        """Record the experts of a batch's first tokens: whole rows, or a part of a long one."""
        rows = max(1, max_tokens // np.asarray(batch.input_ids).shape[1])
        first = [
            np.asarray(array)[:rows, :max_tokens].copy()
            for array in (batch.input_ids, batch.document_ids, batch.position_ids)
        ]
        ids, documents, positions = first
        return cls(ids, documents, positions, _chosen_experts(model, ids, documents, positions))

    def changed(self, model: Ernie4_5_MoeForCausalLM) -> list[float]:
        """Return, for each MoE layer, the share of tokens that now go to another set of experts."""
        now = _chosen_experts(model, self.input_ids, self.document_ids, self.position_ids)
        return [float(share) for share in (now != self.expert_ids).any(-1).mean(-1)]

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _chosen_experts(
    model: Ernie4_5_MoeForCausalLM, input_ids: Any, document_ids: Any, position_ids: Any
) -> np.ndarray:
    training = model.training
    model.eval()
    with paddle.no_grad():
        output = model.model(
            paddle.to_tensor(input_ids), paddle.to_tensor(position_ids), document_ids
        )
    if training:
        model.train()
    chosen = paddle.stack([stats.expert_ids for stats in output.router_stats]).numpy()
    return np.sort(chosen, axis=-1).astype(np.int16)


class MoeHealth:
    """Metrics and warnings of one stage; call `observe` every step.

    The probe of routing takes its tokens from `first_batch()` at the start of the stage.
    """

    def __init__(
        self,
        model: Ernie4_5_MoeForCausalLM,
        config: MoeHealthConfig,
        *,
        first_batch: Callable[[], Any],
        state: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`state`: what `state_dict` returned at the checkpoint that training resumes from."""
        self.model, self.config = model, config
        self.layers = list(moe_layers(model))
        self._dead_steps = np.zeros((len(self.layers), model.config.moe_num_experts), np.int64)
        self._high_steps = np.zeros(len(self.layers), np.int64)
        self._alerts = WarnOnce(warn)
        self._dead: dict[int, frozenset[int]] = dict.fromkeys(self.layers, frozenset())
        self._probe: RoutingProbe | None = None
        if state is not None and self.layers:
            self._probe = RoutingProbe(**state["probe"])
            self._dead_steps, self._high_steps = state["dead_steps"], state["high_steps"]
        elif self.layers:
            self._probe = RoutingProbe.take(model, first_batch(), config.probe_tokens)

    def state_dict(self) -> dict[str, Any]:
        if self._probe is None:
            return {}
        counts = {"dead_steps": self._dead_steps.copy(), "high_steps": self._high_steps.copy()}
        return {"probe": self._probe.state_dict(), **counts}

    def observe(self, step: int, load: RouterStatsAccumulator) -> dict[str, float]:
        """Return the metrics of a step, and warn of idle or overloaded experts."""
        if self._probe is None:
            return {}
        figures = layer_health(self.model, load)
        if step % self.config.probe_every_steps == 0:
            for layer, share in zip(self.layers, self._probe.changed(self.model), strict=True):
                figures[layer]["routing_changed"] = share
        metrics = over_layers(figures)
        if step % self.config.layers_every_steps == 0:
            for layer, values in figures.items():
                metrics |= {f"moe/layer_{layer:02d}/{n}": v for n, v in values.items()}
        self._warn_of_dead(load)
        self._warn_of_load(figures)
        return metrics

    def _warn_of_dead(self, load: RouterStatsAccumulator) -> None:
        idle = load.tokens_per_expert == 0
        self._dead_steps = np.where(idle, self._dead_steps + 1, 0)
        steps = self.config.warn_after_steps
        for layer, idle_steps in zip(self.layers, self._dead_steps, strict=True):
            dead = frozenset(np.flatnonzero(idle_steps >= steps).tolist())
            listed = ", ".join(map(str, sorted(dead)[:8])) + (" and more" if len(dead) > 8 else "")
            text = f"layer {layer}: expert {listed} got no token for {steps} steps; {REMEDY}"
            more = dead - self._dead[layer]  # warn again when another one dies
            self._alerts.check(("dead", layer), bool(dead), text, worse=bool(more))
            self._dead[layer] = dead

    def _warn_of_load(self, figures: Mapping[int, Mapping[str, float]]) -> None:
        bound, steps = self.config.warn_load_max, self.config.warn_after_steps
        for at, (layer, values) in enumerate(figures.items()):
            high = values["load_max"] > bound
            self._high_steps[at] = self._high_steps[at] + 1 if high else 0
            text = (
                f"layer {layer}: the busiest expert has had more than {bound:g} times the mean "
                f"load for {steps} steps, now {values['load_max']:.1f} times; {REMEDY}"
            )
            self._alerts.check(("load", layer), self._high_steps[at] >= steps, text)
