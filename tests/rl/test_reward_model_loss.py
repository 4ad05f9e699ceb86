"""The loss of a reward model: closed form, slope, padding, spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.preference_data import TokenizedPair
from ernie_train.rl.reward import stage as reward_stage
from ernie_train.rl.reward.model import (
    PairBatch,
    RewardLoss,
    RewardModel,
    ScoreSpread,
    whole_conversation,
)
from tests.small_models import make_model


def make_pairs(count: int = 4, seed: int = 0) -> tuple[TokenizedPair, ...]:
    rng = np.random.default_rng(seed)

    def side() -> TokenizedCompletion:
        prompt, completion = (rng.integers(3, 90, rng.integers(1, 9)).tolist() for _ in range(2))
        return TokenizedCompletion(prompt, completion)

    return tuple(TokenizedPair(side(), side(), float(rng.random())) for _ in range(count))


def make_reward_model(**keys: Any) -> RewardModel:
    model = RewardModel(make_model(**keys))
    values = np.random.default_rng(3).normal(0, 0.3, model.value_head.weight.shape)
    model.value_head.weight.set_value(values.astype(np.float32))
    model.train()
    return model


def last_hidden(model: RewardModel, side: TokenizedCompletion) -> np.ndarray:
    """The hidden state of a conversation's last token, in a pass of its own."""
    ids = paddle.to_tensor([side.prompt_ids + side.completion_ids])
    return model.model(ids).hidden[-1].numpy().astype(np.float64)


def test_the_loss_and_the_heads_gradient_have_their_closed_form() -> None:
    """Scores of the last tokens, whatever shares the micro-batch, in float64."""
    model, pairs, coef = make_reward_model(), make_pairs(), 0.3
    output = RewardLoss(coef)(model, PairBatch(pairs))
    head = model.value_head.weight.numpy().astype(np.float64)[:, 0]
    chosen = np.stack([last_hidden(model, pair.chosen) for pair in pairs])
    rejected = np.stack([last_hidden(model, pair.rejected) for pair in pairs])
    gap = (chosen - rejected) @ head - np.array([pair.margin for pair in pairs])
    centre = (chosen + rejected) @ head
    terms = {term.name: term for term in output.terms}
    assert float(terms["loss"].sum) == pytest.approx(np.log1p(np.exp(-gap)).sum(), rel=1e-5)
    assert float(terms["centering"].sum) == pytest.approx((centre**2).sum(), rel=1e-4)
    assert {name: (t.count, t.coef) for name, t in terms.items()} == {
        "loss": (4.0, 1.0), "centering": (4.0, coef)
    }  # fmt: skip
    accuracy = ((chosen - rejected) @ head > 0).mean()
    assert output.metrics["accuracy"].value == pytest.approx(accuracy)
    sum(term.sum * term.coef for term in output.terms).backward()
    pull = -1 / (1 + np.exp(gap))
    expected = pull @ (chosen - rejected) + coef * 2 * centre @ (chosen + rejected)
    np.testing.assert_allclose(
        model.value_head.weight.grad.numpy()[:, 0], expected, rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("keys", [{}, {"moe_num_experts": 0}], ids=["moe", "dense"])
def test_the_gradient_is_the_slope_of_the_loss(keys: dict[str, Any]) -> None:
    """Central differences along the gradient itself, where they are largest."""
    model, batch, loss = make_reward_model(**keys), PairBatch(make_pairs()), RewardLoss(0.1)

    def value() -> float:
        return sum(float(term.sum) * term.coef for term in loss(model, batch).terms)

    sum(term.sum * term.coef for term in loss(model, batch).terms).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    slopes = [p.grad.numpy() for p in trained]
    norm = np.sqrt(sum((slope.astype(np.float64) ** 2).sum() for slope in slopes))
    before, found = [p.numpy() for p in trained], []
    for step in (1e-3, -1e-3):
        for parameter, old, slope in zip(trained, before, slopes, strict=True):
            parameter.set_value(old + (step / norm) * slope)
        found.append(value())
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(norm, rel=2e-2)


def test_padding_and_company_change_no_score() -> None:
    model = make_reward_model()
    sides = [side for pair in make_pairs(5) for side in pair.completions]
    together = reward_stage.sequence_values(
        model, [whole_conversation(side) for side in sides], batch_size=4
    )
    head = model.value_head.weight.numpy()[:, 0]
    alone = [last_hidden(model, side) @ head for side in sides]
    np.testing.assert_allclose(np.concatenate(together), alone, rtol=1e-4, atol=1e-5)


def test_the_spread_is_that_of_the_latest_steps() -> None:
    spread = ScoreSpread()
    assert (spread.mean, spread.std) == (0.0, 0.0)
    for _ in range(3):
        spread.add(2.0, 2.0**2 + 0.5**2)
    assert (spread.mean, spread.std) == (pytest.approx(2.0), pytest.approx(0.5))
    for _ in range(200):
        spread.add(-1.0, 1.0)
    assert (spread.mean, spread.std) == (
        pytest.approx(-1.0, abs=1e-3),
        pytest.approx(0.0, abs=0.02),
    )
