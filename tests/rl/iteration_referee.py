"""Whole iterations of an RL stage written down a second time, in numpy and float64.

From rollouts to rewards, advantages, losses, gradients, updates and every metric. The policy is a
head [V,H] over fixed features of each context, the critic a scalar head over the same, so that
gradients have closed forms. Nothing of `ernie_train.losses` or of the learner is used; of the
project only the shuffled order of groups is, which is its choice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ernie_train.data.packing import permutation
from ernie_train.rl.config import UpoConfig
from tests.rl.referee_adamw import AdamW, Array
from tests.rl.referee_kl import k3, kl_terms


class Text(NamedTuple):
    """A sequence as the toy sees it: features [n,H] before each sampled token, and the token."""

    features: Array
    tokens: Array


class Referee:
    """A policy, its start and its critic, and what an iteration makes of them."""

    def __init__(self, config: UpoConfig, head: Array, seed: int) -> None:
        self.config, self.seed = config, seed
        self.policy, self.start = {"head": head.copy()}, head.copy()
        self.critic = {"weight": np.zeros((head.shape[1], 1)), "bias": np.zeros(1)}
        self.optim = AdamW(config.optim)
        self.critic_optim = AdamW(config.critic.optim) if config.critic else None
        self.gradients: list[dict[str, Array]] = []

    # ---- the policy ------------------------------------------------------------------------------

    def distribution(self, head: Array, text: Text) -> tuple[Array, Array]:
        """Return log-probabilities [n,V] at the sampling temperature, and those of the tokens."""
        logits = text.features @ head.T / self.config.rollout.temperature
        logits = logits - logits.max(-1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return table, table[np.arange(len(text.tokens)), text.tokens]

    def logprobs(self, text: Text) -> Array:
        return self.distribution(self.policy["head"], text)[1]

    # ---- an iteration ----------------------------------------------------------------------------

    def iterate(self, number: int, groups: Any, texts: list[Text], offline: Any) -> dict[str, Any]:
        """Return the metrics of iteration `number`, and update the weights.

        groups [P] of G scored completions; texts: theirs, and behind them those of offline
            pairs, two by two; offline: the pairs of this iteration, as numbers.
        """
        config, self.texts = self.config, texts
        size, flat = len(groups[0]), [c for group in groups for c in group]
        self.rewards = np.array([self.reward(c) for c in flat])
        self.valid = np.array([
            c.score.status in ("correct", "wrong")
            and not (config.rollout.truncated == "mask" and not c.finished) for c in flat
        ])  # fmt: skip
        marks = np.array([c.score.value for c in flat])
        self.groups = [np.arange(at, at + size) for at in range(0, len(flat), size)]
        informative = [len(set(marks[g][self.valid[g]])) > 1 for g in self.groups]
        kl = config.policy.kl
        kl_in_reward = kl.coef if kl and kl.place == "reward" else 0.0
        every = config.critic is not None or kl_in_reward > 0
        self.trained = np.concatenate([
            self.valid[g] & (every or told)
            for g, told in zip(self.groups, informative, strict=True)
        ])  # fmt: skip
        metrics = self.of_rollout(flat, informative)
        tables = [self.distribution(self.policy["head"], t) for t in texts]
        self.old = [found[1] for found in tables]
        self.ref = [self.distribution(self.start, t)[1] for t in texts]
        mine = range(len(flat))
        measured = mine[:: int(np.ceil(len(mine) / (config.measured_completions or len(mine))))]
        gaps = [self.old[i] - flat[i].sampled_logprobs.astype(np.float64) for i in measured]
        metrics["logprob_mismatch"] = np.exp(np.abs(np.concatenate(gaps))).clip(max=20).mean() - 1
        entropies = [-(np.exp(tables[i][0]) * tables[i][0]).sum(-1) for i in measured]
        metrics["entropy"] = np.concatenate(entropies).mean()
        if config.preference is not None or (kl and kl.coef):
            d = np.concatenate([self.old[i] - self.ref[i] for i in measured])
            metrics["kl"] = k3(d)[0].mean()
        penalties = [kl_in_reward * (self.old[i] - self.ref[i]) for i in mine]
        pairs = []
        if config.preference and "online" in config.preference.pairs:
            pairs, counts = self.best_and_worst()
            metrics |= counts
        pairs = pairs + [(len(flat) + 2 * n, len(flat) + 2 * n + 1) for n in offline]
        domains = np.array([c.domain for c in flat])
        if config.critic is None:
            self.group_advantages(marks, domains, penalties)
        else:
            metrics |= self.generalized_advantages(domains, penalties)
        return metrics | self.update(number, pairs)

    def reward(self, c: Any) -> float:
        rollout, tokens = self.config.rollout, len(c.completion_ids)
        if rollout.truncated not in ("punish", "ramp"):
            return c.raw_reward
        if not c.finished:
            return c.raw_reward - rollout.truncation_penalty
        if rollout.truncated == "punish":
            return c.raw_reward
        begin = rollout.max_new_tokens - rollout.overlong_tokens
        share = min(max((tokens - begin) / rollout.overlong_tokens, 0.0), 1.0)
        return c.raw_reward - rollout.truncation_penalty * share

    @staticmethod
    def texts_of(c: Any) -> list[int]:
        mask = c.sampled_mask or [True] * len(c.completion_ids)
        return [token for token, kept in zip(c.completion_ids, mask, strict=True) if kept]

    def of_rollout(self, flat: Sequence[Any], informative: Sequence[bool]) -> dict[str, Any]:
        by_group = [self.trained[g].any() for g in self.groups]
        metrics: dict[str, Any] = {
            "completions/mean_length": np.mean([len(self.texts_of(c)) for c in flat]),
            "completions/truncated": np.mean([not c.finished for c in flat]),
            "frac_reward_zero_std": np.mean(np.logical_not(informative)),
            "groups_trained": sum(by_group),
            "prompts_per_trained_group": len(self.groups) / max(1, sum(by_group)),
        }
        spread = [
            self.rewards[kept].std()
            for group in self.groups if len(kept := [i for i in group if self.valid[i]]) > 1
        ]  # fmt: skip
        if spread:
            metrics["reward_std"] = np.mean(spread)
        scored = [i for i, c in enumerate(flat) if c.score.status in ("correct", "wrong")]
        for suffix in ("", "/a", "/b"):
            own = [i for i in scored if suffix in ("", f"/{flat[i].domain}")]
            metrics[f"reward{suffix}"] = self.rewards[own].mean()
            metrics[f"accuracy{suffix}"] = np.mean([flat[i].score.value == 1 for i in own])
        for part in flat[0].reward_parts:
            metrics[f"reward_part/{part}"] = np.mean([flat[i].reward_parts[part] for i in scored])
        failed = Counter(c.score.status for c in flat)
        return metrics | {f"excluded/{s}": n for s, n in failed.items() if s == "timeout"}

    # ---- pairs and advantages --------------------------------------------------------------------

    def best_and_worst(self) -> tuple[list[tuple[int, int]], dict[str, int]]:
        pairs, counts = [], Counter[str]()
        for group in self.groups:
            kept = [i for i in group if self.valid[i]]
            if len(kept) < 2:
                counts["pairs/too_few_valid"] += 1
                continue
            top, low = max(self.rewards[kept]), min(self.rewards[kept])
            if top - low < self.config.preference.margin - 1e-6:
                counts["pairs/below_margin"] += 1
                continue
            lengths = {i: len(self.texts[i].tokens) for i in kept}
            found = sorted(
                (abs(lengths[c] - lengths[r]), lengths[c], c, r)
                for c in kept if self.rewards[c] == top for r in kept if self.rewards[r] == low
            )  # fmt: skip
            counts["pairs/tied"] += len(found) > 1
            _, _, chosen, rejected = found[0]
            counts["pairs/chosen_longer"] += lengths[chosen] > lengths[rejected]
            pairs.append((int(chosen), int(rejected)))
        names = ("too_few_valid", "below_margin", "tied", "chosen_longer")
        return pairs, {"pairs": len(pairs), **{f"pairs/{n}": counts[f"pairs/{n}"] for n in names}}

    def by_domain(self, rewards: Array, domains: Array) -> Array:
        scaled = rewards.copy()
        for domain in set(domains):
            own = self.valid & (domains == domain)
            scaled[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std(ddof=1) + 1e-4)
        return scaled

    def group_advantages(self, marks: Array, domains: Array, penalties: list[Array]) -> None:
        policy, weight = self.config.policy, self.config.reward.parts[0].weight
        alone = policy.baseline == "leave_one_out"
        scales = (policy.group_scale or ("none" if alone else "std")) == "std"
        rewards = self.rewards
        if not scales and policy.normalize_rewards != "none":
            rewards = self.by_domain(rewards, domains)
        rewards = rewards - [p.sum() for p in penalties]
        self.advantages = [np.zeros(len(t.tokens)) for t in self.texts]
        for group in self.groups:
            own = group[self.valid[group]]
            if len(own) < 2:
                continue
            n, verdict = len(own), weight * marks[own]

            def against(x: Array, n: int = n) -> Array:
                return (x - x.mean()) * (n / (n - 1) if alone else 1.0)

            if scales:
                beside = against(rewards[own] - verdict) / (abs(weight) / 2)
                found = against(verdict) / (verdict.std(ddof=1) + 1e-4) + beside
            else:
                found = against(rewards[own])
            for i, advantage in zip(own, found, strict=True):
                self.advantages[i][:] = advantage

    def generalized_advantages(self, domains: Array, penalties: list[Array]) -> dict[str, float]:
        critic, rewards = self.config.critic, self.rewards
        if self.config.policy.normalize_rewards != "none":
            rewards = self.by_domain(rewards, domains)
        self.values = [self.value(t) for t in self.texts[: len(rewards)]]
        policy_lam = critic.lam if critic.policy_lam is None else critic.policy_lam
        self.returns, self.advantages = [], []
        for values, reward, penalty in zip(self.values, rewards, penalties, strict=True):
            earned = -penalty.copy()
            earned[-1] += reward
            deltas = earned + critic.gamma * np.append(values[1:], 0.0) - values
            steps = np.arange(len(values))
            for lam, out in ((critic.lam, self.returns), (policy_lam, self.advantages)):
                decay = (critic.gamma * lam) ** np.maximum(steps - steps[:, None], 0)
                out.append((np.triu(decay) * deltas).sum(-1))
            self.returns[-1] = self.returns[-1] + values
        kept = [i for i in range(len(rewards)) if self.valid[i]]
        seen = np.concatenate([self.advantages[i] for i in kept])
        scale = np.sqrt(seen.var(ddof=1) + 1e-8)
        self.advantages = [(a - seen.mean()) / scale for a in self.advantages]
        returns = np.concatenate([self.returns[i] for i in kept])
        missed = returns - np.concatenate([self.values[i] for i in kept])
        return {"value/explained_variance": 1 - missed.var() / returns.var()}

    def value(self, text: Text) -> Array:
        return (text.features @ self.critic["weight"])[:, 0] + self.critic["bias"]

    # ---- the update ------------------------------------------------------------------------------

    def update(self, number: int, pairs: list[tuple[int, int]]) -> dict[str, float]:
        config, seen = self.config, defaultdict(list)
        compared = config.preference is not None and config.policy.coef > 0
        every = config.term_norms_every or (10 if compared else 0)
        measured = every > 0 and (self.optim.steps == 0 or number % every == 0)
        for epoch in range(config.policy.update_epochs):
            for trained, own in self.minibatches(pairs, (self.seed, number, epoch, 11)):
                if config.critic is not None and trained:
                    for name, value in self.critic_step(trained).items():
                        seen[f"critic/{name}"].append(value)
                if config.critic is None or number > config.critic.warmup_iterations:
                    step = self.policy_step(trained, own, measured=measured)
                    measured = False
                    for name, value in step.items():
                        seen[name].append(value)
        return {name: float(np.mean(values)) for name, values in seen.items()}

    def minibatches(self, pairs: list[tuple[int, int]], key: tuple[int, ...]) -> Any:
        size, count = len(self.groups[0]), self.config.policy.minibatches
        of_pairs = {c // size for c, _ in pairs if c < len(self.trained)}
        active = [p for p, g in enumerate(self.groups) if self.trained[g].any() or p in of_pairs]
        order = np.array(active)[permutation(len(active), *key)] if active else np.array([], int)
        parts = []
        given = [pair for pair in pairs if pair[0] >= len(self.trained)]
        for home, mine in enumerate(np.array_split(order, count)):
            trained = [i for p in mine for i in self.groups[p] if self.trained[i]]
            own = [p for p in pairs if p[0] < len(self.trained) and p[0] // size in mine]
            parts.append((trained if self.config.policy.coef else [], own + given[home::count]))
        return [part for part in parts if part[0] or part[1]]

    def critic_step(self, trained: list[int]) -> dict[str, float]:
        limit, total = self.config.critic.clip_range, 0.0
        grads = {name: np.zeros_like(value) for name, value in self.critic.items()}
        tokens = sum(len(self.texts[i].tokens) for i in trained)
        for i in trained:
            value, old, wanted = self.value(self.texts[i]), self.values[i], self.returns[i]
            near = value if limit is None else old + np.clip(value - old, -limit, limit)
            errors = np.maximum((value - wanted) ** 2, (near - wanted) ** 2)
            moves = ((value - wanted) ** 2 >= (near - wanted) ** 2) | (near == value)
            slope = np.where(moves, value - wanted, 0.0) / tokens
            total += 0.5 * errors.sum() / tokens
            grads["weight"] += self.texts[i].features.T @ slope[:, None]
            grads["bias"] += slope.sum()
        self.gradients.append(grads)
        norm = self.critic_optim.update(self.critic, grads)
        return {"value_loss": total, "grad_norm": norm, "lr": self.config.critic.optim.lr}

    def policy_step(
        self, trained: list[int], pairs: list[tuple[int, int]], *, measured: bool
    ) -> dict[str, float]:
        """Sums over the minibatch of each term, and of its gradient by the tokens' logprobs."""
        head = self.policy["head"]
        tables = {i: self.distribution(head, self.texts[i]) for i in {*trained, *sum(pairs, ())}}
        slopes: dict[str, dict[int, Array]] = defaultdict(
            lambda: {i: np.zeros(len(self.texts[i].tokens)) for i in tables}
        )
        metrics = self.token_terms(trained, tables, slopes) if trained else {}
        if self.config.preference and pairs:
            metrics |= self.pair_terms(pairs, tables, slopes)
        grads = {name: self.gradient(tables, by_token) for name, by_token in slopes.items()}
        if trained and self.config.policy.entropy_coef:
            grads["entropy_loss"] = self.entropy_gradient(trained, tables)
        if measured:
            metrics |= self.norms(grads)
        total = sum(grads.values())
        self.gradients.append({"head": total})
        metrics["grad_norm"] = self.optim.update(self.policy, {"head": total})
        return metrics | {"lr": self.config.optim.lr}

    def gradient(self, tables: Any, slopes: dict[int, Array]) -> Array:
        """Return the gradient of the head, of what has these slopes by the tokens' logprobs."""
        grad = np.zeros_like(self.policy["head"])
        for i, (table, _) in tables.items():
            rows = -np.exp(table) * slopes[i][:, None]
            rows[np.arange(len(rows)), self.texts[i].tokens] += slopes[i]
            grad += rows.T @ self.texts[i].features / self.config.rollout.temperature
        return grad

    def entropy_gradient(self, trained: list[int], tables: Any) -> Array:
        grad, weights = np.zeros_like(self.policy["head"]), self.token_weights(trained)
        for i in trained:
            table = tables[i][0]
            entropy = -(np.exp(table) * table).sum(-1, keepdims=True)
            rows = np.exp(table) * (table + entropy) * weights[i]
            grad += rows.T @ self.texts[i].features / self.config.rollout.temperature
        return grad * self.config.policy.entropy_coef

    @staticmethod
    def norms(grads: dict[str, Array]) -> dict[str, float]:
        found = {f"grad_norm/{name}": float(np.linalg.norm(g)) for name, g in grads.items()}
        if {"policy", "preference"} <= grads.keys():
            policy, pairs = grads["policy"], grads["preference"] + grads.get("nll_loss", 0.0)
            one, other = np.linalg.norm(policy), np.linalg.norm(pairs)
            found["preference/norm_ratio"] = other / one
            found["preference/cosine"] = (policy * pairs).sum() / (one * other)
        return found

    def token_weights(self, trained: list[int]) -> dict[int, float]:
        """Return what a token of each trained sequence weighs in the terms of tokens."""
        lengths = {i: len(self.texts[i].tokens) for i in trained}
        how, count = self.config.policy.aggregation, len(trained)
        if how == "token":
            return dict.fromkeys(trained, 1 / max(1, sum(lengths.values())))
        if how == "constant":
            return dict.fromkeys(trained, 1 / (count * self.config.rollout.max_new_tokens))
        return {i: 1 / (count * n) for i, n in lengths.items()}

    def token_terms(self, trained: list[int], tables: Any, slopes: Any) -> dict[str, float]:
        policy, weights = self.config.policy, self.token_weights(trained)
        low, high = policy.clip_range
        tokens = sum(len(self.texts[i].tokens) for i in trained)
        found = defaultdict(float)
        for i in trained:
            (table, lp), weight = tables[i], weights[i]
            logratio = lp - self.old[i]
            if policy.ratio == "sequence":
                logratio = np.full_like(lp, logratio.mean())
            ratio, gain = np.exp(logratio), self.advantages[i]
            held = np.clip(ratio, 1 - low, 1 + high)
            if policy.objective == "cispo":
                found["policy"] -= (held * gain * lp).sum() * weight
                found["clip_ratio"] += (held != ratio).sum() / tokens
                slope = -held * gain
            else:
                is_clipped = held * gain < ratio * gain
                term = np.minimum(ratio * gain, held * gain)
                if policy.ratio == "token" and policy.dual_clip is not None:
                    is_clipped |= (gain < 0) & (ratio > policy.dual_clip)
                    term = np.where(gain < 0, np.maximum(term, policy.dual_clip * gain), term)
                found["policy"] -= term.sum() * weight
                found["clip_ratio"] += is_clipped.sum() / tokens
                slope = np.where(is_clipped, 0.0, -ratio * gain)
            slopes["policy"][i] += policy.coef * slope * weight
            if policy.entropy_coef:
                found["entropy_loss"] -= (np.exp(table) * table).sum() * weight
            kl = policy.kl
            if kl and kl.coef and kl.place == "loss":
                estimate, slope, beyond = kl_terms(lp, self.old[i], self.ref[i], kl.kind)
                found["kl_loss"] += estimate.sum() * weight
                slopes["kl_loss"][i] += kl.coef * weight * slope
                found["kl_loss/truncated"] += beyond.sum() / tokens
        return dict(found)

    def pair_terms(self, pairs: Any, tables: Any, slopes: Any) -> dict[str, float]:
        settings, count = self.config.preference, len(pairs)
        means = settings.length_normalize is not False
        beta = settings.beta or (2.0 if means else 0.1)
        found = defaultdict(float)
        for pair in pairs:
            shares = [1 / len(self.texts[i].tokens) if means else 1.0 for i in pair]
            sums = [(tables[i][1] - self.ref[i]).sum() for i in pair]
            chosen, rejected = (beta * s * r for s, r in zip(shares, sums, strict=True))
            found["preference"] += np.log1p(np.exp(rejected - chosen)) / count
            pull = -settings.coef * beta / (1 + np.exp(chosen - rejected)) / count
            slopes["preference"][pair[0]] += pull * shares[0]
            slopes["preference"][pair[1]] -= pull * shares[1]
            tied = abs(chosen - rejected) < 1e-6  # at the reference: rounding decides
            for name, value in (
                ("chosen", chosen), ("rejected", rejected), ("margins", chosen - rejected),
                ("accuracies", np.nan if tied else chosen > rejected),
            ):  # fmt: skip
                found[f"rewards/{name}"] += value / count
            if settings.rpo_alpha:
                lp = tables[pair[0]][1]
                found["nll_loss"] -= lp.mean() / count
                weight = settings.coef * settings.rpo_alpha
                slopes["nll_loss"][pair[0]] -= weight / len(lp) / count
        return dict(found)
