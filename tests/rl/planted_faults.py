"""Faults for the wiring of an RL iteration: each is an edit of one function, and where it shows."""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from ernie_train import losses
from ernie_train.rl import (
    critic,
    estimators,
    learner,
    loop,
    loss,
    pairs,
    preference_data,
    report,
)
from ernie_train.rl.batch import dealing
from ernie_train.rl.config import RolloutConfig
from ernie_train.rl.learner import Learner
from ernie_train.rl.rollout import Rollout


@dataclass(frozen=True)
class Fault:
    """Text of the function `name` of `owner` that is replaced, and the setting that shows it.

    users: other modules that have imported the function by its name.
    """

    setting: str
    owner: Any
    name: str
    right: str
    wrong: str
    users: tuple[Any, ...] = ()

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        function = inspect.getattr_static(self.owner, self.name)
        function = getattr(function, "__func__", getattr(function, "fget", function))
        source = textwrap.dedent(inspect.getsource(function))
        assert self.right in source, f"{self.name} has changed: write this fault down again"
        edited = source.replace(self.right, self.wrong).replace(
            "super().__init__(", "super(Critic, self).__init__("
        )
        flags = __future__.annotations.compiler_flag
        found: dict[str, Any] = {}
        namespace = vars(sys.modules[function.__module__])
        exec(
            compile(edited, self.name, "exec", flags),
            namespace | {"__builtins__": __builtins__},
            found,
        )
        for place in (self.owner, *self.users):
            patch.setattr(place, self.name, found[self.name])


_OLD_AGAIN = """key = (self.seed, iteration, epoch, 11)
        again = sequence_logprobs(
            self.policy, batch.sequences[: batch.num_in_groups],
            temperature=config.rollout.temperature, batch_size=64,
        )
        batch = replace(batch, old_logprobs=again.logprobs)"""
_TRAINED_KL = '[k for at, k in enumerate(_kl(batch, "k3")) if batch.is_trained(at)]'
_HOME = "found[group_home[min(pair) // batch.group_size]]"
_NEXT = "found[(group_home[min(pair) // batch.group_size] + 1) % count]"

