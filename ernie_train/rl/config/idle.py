"""Find settings of an RL stage that would be accepted and change nothing.

Each rule yields what it finds: a message that names the settings and the fix, and the values with
which the stage would train the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Any

from ernie_train.core.config import StrictConfig

_Stage = Any  # an UpoConfig, whose module imports this one


@dataclass(frozen=True)
class Idle:
    """Settings that cannot act beside the others; `same` has path -> the value that does as much.

    `same` is empty where no value does exactly as much, as the schedule counts empty minibatches.
    """

    message: str
    same: Mapping[str, Any] = field(default_factory=dict)


def settings_without_effect(config: _Stage) -> list[Idle]:
    """Return each group of settings that cannot act beside the others."""
    return [
        *_in_one_step(config),
        *_beyond_the_groups(config),
        *_under_replay(config),
        *_without_rollouts(config),
        *_shares(config),
        *_shared_prompts(config),
        *_measured(config),
        *_of_our_own_sampler(config),
    ]


def _given(config: StrictConfig | None, prefix: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return path -> default of the keys that have another value than their default."""
    if config is None:
        return {}
    fields = type(config).model_fields
    defaults = {key: fields[key].get_default(call_default_factory=True) for key in keys}
    return {prefix + key: value for key, value in defaults.items() if getattr(config, key) != value}


def _message(idle: Mapping[str, Any], why: str, or_else: str = "") -> Iterator[Idle]:
    if idle:
        them = "it" if len(idle) == 1 else "them"
        have = "has" if len(idle) == 1 else "have"
        yield Idle(f"{', '.join(idle)} {have} no effect {why}: leave {them} out{or_else}", idle)


def _in_one_step(config: _Stage) -> Iterator[Idle]:
    """Before the only step of a rollout the policy is still the one of its old logprobs."""
    policy, lora = config.policy, config.lora
    if policy.update_epochs * policy.minibatches > 1 or (lora is not None and lora.dropout):
        return
    idle = _given(policy, "policy.", ("ratio", "clip_ratio", "clip_ratio_high", "dual_clip"))
    idle |= _given(config.critic, "critic.", ("clip_range",))
    yield from _message(
        idle,
        "with one optimizer step a rollout, before which nothing has moved",
        ", or raise policy.minibatches or policy.update_epochs",
    )


def _beyond_the_groups(config: _Stage) -> Iterator[Idle]:
    rollout, policy, preference = config.rollout, config.policy, config.preference
    rounds = 1
    if config.learns_from_every_group or (preference is not None and preference.of_rollouts):
        rounds += rollout.refill_rounds  # else refills replace groups that teach nothing
    most = rounds * (rollout.prompts_per_iteration or 0)
    if config.offline is not None:
        most += config.offline.per_iteration
    if policy.minibatches > most > 0:
        yield Idle(
            f"policy.minibatches={policy.minibatches} is more than the {most} groups and offline "
            "pairs of an iteration, which are not divided: the others would be empty"
        )


def _under_replay(config: _Stage) -> Iterator[Idle]:
    """Prompts, completions and rewards of a replay are recorded."""
    rollout, preference = config.rollout, config.preference
    if rollout.replay is None or not config.samples_each_iteration:
        return
    idle = _given(rollout, "rollout.", ("refill_rounds",)) | _given(config, "", ("audit_reward",))
    if preference is None or not preference.samples_completions:
        idle |= _given(rollout, "rollout.", ("top_p", "top_k"))
        idle |= _given(config, "", ("curriculum",))
        if config.evaluation is None and rollout.engine.kind == "own":
            idle |= _given(rollout, "rollout.", ("batch_size",))
    yield from _message(idle, "with rollout.replay, which has what was sampled and scored")


def _without_rollouts(config: _Stage) -> Iterator[Idle]:
    """On offline pairs alone iterations sample nothing."""
    if config.samples_each_iteration:
        return
    idle = _given(
        config.rollout,
        "rollout.",
        ("prompts_per_iteration", "skip_solved", "refill_rounds", "dump", "replay"),
    )
    idle |= _given(config, "", ("audit_reward",))
    idle |= _given(config.curriculum, "curriculum.", ("raise_at",))
    yield from _message(idle, "where iterations sample nothing")


def _shares(config: _Stage) -> Iterator[Idle]:
    """A share of fewer than one of the stage's groups is none."""
    if not config.samples_each_iteration:
        return
    rollout, preference = config.rollout, config.preference
    prompts = rollout.prompts_per_iteration or 0
    groups = prompts * (config.iterations + rollout.refill_rounds)
    pair_reward = preference.pair_reward if preference is not None else None
    rewards = {"audit_reward": config.audit_reward, "preference.pair_reward": pair_reward}
    for name, reward in rewards.items():
        if reward is not None and not floor(groups * reward.share):
            yield Idle(
                f"{name}.share={reward.share:g} of the stage's {groups} groups is none: raise it",
                {name: None},
            )


def _shared_prompts(config: _Stage) -> Iterator[Idle]:
    if not config.share_prompts:
        return
    if config.micro_batch_size < 2:
        yield Idle(
            "share_prompts has no effect with micro_batch_size=1: completions of a prompt must go "
            "through the model together",
            {"share_prompts": False},
        )
    elif config.rollout.group_size < 2 and config.preference is None:
        yield Idle(
            "share_prompts has no effect with rollout.group_size=1: no two completions share one",
            {"share_prompts": False},
        )


def _measured(config: _Stage) -> Iterator[Idle]:
    """Only completions that do not train are left out."""
    most, rollout = config.measured_completions, config.rollout
    if most is None:
        return
    rounds = 1 + rollout.refill_rounds
    total = rounds * (rollout.prompts_per_iteration or 0) * rollout.group_size
    if not config.samples_each_iteration:
        why = "where iterations sample nothing"
    elif config.learns_from_every_group:
        why = "with a critic or a KL in the reward, where every group trains"
    elif most >= total:
        why = f"as an iteration has {total} completions at most"
    else:
        return
    yield from _message({"measured_completions": None}, why)


def _of_our_own_sampler(config: _Stage) -> Iterator[Idle]:
    """An engine has no use for the settings of our own sampler, nor all that it records."""
    rollout = config.rollout
    if rollout.engine.kind == "own":
        return
    if config.policy.router_replay and rollout.engine.kind == "fastdeploy":
        yield Idle(
            "policy.router_replay needs the experts that sampling chose, which fastdeploy does "
            "not give: leave it out, or sample with vllm or our own sampler"
        )
    yield from _message(
        _given(rollout, "rollout.", ("batch_size",)),
        "on an engine, as it is that of our own sampler",
        ": engine.parallel has how many requests go out at a time",
    )
