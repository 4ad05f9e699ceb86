"""A reward model: a decoder with a scalar head that scores conversations by their last token.

On disk it is a model directory with `score/model.safetensors` beside the weights: `score.weight`
[1,H], the head as sequence classifiers of `transformers` have it, and `score.mean` and `score.std`
[1] of the scores at the end of its training. Shapes: P pairs, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import paddle

from ernie_train.core.errors import WeightsError
from ernie_train.losses import bradley_terry_loss
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.batch import MicroBatch, TokenizedCompletion
from ernie_train.rl.critic import ScalarModel
from ernie_train.rl.estimators import critic_values
from ernie_train.rl.preference_data import TokenizedPair
from ernie_train.train.loss_terms import LossOutput, LossTerm, Mean

SCORE = "score"  # the directory of the head beside a model's weights
_HEAD = "value_head.weight"


class RewardModel(ScalarModel):
    """The decoder of a causal language model, which it shares, with a scalar head."""

    def __init__(self, backbone: Ernie4_5_MoeForCausalLM) -> None:
        super().__init__(backbone.config, backbone.model, bias=False)
        self.partial = backbone.partial

    def head_arrays(
        self, spread: ScoreSpread, owned: Collection[str] = (_HEAD,)
    ) -> dict[str, np.ndarray]:
        """Return what `score/model.safetensors` holds; nothing where the head is not `owned`."""
        if _HEAD not in owned:
            return {}
        facts = {"score.mean": spread.mean, "score.std": spread.std}
        return {
            "score.weight": self.value_head.weight.numpy().T,
            **{name: np.array([value], np.float32) for name, value in facts.items()},
        }

    def load_head(self, stored: Mapping[str, np.ndarray]) -> None:
        """Set the head to what `head_arrays` gave; raises `WeightsError` for any other."""
        expected = list(reversed(self.value_head.weight.shape))
        weight = stored["score.weight"] if "score.weight" in stored else np.empty(0)
        if list(weight.shape) != expected or not np.isfinite(weight).all():
            raise WeightsError(
                f"score.weight must hold finite numbers of shape {expected}, not {weight.shape}"
            )
        self.value_head.weight.set_value(np.ascontiguousarray(weight.T, np.float32))


@dataclass
class ScoreSpread:
    """Mean and deviation of a model's scores over its latest training steps.

    They are means with weights that fall by DECAY from step to step.
    """

    DECAY = 0.95

    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, mean: float, square: float) -> None:
        """Take up a step: the mean of its scores, and of their squares."""
        for name, value in (("weight", 1.0), ("total", mean), ("squares", square)):
            setattr(self, name, self.DECAY * getattr(self, name) + (1 - self.DECAY) * value)

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    @property
    def std(self) -> float:
        return max(0.0, self.squares / self.weight - self.mean**2) ** 0.5 if self.weight else 0.0


# ---- training ------------------------------------------------------------------------------------


def whole_conversation(completion: TokenizedCompletion) -> TokenizedCompletion:
    """Return a prompt with its completion as what precedes a single token.

    A critic's value of that token is the score at the conversation's last one.
    """
    return TokenizedCompletion(completion.prompt_ids + completion.completion_ids, [0])


@dataclass(frozen=True)
class PairBatch:
    """Pairs that go through the model together."""

    pairs: tuple[TokenizedPair, ...]

    @cached_property
    def conversations(self) -> MicroBatch:
        """The chosen conversations, then the rejected ones."""
        sides = [pair.chosen for pair in self.pairs] + [pair.rejected for pair in self.pairs]
        return MicroBatch.without_arrays([whole_conversation(side) for side in sides])

    @property
    def num_tokens(self) -> int:
        return self.conversations.num_tokens


@dataclass(frozen=True)
class RewardLoss:
    """-log sigmoid(chosen - rejected - margin), plus center_coef * (chosen + rejected)^2.

    Both are means over the pairs of the step (arXiv:2203.02155; arXiv:2307.09288, equation 2;
    arXiv:2312.09244 for the second).
    """

    center_coef: float = 0.0

    def counts(self, batch: PairBatch) -> dict[str, float]:
        pairs = float(len(batch.pairs))
        return {"loss": pairs} | ({"centering": pairs} if self.center_coef else {})

    def __call__(self, model: RewardModel, batch: PairBatch) -> LossOutput:
        scores, router_stats = critic_values(model, batch.conversations)
        chosen, rejected = paddle.split(scores, 2)
        margins = paddle.to_tensor([pair.margin for pair in batch.pairs], "float32")
        pairs = float(len(batch.pairs))
        total = bradley_terry_loss(chosen, rejected, margins).sum()
        terms = [LossTerm("loss", total, pairs)]
        if self.center_coef:
            off_centre = ((chosen + rejected) ** 2).sum()
            terms.append(LossTerm("centering", off_centre, pairs, self.center_coef))
        found, gap = scores.detach(), (chosen - rejected).detach()
        metrics = {
            "accuracy": Mean(float((gap > 0).sum()), pairs),
            "margin": Mean(float(gap.sum()), pairs),
            "mean_reward": Mean(float(found.sum()), 2 * pairs),
            "mean_square_reward": Mean(float((found**2).sum()), 2 * pairs),
        }
        return LossOutput(terms, metrics, router_stats, scores)
