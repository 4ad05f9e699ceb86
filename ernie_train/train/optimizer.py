"""AdamW with decay groups, gradient clipping and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import paddle
from paddle import Tensor, nn
from pydantic import Field, model_validator

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.config import NonNegative, NonNegativeInt, Positive, StrictConfig
from ernie_train.core.errors import CheckpointError
from ernie_train.io.safetensors import ArraysByOtherNames
from ernie_train.model.dtypes import cast, zero_parameter
from ernie_train.model.lora import MAGNITUDE
from ernie_train.model.partial import trained_parameters
from ernie_train.weights.adapters import Rename

# Slots of AdamW's state in Paddle; `_state_name` names them.
_MOMENTS = ("moment1", "moment2")
_POWERS = ("beta1_pow_acc", "beta2_pow_acc")

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(StrictConfig):
    """AdamW (arXiv:1711.05101) and its schedule; defaults as in ERNIE 4.5's pre-training."""

    lr: Positive
    """Highest learning rate of the schedule."""
    min_lr: NonNegative = 0.0
    """Learning rate that the schedule falls to."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Course of the learning rate after warm-up; `wsd` holds it, then lets it fall over
    `decay_fraction` of the steps.
    """
    warmup_steps: NonNegativeInt = 0
    """First steps, over which the rate rises from 0."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of all steps over which the rate of `wsd` falls."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of AdamW, on matrices alone."""
    beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    beta2: Fraction = 0.95
    """Decay of AdamW's second moment."""
    eps: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    clip_grad_norm: Positive | None = 1.0
    """Largest global norm of the gradient, which is scaled down to it; `null` for no bound."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients of bfloat16 weights (on a GPU) are summed over micro-batches and
    ranks. `bfloat16` takes half the memory and rounds each sum to 8 bits.
    """

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} exceeds lr={self.lr}")
        if self.schedule == "wsd" and self.decay_fraction is None:
            raise ValueError("schedule='wsd' needs decay_fraction")
        if self.schedule != "wsd" and self.decay_fraction is not None:
            raise ValueError(f"decay_fraction has no effect under schedule={self.schedule!r}")
        if self.schedule == "constant" and self.min_lr != 0:
            raise ValueError("min_lr has no effect under schedule='constant'")
        return self


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (counted from 1) of `total_steps`.

    Step s of the first w = `warmup_steps` has `lr * s / w`. Then the rate falls from `lr` at the
    first step of the decay to `min_lr` after the last step, so that every step trains: with
    progress p = (s - 1 - begin) / (total_steps - begin), from begin = w, cosine has
    `min_lr + (lr - min_lr) * (1 + cos(pi * p)) / 2` and linear `min_lr + (lr - min_lr) * (1 - p)`.
    wsd holds `lr`, then has `min_lr + (lr - min_lr) * (1 - sqrt(p))` over the last
    `decay_fraction` of the steps (arXiv:2405.18392), or what warm-up left of them.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, total_steps - max(1, round((config.decay_fraction or 0) * total_steps)))
    progress = (step - 1 - begin) / max(1, total_steps - begin)
    progress = min(1.0, max(0.0, progress))
    if config.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 1.0 - math.sqrt(progress)
    return config.min_lr + (config.lr - config.min_lr) * share


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: to matrices, not to biases, norms and magnitudes."""
    return parameter.ndim > 1 and not name.endswith(("bias", MAGNITUDE))


class Optimizer:
    """AdamW over a model's trained parameters, with its state under the parameters' names.

    With several ranks each parameter has an owner among the ranks that hold it, which writes it to
    checkpoints. Under `sharding` the owner alone keeps its state, updates it and broadcasts it
    (ZeRO-1, arXiv:1910.02054). With `shards_gradients` the owner alone also gets the sum of the
    gradient (ZeRO-2); that is the default on a GPU.

    Raises `ValueError` for `shards_gradients` without `sharding`.
    """

    def __init__(
        self, model: nn.Layer, config: OptimConfig, *, shards_gradients: bool | None = None
    ) -> None:
        self.config = config
        sharding = process_group.grid().sharding
        if shards_gradients and not sharding:
            raise ValueError("gradients cannot be sharded where optimizer state is not")
        on_gpu = paddle.get_device().startswith("gpu")
        self.shards_gradients = sharding and (
            on_gpu if shards_gradients is None else shards_gradients
        )
        self.parameters = trained_parameters(model)
        self.owners = parallel.parameter_owners(self.parameters)
        mine = {n: p for n, p in self.parameters.items() if self.owners[n] == process_group.rank()}
        self.owned = mine  # what this rank writes
        self.updated = mine if sharding else self.parameters
        parallel.set_gradient_dtype(self.parameters.values(), config.gradient_dtype)
        self._reducer = parallel.GradientReducer(
            self.parameters, self.owners if self.shards_gradients else None
        )

    @cached_property
    def _masters(self) -> dict[str, Tensor]:
        """Float32 weights that AdamW updates: the parameters, or copies of those in bfloat16.

        A step may be smaller than bfloat16 resolves. They are made by the first step or by
        `load_state`; until then other weights may be loaded.
        """
        return {name: _master(parameter) for name, parameter in self.updated.items()}

    @cached_property
    def _adamw(self) -> paddle.optimizer.AdamW:
        config = self.config
        decayed = {m.name for n, m in self._masters.items() if decays(n, m)}
        return paddle.optimizer.AdamW(
            learning_rate=config.lr,
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.eps,
            weight_decay=config.weight_decay,
            # Paddle (3.3.1) refuses an empty list: a rank that owns nothing has a dummy parameter.
            parameters=list(self._masters.values()) or [paddle.create_parameter([1], "float32")],
            apply_decay_param_fun=lambda name: name in decayed,
        )

    def begin_last_backward(self) -> None:
        """Let gradients travel to other ranks during the next backward pass.

        It must be the last one before `reduce_gradients`.
        """
        self._reducer.begin_last_backward()

    def reduce_gradients(self) -> None:
        """Sum the gradients over ranks; once a step, before anything reads them."""
        self._reducer.finish()

    def gradient_norm(self) -> float:
        """Return the global 2-norm of all gradients, summed in float64.

        Each parameter counts once: dense gradients are equal on all ranks and need no reduction;
        those of experts are summed over one expert group, which holds each expert once.
        """
        if self.shards_gradients:
            own = _square_sums(self.owned.values())
            everyone = range(process_group.world_size())
            return math.sqrt(process_group.sum_over_ranks(everyone, math.fsum(own)))
        dense, experts = parallel.split_experts(self.parameters)
        squares, of_experts = _square_sums(dense.values()), _square_sums(experts.values())
        if process_group.grid().expert > 1:
            group = process_group.grid().expert_group(process_group.rank())
            of_experts = [process_group.sum_over_ranks(group, math.fsum(of_experts))]
        return math.sqrt(math.fsum([*squares, *of_experts]))

    def step(self, lr: float, gradient_norm: float) -> None:
        """Update once with the learning rate `lr`, after clipping gradients to `clip_grad_norm`."""
        limit = self.config.clip_grad_norm
        scale = limit / gradient_norm if limit is not None and gradient_norm > limit else None
        with paddle.no_grad():
            for name, parameter in self.updated.items():
                gradient, master = parallel.gradient(parameter), self._masters[name]
                if gradient is None:
                    continue
                if scale is not None:
                    gradient.scale_(scale)
                if master is not parameter:
                    master.grad = cast(gradient, paddle.float32)
                    parallel.free_gradients([parameter])  # Paddle has copied it
        self._adamw.set_lr(lr)
        # The first step names the moments. Paddle 3.3.1 numbers names through the whole process, so
        # that the second optimizer of a parameter, in the next stage, would call them "..._1".
        with paddle.utils.unique_name.guard():
            self._adamw.step()
        for name, parameter in self.updated.items():
            master = self._masters[name]
            if master is not parameter:
                with paddle.no_grad():
                    paddle.assign(cast(master, parameter.dtype), output=parameter)
                master.clear_gradient(False)
        if self.updated is not self.parameters:
            parallel.broadcast_updated(self.parameters, self.owners)

    def clear_gradients(self) -> None:
        """Free the gradients: the next forward pass has the memory for its activations."""
        parallel.free_gradients(self.parameters.values())

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return `{"moment1"|"moment2"|"master": {name: tensor}}` of this rank's own parameters.

        It is empty before the first step.
        """
        found = self._adamw.state_dict()
        slots: dict[str, dict[str, Tensor]] = {}
        for slot in _MOMENTS:
            named = {n: found.get(_state_name(self._masters[n], slot)) for n in self.owned}
            if held := {n: t for n, t in named.items() if t is not None}:
                slots[slot] = held
        in_bfloat16 = {n: p for n, p in self.owned.items() if p.dtype != paddle.float32}
        if slots and in_bfloat16:
            slots["master"] = {name: self._masters[name] for name in in_bfloat16}
        return slots

    def beta_powers(self) -> dict[str, float]:
        """Return beta1^t and beta2^t of the bias correction, which all parameters share.

        Every rank must call it.
        """
        found = self._adamw.state_dict()
        first = next(iter(self._masters.values()), None)
        keys = {} if first is None else {slot: _state_name(first, slot) for slot in _POWERS}
        own = {slot: found[key].item() for slot, key in keys.items() if key in found}
        return next((powers for powers in process_group.all_gather_objects(own) if powers), {})

    def load_state(
        self, moments: Mapping[str, Mapping[str, np.ndarray]], powers: Mapping[str, float]
    ) -> None:
        """Restore `powers`, and of the `moments` of all ranks those that this one updates.

        They are read one after another, and no others.

        Raises `CheckpointError` that names parameters without saved state, or of another dtype, and
        `WeightsError` for an array that cannot be read or is of another shape.
        """
        if moments:
            _require_same_dtypes(self.updated, moments.get("master", {}))
        # Checkpoints of bfloat16 training once held masters alone.
        if lacking := [slot for slot in _MOMENTS if moments and slot not in moments]:
            raise CheckpointError(f"optimizer state lacks {' and '.join(lacking)}")
        restored: dict[str, Tensor] = {}
        for slot, named in moments.items():
            held = self._masters
            if slot == "master":
                held = {n: m for n, m in held.items() if m is not self.updated[n]}
            if missing := sorted(set(held) - set(named)):
                raise CheckpointError(f"optimizer state {slot!r} lacks {', '.join(missing[:5])}")
            for name, master in held.items():
                tensor = paddle.to_tensor(named[name])
                if slot == "master":
                    master.set_value(tensor)
                else:
                    restored[_state_name(master, slot)] = tensor
        for slot, value in powers.items():
            for master in self._masters.values():
                restored[_state_name(master, slot)] = paddle.to_tensor([value], "float32")
        for name, tensor in restored.items():
            tensor.name = name
        self._adamw.set_state_dict(restored)