FAULTS: dict[str, Fault] = {
    # ---- the reference and KL
    "KL in the reward of the other sign": Fault(
        "kl in the reward", Learner, "_kl_penalties", "[kl.coef", "[-kl.coef"
    ),
    "KL in the reward of another scale": Fault(
        "kl in the reward", Learner, "_kl_penalties", "[kl.coef", "[0.5 * kl.coef"
    ),
    "KL in the reward by k3": Fault(
        "kl in the reward", Learner, "_kl_penalties", '"k1"', '"k3"'
    ),
    "KL of a completion as a mean over its tokens": Fault(
        "kl in the reward", estimators, "group_relative_advantages", "array.sum(", "array.mean(",
        (learner,),
    ),
    "reference at another temperature": Fault(
        "kl in the loss", Learner, "prepare", "self.config.rollout.temperature", "1.0"
    ),
    "old logprobs of the reference": Fault(
        "kl in the loss", Learner, "_with_old_logprobs", "self.policy,", "self.reference,"
    ),
    "KL metric over trained tokens": Fault(
        "kl in the loss", Learner, "prepare", '_kl(batch, "k3", measured)', _TRAINED_KL
    ),
    "KL metric over more than is measured": Fault(
        "measured", Learner, "prepare", '_kl(batch, "k3", measured)', '_kl(batch, "k3")'
    ),
    "every completion is measured": Fault(
        "measured", Learner, "_scored", "-(-count // (most or count))", "1"
    ),
    "pairs that do not train are not scored": Fault(
        "measured", Learner, "_scored", "{at for pair in batch.pairs for at in pair}",
        "{at for pair in batch.pairs for at in pair if at >= count}",
    ),
    "k3 in the loss instead of k2": Fault(
        "k2 in the loss", learner, "_policy_loss", "kl.kind_in_loss", '"k3"'
    ),
    "KL as if its tokens were the policy's own samples": Fault(
        "kl in the loss", losses.policy, "kl_loss", "estimates * paddle.clip(ratio", "estimates + 0"
        " * paddle.clip(ratio", (loss,),
    ),
    "KL with a gradient of its ratio": Fault(
        "kl in the loss", losses.policy, "kl_loss", "mask).detach())", "mask))", (loss,)
    ),
    "KL with ratios as large as they are": Fault(
        "kl in the loss", losses.policy, "kl_loss", "max=MAX_KL_RATIO", "max=1e9", (loss,)
    ),
    "k3 beyond any bound": Fault(
        "kl in the loss", losses.policy, "_k3", "-math.log(MAX_KL_RATIO)", "-1e9"
    ),
    "k3 without a slope beyond its bound": Fault(
        "kl in the loss", losses.policy, "_k3", "MAX_KL_RATIO - 1", "0.0"
    ),
    "coefficient of KL ignored": Fault(
        "kl in the loss", learner, "_policy_loss", "kl_coef=kl.coef", "kl_coef=1.0"
    ),
    # ---- the update
    "ratios reset in each epoch": Fault(
        "plain", Learner, "update", "key = (self.seed, iteration, epoch, 11)", _OLD_AGAIN
    ),
    "one order of groups in all epochs": Fault(
        "plain", Learner, "update", "iteration, epoch, 11", "iteration, 0, 11"
    ),
    "one epoch too few": Fault(
        "plain", Learner, "update", "in range(policy.update_epochs)",
        "in range(policy.update_epochs - 1)",
    ),
    "loss at another temperature": Fault(
        "plain", learner, "_policy_loss", "config.rollout.temperature", "1.0"
    ),
    "clip range turned around": Fault(
        "clipped", learner, "_policy_loss", "policy.clip_range", "policy.clip_range[::-1]"
    ),
    "no second clip of negative advantages": Fault(
        "dual clip", learner, "_policy_loss", "policy.dual_clip if policy.has_dual_clip else None",
        "None",
    ),
    "second clip of positive advantages": Fault(
        "dual clip", losses.policy, "policy_loss", "paddle.where(gain < 0, ",
        "paddle.where(gain > 0, ", (loss,),
    ),
    "coefficient of the policy ignored": Fault(
        "terms", learner, "_policy_loss", "policy_coef=policy.coef", "policy_coef=1.0"
    ),
    "entropy is minimized": Fault(
        "entropy", loss.UpoLoss, "_token_terms", "-self.entropy_coef", "self.entropy_coef"
    ),
    "terms divided by the number of micro-batches": Fault(
        "plain", loss.UpoLoss, "_count", "float(tokens.sum())", "1.0"
    ),
    "sequences weigh as much as their tokens": Fault(
        "sequence ratio", loss.UpoLoss, "_weights", "1 / np.maximum(batch.trained_tokens, 1)",
        "0.2 * np.ones(len(batch.trained_tokens))",
    ),
    "entropy beside the weights of its tokens": Fault(
        "constant", loss.UpoLoss, "_count", "sequences * (", "tokens.sum() + 0 * ("
    ),
    "metrics of the last step alone": Fault(
        "plain", report, "mean_metrics", "float(np.mean(found))", "found[-1]", (learner,)
    ),
    # ---- who learns
    "what could not be scored is trained": Fault(
        "plain", Rollout, "trained", "self.valid & (", "(self.valid | True) & ("
    ),
    "every group is trained": Fault(
        "plain", Rollout, "trained", "self.informative[:, None] | every_group", "True"
    ),
    "a KL in the reward is not seen by equal verdicts": Fault(
        "kl in the reward", Rollout, "trained", "| every_group", "| False"
    ),
    "informative by the reward": Fault(
        "plain", Rollout, "of", "varied_groups(marks", "varied_groups(reward_table"
    ),
    "masked completions are valid": Fault(
        "masked", Rollout, "of", "not (masks and not c.finished)", "True"
    ),
    "finished completions are punished": Fault(
        "punished", RolloutConfig, "length_penalty", "if not finished", "if finished"
    ),
    "the ramp begins at its end": Fault(
        "ramp", RolloutConfig, "length_penalty", "self.max_new_tokens - self.overlong_tokens",
        "self.max_new_tokens",
    ),
    "results of tools take no room on the ramp": Fault(
        "ramp", Rollout, "of", "len(c.completion_ids)", "c.num_sampled"
    ),
    "sequences of pairs are trained": Fault(
        "pairs", dealing, "_micro_batch", "not m.is_copy and batch.is_trained(m.sequence)",
        "not m.is_copy",
    ),
    # ---- advantages
    "domains are not normalized": Fault(
        "undivided", Learner, "_with_advantages", "if config.normalizes_by_domain", "if False"
    ),
    "domains are not normalized over a critic": Fault(
        "critic", Learner, "_with_advantages", "if config.normalizes_by_domain", "if False"
    ),
    "unscored completions move their domain": Fault(
        "undivided", estimators, "normalize_by_domain", "(domains == domain) & valid",
        "domains == domain", (learner,),
    ),
    "weight of the verifier forgotten": Fault(
        "plain", Learner, "_with_advantages", "verdict_span=abs(verifier.weight) * verifier.span",
        "verdict_span=1.0",
    ),
    "marks without their weight": Fault(
        "plain", Learner, "_with_advantages", "verifier.weight * rollout.marks", "rollout.marks"
    ),
    "format counts against itself": Fault(
        "plain", estimators, "group_relative_advantages", "table + apart", "table - apart",
        (learner,),
    ),
    "domains by the deviation of all": Fault(
        "undivided", estimators, "normalize_by_domain", "scaled[here].std(ddof=1)",
        "rewards.std(ddof=1)", (learner,),
    ),
    # ---- the critic
    "critic on another RoPE": Fault(
        "critic", critic.Critic, "__init__", "decoder.rope_theta = policy.model.rope_theta",
        "pass",
    ),
    "value clip never acts": Fault(
        "critic", loss.ValueLoss, "__call__", "self.clip_range", "None"
    ),
    "value clip around the returns": Fault(
        "critic", loss.ValueLoss, "__call__", "_tensor(batch.values)", "_tensor(batch.returns)"
    ),
    "gamma and lambda swapped": Fault(
        "decoupled", estimators, "gae_advantages", "gamma=gamma, lam=lam", "gamma=lam, lam=gamma",
        (learner,),
    ),
    "returns with the policy's lambda": Fault(
        "decoupled", estimators, "gae_advantages", "advantages, _ =", "advantages, returns =",
        (learner,),
    ),
    "advantages with the critic's lambda": Fault(
        "decoupled", Learner, "_with_advantages", "policy_lam=config.critic.policy_lam",
        "policy_lam=None",
    ),
    "reward at the first token": Fault(
        "decoupled", estimators, "gae_advantages", "reward_table[row, length - 1]",
        "reward_table[row, 0]", (learner,),
    ),
    "KL at the last token alone": Fault(
        "everything", estimators, "gae_advantages",
        "reward_table[row, :length] -= penalties[row]",
        "reward_table[row, length - 1] -= penalties[row].sum()", (learner,),
    ),
    "unscored completions are whitened along": Fault(
        "critic", estimators, "gae_advantages", "= flat_valid[row]", "= 1.0", (learner,)
    ),
    "explained variance over everything": Fault(
        "critic", Learner, "_with_advantages", "np.repeat(valid.", "np.repeat((valid | True)."
    ),
    "warm-up one iteration too short": Fault(
        "warm-up", Learner, "update", "iteration > warmup", "iteration >= warmup"
    ),
    "warm-up one iteration too long": Fault(
        "warm-up", Learner, "update", "iteration > warmup", "iteration > warmup + 1"
    ),
    "critic learns in the first epoch alone": Fault(
        "critic", Learner, "update", "and part.trained", "and part.trained and epoch == 0"
    ),
    "critic with the policy's optimizer": Fault(
        "critic", Learner, "__init__", "config.critic.optim", "config.optim"
    ),
    # ---- pairs
    "an online pair in another minibatch than its group": Fault(
        "pairs", dealing, "minibatches", _HOME, _NEXT, (learner,)
    ),
    "chosen and rejected swapped": Fault(
        "pairs", pairs, "best_worst_pairs", "for p, chosen, rejected in",
        "for p, rejected, chosen in",
    ),
    "offline pairs of the next iteration": Fault(
        "pairs", preference_data.OfflinePairSource, "take", "(iteration - 1)", "iteration"
    ),
    "pairs against the old logprobs": Fault(
        "pairs", dealing, "_micro_batch", "gather(batch.ref_logprobs", "gather(batch.old_logprobs"
    ),
    "coefficient of pairs ignored": Fault(
        "pairs", learner, "_policy_loss", "preference.coef", "1.0"
    ),
    # ---- what is reported
    "entropy as a mean of micro-batches": Fault(
        "plain", estimators, "_mean", "np.concatenate(known)", "np.array([k.mean() for k in known])"
    ),
    "unscored completions count as wrong": Fault(
        "plain", report, "rollout_metrics", "strict=True) if c.score.trains]", "strict=True)]",
        (loop,),
    ),
    "advantages of what is not trained": Fault(
        "plain", report, "mean_advantages", "and batch.is_trained(at)", "", (loop,)
    ),
    "lengths with the results of tools": Fault(
        "plain", report, "rollout_metrics", "c.num_sampled for c in completions",
        "len(c.completion_ids) for c in completions", (loop,),
    ),
    "longer ones counted with the results of tools": Fault(
        "pairs", pairs, "best_worst_pairs", "c.num_sampled", "len(c.completion_ids)"
    ),
    "truncation counted the other way": Fault(
        "plain", report, "rollout_metrics", "not c.finished", "c.finished", (loop,)
    ),
}  # fmt: skip
