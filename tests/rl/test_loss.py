"""UPO's objective: by definition in numpy, its special cases to the bit, and micro-batching."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import paddle
import pytest

from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import (
    MicroBatch,
    PreferencePair,
    RolloutBatch,
    TokenizedCompletion,
    micro_batches,
)
from ernie_train.rl.estimators import policy_logprobs
from ernie_train.rl.loss import DpoLoss, PairTerm, UpoLoss, term_norms
from ernie_train.train.optimizer import OptimConfig, Optimizer
from ernie_train.train.trainer import Trainer
from tests.rl.records import make_sequences
from tests.small_models import assert_same, make_config, make_model, state


def logprobs_of(model, sequence):
    with paddle.no_grad():
        alone = MicroBatch.without_arrays([sequence])
        logprobs, entropy, _ = policy_logprobs(model, alone, temperature=1.0, with_entropy=True)
    return logprobs.numpy(), entropy.numpy()


def filled(count=6, seed=0, model=None):
    """A batch with numbers as an iteration would have them, one masked, and two pairs of it.

    With `model` its own logprobs, shifted, instead of random ones.
    """
    rng, sequences = np.random.default_rng(seed + 50), make_sequences(count, seed)
    old, ref, advantages = [], [], []
    for s in sequences:
        n = len(s.completion_ids)
        logprobs, _ = logprobs_of(model or make_model(), s)
        shifts = (0.05, -0.1) if model else (rng.normal(0, 0.3, n), rng.normal(0, 0.2, n))
        old.append((logprobs + shifts[0]).astype(np.float32))
        ref.append((logprobs + shifts[1]).astype(np.float32))
        advantages.append(rng.normal(size=n).astype(np.float32))
    mask = np.arange(count) != 4
    pairs = [PreferencePair(0, 1), PreferencePair(3, 2)]
    return RolloutBatch(sequences, pairs, count, 1, mask, old, ref, advantages)


def split(batch, size, *, trained=None, pairs=None):
    chosen = range(len(batch.sequences)) if trained is None else trained
    return micro_batches(batch, chosen, batch.pairs if pairs is None else pairs, size)


LOSS = {"temperature": 1.0, "clip_ratio": (0.2, 0.3)}
SUMS = PairTerm("sigmoid", beta=0.3, coef=0.5)
FULL = UpoLoss(**LOSS, entropy_coef=0.01, kl_coef=0.05, kl_kind="k3", pairs=SUMS)  # fmt: skip


def pairs_by_definition(term, batch, logprobs):
    """The mean over the pairs of the loss with its likelihood term, in float64."""
    total = 0.0
    for pair in batch.pairs:
        margin = 0.0
        for at, sign in zip(pair, (1, -1), strict=True):
            without = term.loss in ("simpo", "orpo")
            ratios = logprobs[at] - (0.0 if without else batch.ref_logprobs[at])
            of_all = ratios.mean() if term.length_normalize else ratios.sum()
            if term.loss == "orpo":
                of_all -= math.log(1 - math.exp(of_all))
            margin += sign * of_all
        if term.loss == "ipo":
            total += (margin - 1 / (2 * term.beta)) ** 2
        elif term.loss == "orpo":
            total += term.beta * math.log1p(math.exp(-margin))
        else:
            gamma = term.gamma if term.loss == "simpo" else 0.0
            total += math.log1p(math.exp(gamma - term.beta * margin))
        total -= term.rpo_alpha * logprobs[pair[0]].mean()
    return total / len(batch.pairs)


def by_definition(model, batch, term=SUMS, sampled=None):
    """(policy, entropy, kl, preference) sums over counts, in float64.

    sampled: logprobs of the policy of whose samples the KL is, which has no gradient in it.
    """
    policy = entropy_sum = kl = 0.0
    tokens = 0
    found = []
    for at, s in enumerate(batch.sequences):
        lp, entropy = (array.astype(np.float64) for array in logprobs_of(model, s))
        found.append(lp)
        if not batch.is_trained(at):
            continue
        tokens += len(lp)
        for t in range(len(lp)):
            ratio = math.exp(lp[t] - batch.old_logprobs[at][t])
            clipped = min(max(ratio, 1 - 0.2), 1 + 0.3)
            advantage = batch.advantages[at][t]
            policy -= min(ratio * advantage, clipped * advantage)
            entropy_sum += entropy[t]
            d = lp[t] - batch.ref_logprobs[at][t]
            drawn = lp[t] if sampled is None else float(sampled[at][t])
            kl += math.exp(drawn - batch.old_logprobs[at][t]) * (math.exp(-d) - 1 + d)
    preference = pairs_by_definition(term, batch, found)
    return policy / tokens, entropy_sum / tokens, kl / tokens, preference


def new_trainer(model=None, **optim):
    model = model or make_model()
    model.train()
    return Trainer(model, Optimizer(model, OptimConfig(lr=1e-3, schedule="constant", **optim)))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_sampler_weights_scale_the_policy_term_alone(aggregation):
    batch, rng = filled(), np.random.default_rng(9)
    weights = [rng.random(len(a)).astype(np.float32) for a in batch.advantages]
    gains = [w * a for w, a in zip(weights, batch.advantages, strict=True)]
    loss = replace(FULL, aggregation=aggregation)
    found = new_trainer().train_step(split(replace(batch, sampler_weights=weights), 3), loss, 9)
    expected = new_trainer().train_step(split(replace(batch, advantages=gains), 3), loss, 9)
    plain = new_trainer().train_step(split(batch, 3), loss, 9)
    for name in ("policy", "grad_norm"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5)
        assert found.metrics[name] != pytest.approx(plain.metrics[name], rel=1e-3)
    for name in ("kl_loss", "preference"):
        assert found.metrics[name] == plain.metrics[name]


@pytest.mark.parametrize(
    ("coefs", "weights"),
    [
        ({}, (1.0, 0.0, 0.0, 0.0)),
        ({"policy_coef": 0.0, "entropy_coef": 1.0}, (0.0, -1.0, 0.0, 0.0)),
        ({"policy_coef": 0.0, "kl_coef": 1.0, "kl_kind": "k3"}, (0.0, 0.0, 1.0, 0.0)),
        ({"policy_coef": 0.0, "pairs": PairTerm(beta=0.3)}, (0.0, 0.0, 0.0, 1.0)),
        ({"policy_coef": 0.0, "pairs": PairTerm("sigmoid", 2.0, True, rpo_alpha=0.3)},
         (0.0, 0.0, 0.0, 1.0)),
        ({"policy_coef": 0.0, "pairs": PairTerm("ipo", 2.0, True)}, (0.0, 0.0, 0.0, 1.0)),
        ({"policy_coef": 0.0, "pairs": PairTerm("simpo", 2.0, True, 0.7)}, (0.0, 0.0, 0.0, 1.0)),
        ({"policy_coef": 0.0, "pairs": PairTerm("orpo", 0.3, True, rpo_alpha=1.0)},
         (0.0, 0.0, 0.0, 1.0)),
        ({"policy_coef": 0.7, "entropy_coef": 0.5, "kl_coef": 0.3, "kl_kind": "k3",
          "pairs": PairTerm(beta=0.3, coef=0.4)}, (0.7, -0.5, 0.3, 0.4)),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_the_objective(coefs, weights):
    """Each term alone and all together, along a random direction, by finite differences."""
    paddle.seed(3)
    model = Ernie4_5_MoeForCausalLM(make_config(moe_num_experts=0, initializer_range=0.15))
    batch = filled(model=model)
    trainer = new_trainer(model)
    kept = {}
    trainer.optimizer.step = lambda lr, norm: kept.update(
        {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
    )
    loss = UpoLoss(**LOSS, **coefs)
    trainer.train_step(split(batch, 3), loss, 9)
    # Along the gradient, so that a term is not lost among the others.
    length = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in kept.values()))
    direction = {n: (g / length).astype(np.float32) for n, g in kept.items()}
    sampled = [logprobs_of(model, s)[0] for s in batch.sequences]

    def objective(step):
        held = {n: p.numpy() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            if n in direction:
                p.set_value(held[n] + np.float32(step) * direction[n])
        parts = by_definition(model, batch, coefs.get("pairs", SUMS), sampled)
        for n, p in model.named_parameters():
            p.set_value(held[n])
        return float(np.dot(weights, parts))

    numeric = (objective(3e-3) - objective(-3e-3)) / 6e-3
    assert length == pytest.approx(numeric, rel=2e-2)
    assert length > 1e-3


def test_without_the_preference_it_is_plain_ppo_to_the_bit():
    ends, seen = [], []
    for loss in (
        UpoLoss(**LOSS),
        UpoLoss(**LOSS, pairs=PairTerm(beta=0.7)),
        UpoLoss(**LOSS, kl_coef=0.0, kl_kind="k3", entropy_coef=0.0),
    ):
        trainer = new_trainer()
        batches = split(filled(), 3, trained=[0, 1, 2, 3, 5], pairs=[])
        seen.append(trainer.train_step(batches, loss, 9).metrics["policy"])
        ends.append(state(trainer.model))
    assert len(set(seen)) == 1
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_with_the_preference_alone_it_is_dpo_and_ln_2_at_the_reference():
    model = make_model()
    batch = filled()
    reference = [logprobs_of(model, s)[0] for s in batch.sequences]
    batches = split(replace(batch, ref_logprobs=reference), 2, trained=[])
    term = PairTerm(beta=0.1)
    loss = UpoLoss(**LOSS, policy_coef=0.0, pairs=term)
    as_dpo = new_trainer()
    for _ in range(2):
        as_dpo.train_step(batches, DpoLoss(term), 9)
    trainer = new_trainer(model)
    before = trainer.train_step(batches, loss, 9).metrics
    assert set(before) >= {"preference", "rewards/margins"}
    assert "policy" not in before
    assert before["preference"] == pytest.approx(math.log(2), abs=1e-6)
    for step in range(4):
        after = trainer.train_step(batches, loss, 9).metrics
        if step == 0:
            assert_same(state(trainer.model), state(as_dpo.model))
    assert after["preference"] < before["preference"]
    assert after["rewards/margins"] > 0
    assert after["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("size", [2, 50])
@pytest.mark.parametrize(
    "term",
    [
        PairTerm("sigmoid", 2.0, True, rpo_alpha=0.2),
        PairTerm("ipo", 0.5, False),
        PairTerm("ipo", 2.0, True, rpo_alpha=1.0),
        PairTerm("simpo", 2.0, True, 0.7),
        PairTerm("orpo", 0.3, True, rpo_alpha=1.0),
    ],
    ids=lambda term: f"{term.loss}-{term.rpo_alpha}",
)
def test_every_loss_of_pairs_by_definition(term, size):
    batch = filled()
    if term.loss in ("simpo", "orpo"):
        batch = replace(batch, ref_logprobs=[])
    logprobs = [logprobs_of(make_model(), s)[0].astype(np.float64) for s in batch.sequences]
    metrics = new_trainer().train_step(split(batch, size, trained=[]), DpoLoss(term), 9).metrics
    found = metrics["preference"] + term.rpo_alpha * metrics.get("nll_loss", 0.0)
    assert found == pytest.approx(pairs_by_definition(term, batch, logprobs), rel=2e-5)
    assert ("nll_loss" in metrics) == bool(term.rpo_alpha)
    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert metrics["rewards/margins"] == pytest.approx(margins, abs=1e-5)


def test_pairs_may_have_a_reference_of_their_own():
    """The policy itself: ln 2, while KL is against the other one; copies of a sequence have it."""
    batch = filled()
    own = [logprobs_of(make_model(), s)[0] for s in batch.sequences]
    pairs = [*batch.pairs, PreferencePair(0, 2)]
    batches = split(replace(batch, pair_ref_logprobs=own), 3, pairs=pairs)
    metrics = new_trainer().train_step(batches, FULL, 9).metrics
    assert metrics["preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["kl_loss"] == pytest.approx(by_definition(make_model(), batch)[2], rel=2e-5)


def at_the_reference(length, groups=6, size=4):
    """Groups of random completions of one length, best against worst, as an iteration begins."""
    rng, model = np.random.default_rng(length), make_model()
    prompts = [[5 + g, 7] for g in range(groups) for _ in range(size)]
    sequences = [TokenizedCompletion(p, rng.integers(3, 90, length).tolist()) for p in prompts]
    logprobs = [logprobs_of(model, s)[0] for s in sequences]
    rewards = np.tile(np.arange(size) / (size - 1), groups)
    advantages = [np.full(length, (r - 0.5) / 0.43, np.float32) for r in rewards]
    pairs = [PreferencePair(g * size + size - 1, g * size) for g in range(groups)]
    batch = RolloutBatch(
        sequences, pairs, groups, size, None, logprobs, logprobs, advantages=advantages
    )
    return model, split(batch, 8)


def test_per_token_pairs_weigh_the_same_at_every_length_and_sums_grow_with_it():
    """Sums beside a mean over tokens made UPO nearly DPO alone at long completions."""
    ratios = {True: [], False: []}
    for length in (6, 24, 96):
        model, batches = at_the_reference(length)
        trainer = new_trainer(model)
        for normalize, beta in ((True, 2.0), (False, 0.1)):
            term = PairTerm("sigmoid", beta, normalize, coef=0.1)
            loss = UpoLoss(**LOSS, pairs=term)
            found = term_norms(trainer, batches, loss)
            ratios[normalize].append(found["preference/norm_ratio"])
            assert 0 < found["preference/cosine"] < 1
    assert max(ratios[True]) < 1.25 * min(ratios[True])
    assert 0.1 < min(ratios[True]) < max(ratios[True]) < 1
    assert ratios[False][2] > 10 * ratios[False][0]


def test_term_norms_leave_everything_as_it_was():
    trainer = new_trainer()
    before = {n: a.copy() for n, a in state(trainer.model).items()}
    batches = split(filled(), 3)
    norms = trainer.term_gradient_norms(batches, FULL)
    assert set(norms) == {"policy", "entropy_loss", "kl_loss", "preference"}
    assert all(norm > 0 for norm in norms.values())
    assert_same(state(trainer.model), before)
    with_norms = trainer.train_step(batches, FULL, 9).metrics
    assert with_norms == new_trainer().train_step(batches, FULL, 9).metrics