def _require_same_dtypes(parameters: Mapping[str, Tensor], masters: Collection[str]) -> None:
    """Raise `CheckpointError` where the parameters have masters otherwise than those saved.

    Float32 weights would be what bfloat16 left of the masters, bfloat16 ones would have masters of
    rounded weights: either way the training that goes on is not the one that was begun.
    """
    for name, parameter in parameters.items():
        in_float32 = parameter.dtype == paddle.float32
        if name in masters if in_float32 else not masters:
            saved, here = "float32, as on a CPU", "bfloat16, as on a GPU"
            if in_float32:
                saved, here = here, saved
            raise CheckpointError(
                f"the stage was begun in {saved}, and would go on in {here} ({name}): go on with "
                "the `device` that it began on, or begin it again (--from)"
            )


def _master(parameter: Tensor) -> Tensor:
    """Return a float32 parameter itself, a float32 copy of another."""
    if parameter.dtype == paddle.float32:
        return parameter
    copy = zero_parameter(parameter.shape, "float32")
    with paddle.no_grad():
        return paddle.assign(cast(parameter, paddle.float32), output=copy)


def _state_name(master: Tensor, slot: str) -> str:
    """Return the key of a slot in Paddle's `state_dict`."""
    return f"{master.name}_{slot}_0"


