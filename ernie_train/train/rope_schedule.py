"""The RoPE-base schedule: phases of a stage, each with its base, sequence length and duration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ernie_train.core.config import PositiveInt, StrictConfig
from ernie_train.model.rope import interpolated_base


class Upsample(StrictConfig):
    """Draw documents of more than `longer_than` tokens `factor` times as often as others."""

    longer_than: PositiveInt
    """Tokens beyond which a document is long."""
    factor: Annotated[float, Field(gt=1)]
    """How many times as often it is drawn."""


class RopePhase(StrictConfig):
    """Settings of one phase of a `rope_schedule`."""

    rope_theta: Annotated[float, Field(gt=1)]
    """RoPE's base in this phase."""
    seq_len: Annotated[int, Field(ge=2)]
    """Tokens of a row in this phase; raises `max_position_embeddings` of a model from `path`."""
    steps: PositiveInt | None = None
    """Duration in steps; give this or `tokens`."""
    tokens: PositiveInt | None = None
    """Duration in positions of the batches, padding included; the last step may exceed it."""
    transition: Literal["jump", "smooth"] = "jump"
    """`jump` takes the base from the first step on, `smooth` reaches it at the phase's last step,
    by the same factor each step.
    """
    micro_batch_size: PositiveInt | None = None
    """Rows of a micro-batch; the stage's, unless given."""
    upsample: Upsample | None = None
    """Draws long documents (as split to `seq_len`) more often than they occur."""

    @model_validator(mode="after")
    def _consistent(self) -> RopePhase:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("exactly one of steps and tokens must be given")
        if self.upsample is not None and self.upsample.longer_than >= self.seq_len:
            raise ValueError(
                f"upsample.longer_than={self.upsample.longer_than} must lie below "
                f"seq_len={self.seq_len}: no document is longer than a row"
            )
        return self


@dataclass(frozen=True)
class Phase:
    """A phase with all defaults filled in; a stage without a schedule is one phase."""

    seq_len: int
    micro_batch_size: int
    steps: int | None = None  # None: until the stage ends
    rope_theta: float | None = None  # None: the model keeps its base
    smooth: bool = False
    upsample: Upsample | None = None


def resolve(phase: RopePhase, micro_batch_size: int, grad_accum_steps: int) -> Phase:
    """Fill in the defaults of the stage."""
    rows = phase.micro_batch_size or micro_batch_size
    steps = phase.steps or -(-(phase.tokens or 0) // (rows * grad_accum_steps * phase.seq_len))
    smooth = phase.transition == "smooth"
    return Phase(phase.seq_len, rows, steps, phase.rope_theta, smooth, phase.upsample)


def check_rising(phases: Sequence[RopePhase]) -> None:
    """Raise ValueError that names the phase where the base or the length decreases."""
    for at in range(1, len(phases)):
        for name in ("rope_theta", "seq_len"):
            before, now = getattr(phases[at - 1], name), getattr(phases[at], name)
            if now < before:
                raise ValueError(
                    f"rope_schedule.{at}.{name}={now:g} lies below the {before:g} of the phase "
                    "before: a schedule never goes down"
                )


class RopeSchedule:
    """The base and the sequence length of every step of a stage."""

    def __init__(self, phases: Sequence[Phase], start_theta: float) -> None:
        """`start_theta`: the model's base when the stage began."""
        self.phases, self.start_theta = list(phases), start_theta

    def at(self, step: int) -> tuple[float, int]:
        """Return the base and the sequence length of optimizer step `step`, counted from 1.

        A smooth phase of n steps from base a to base b has a * (b/a)^(i/n) at its step i.
        """
        theta, begun = self.start_theta, 0
        for phase in self.phases:
            target = theta if phase.rope_theta is None else phase.rope_theta
            if phase.steps is None or step <= begun + phase.steps:
                if phase.smooth and phase.steps is not None:
                    target = interpolated_base(theta, target, step - begun, phase.steps)
                return target, phase.seq_len
            theta, begun = target, begun + phase.steps
        return theta, self.phases[-1].seq_len
