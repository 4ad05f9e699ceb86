"""Grade completions by a reward: verifiers and reward models, on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ernie_train.eval.prompts import problem_row
from ernie_train.generate import score_sharded
from ernie_train.rewards.scoring import ComposedReward, ComposedScore
from ernie_train.rl.data import Prompt
from ernie_train.rl.reward import RewardModelScorer
from ernie_train.train.stage import StageRun


class Answer(NamedTuple):
    """A completion to be graded: its prompt among the stage's, its text, and its tokens."""

    prompt: int
    text: str
    tokens: int


def grade(
    reward: ComposedReward,
    scorers: Mapping[str, RewardModelScorer],
    answers: Sequence[Answer],
    prompts: Sequence[Prompt],
    stage: StageRun,
) -> list[ComposedScore]:
    """Return the scores of answers; each rank grades a share of them, and every rank must call it.

    scorers: the reward models among the reward's parts.
    Raises `Interrupted` when a stop is asked for, and `UserError` where too many have no score.
    """
    records = [prompts[answer.prompt].record for answer in answers]
    rows = [problem_row(record, stage.data.tokenizer) for record in records]
    texts = [answer.text for answer in answers]
    of_models = {
        label: scorer.score(records, rows, texts, stop_requested=stage.stop_requested)
        for label, scorer in scorers.items()
    }

    def score(mine: Sequence[int]) -> Sequence[ComposedScore]:
        return reward.score_batch(
            [rows[at] for at in mine],
            [texts[at] for at in mine],
            [answers[at].tokens for at in mine],
            of_models={label: [found[at] for at in mine] for label, found in of_models.items()},
            whole=False,
            stop_requested=stage.stop_requested,
        ).scores

    scores = score_sharded(range(len(answers)), score, stop_requested=stage.stop_requested)
    reward.check_excluded([composed.score for composed in scores])
    return scores