def _square_sums(parameters: Iterable[Tensor]) -> list[float]:
    """Return the sum of squares of each gradient, by one copy to the host for all of them."""
    found = []
    for parameter in parameters:
        gradient = parallel.gradient(parameter)
        if gradient is not None:
            flat = cast(gradient.reshape([-1]), paddle.float32)
            found.append(paddle.dot(flat, flat).reshape([1]))
    return [float(value) for value in paddle.concat(found).numpy()] if found else []


def optimizer_arrays(optimizer: Optimizer, to_disk: Rename) -> dict[str, np.ndarray]:
    """Return the moments and master weights that this rank writes, as `slot/name on disk`."""
    return {
        f"{slot}/{name}": array
        for slot, named in optimizer.moments().items()
        for name, array in to_disk({n: t.numpy() for n, t in named.items()}).items()
    }


def restore_optimizer(
    optimizer: Optimizer,
    arrays: Mapping[str, np.ndarray],
    powers: Mapping[str, float],
    from_disk: Rename,
    *,
    checkpoint: Path,
    steps: int,
) -> None:
    """Restore moments and master weights as `optimizer_arrays` gave them after `steps` steps.

    Raises `CheckpointError`, which names `checkpoint`, where some of them are missing.
    """
    if steps and not arrays:
        raise CheckpointError(
            f"{checkpoint}: no optimizer state although {steps} steps were made: begin this stage "
            "again with --from, or start a recipe of its own from the weights"
        )
    slots: dict[str, dict[str, str]] = {}
    for key in arrays:
        slot, _, name = key.partition("/")
        slots.setdefault(slot, {})[name] = key
    moments = {s: from_disk(ArraysByOtherNames(arrays, keys)) for s, keys in slots.items()}
    optimizer.load_state(moments, powers)
