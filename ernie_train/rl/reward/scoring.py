"""Reward models as rewards: found on disk, loaded, and asked to score a policy's completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ernie_train.core.errors import DataError, NonFiniteError, UserError
from ernie_train.data import Record, Tokenizer, encode_chat, load_tokenizer, prompt_ids
from ernie_train.io.safetensors import TensorFiles
from ernie_train.rewards.score import Score, read_completion
from ernie_train.rewards.scoring import RewardModelPart, RewardPart
from ernie_train.rl.batch import TokenizedCompletion
from ernie_train.rl.estimators import sequence_values
from ernie_train.rl.reward.model import SCORE, RewardModel
from ernie_train.weights.hf import load_pretrained
from ernie_train.weights.model_directory import ModelDirectory, find_model


def find_score(weights: Path) -> Path | None:
    """Return the directory of the head beside a reward model's weights; None beside others."""
    return weights / SCORE if (weights / SCORE).is_dir() else None


def find_reward_model(path: Path) -> ModelDirectory:
    """Find the reward model of a run, a stage, a checkpoint or an export.

    Raises `UserError` where it is the directory of another model.
    """
    place = find_model(path)
    if find_score(place.weights) is None:
        raise UserError(
            f"reward: {place.weights} is no reward model: it lacks {SCORE}/, which a stage of "
            "kind: reward writes"
        )
    return place


class RewardModelScorer:
    """Scores completions of a policy as a part of a recipe's reward asks.

    Conversations are rendered from their messages by the reward model's own tokenizer and template,
    so that those of the policy may be others.
    """

    def __init__(self, part: RewardModelPart, base_dir: Path, dtype: str) -> None:
        """Load the model. Raises `UserError` and `WeightsError` for what is no reward model."""
        place = find_reward_model(base_dir / part.path)
        self.part = part
        self.tokenizer: Tokenizer = load_tokenizer(place.tokenizer)
        backbone = load_pretrained(place.weights, dtype=dtype, verified=True)
        if self.tokenizer.vocab_size > backbone.config.vocab_size:
            raise UserError(
                f"reward: {part.path} has a tokenizer of {self.tokenizer.vocab_size} tokens beside "
                f"a model of {backbone.config.vocab_size}: it is that of another model"
            )
        self.longest = backbone.config.max_position_embeddings
        self.model = RewardModel(backbone)
        for parameter in self.model.parameters():
            parameter.stop_gradient = True
        stored = TensorFiles(place.weights / SCORE, "model")
        self.model.load_head(stored)
        self.mean, self.std = (float(stored[f"score.{name}"][0]) for name in ("mean", "std"))
        if part.normalize and not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UserError(
                f"reward: the scores of {part.path} have mean {self.mean:g} and deviation "
                f"{self.std:g}: train it longer, or set normalize: false"
            )

    def score(
        self,
        prompts: Sequence[Record],
        rows: Sequence[dict[str, Any]],
        completions: Sequence[str],
        *,
        stop_requested: Callable[[], bool],
    ) -> list[Score]:
        """Score `completions[i]` of `prompts[i]`; `rows[i]` is what verifiers get of the problem.

        A completion that the template cannot show, as one without an answer, has the lowest score.
        Every rank must call it; each scores a share. Raises `NonFiniteError` for a score that is
        not finite, and `Interrupted` when a stop is asked for.
        """
        shown = [self._encode(*item) for item in zip(prompts, rows, completions, strict=True)]
        ids = [found for found in shown if not isinstance(found, Score)]
        values = iter(
            sequence_values(
                self.model,
                [TokenizedCompletion(conversation, [0]) for conversation in ids],
                batch_size=self.part.batch_size,
                stop_requested=stop_requested,
            )
        )
        return [
            found if isinstance(found, Score) else self._judged(float(next(values)[0]))
            for found in shown
        ]

    def _encode(self, prompt: Record, row: dict[str, Any], completion: str) -> list[int] | Score:
        """Return the ids of the whole conversation, or the score of what has none."""
        asked = prompt.prompt_messages
        turn = assistant_turn(row, completion)
        try:
            if turn is None:
                raise DataError("no answer")
            ids, _ = encode_chat(self.tokenizer, [*asked, turn], prompt.tools)
        except DataError as error:
            try:
                prompt_ids(self.tokenizer, asked, prompt.tools)
            except DataError as refused:
                return Score.bad_gold(f"the reward model's template: {refused}")
            return Score(-self.part.clip, "wrong", f"not shown to the reward model: {error}")
        if len(ids) > self.longest:
            return Score.infrastructure(
                f"{len(ids)} tokens, more than the {self.longest} of the reward model"
            )
        return ids

    def _judged(self, score: float) -> Score:
        if not math.isfinite(score):
            raise NonFiniteError(f"the reward model {self.part.path} gave a score of {score}")
        if self.part.normalize:
            score = (score - self.mean) / self.std
        value = min(max(score, -self.part.clip), self.part.clip)
        return Score(value, "correct" if value > 0 else "wrong", f"score {score:.3f}")


def assistant_turn(row: dict[str, Any], completion: str) -> dict[str, Any] | None:
    """Return a completion as the message that it writes; None if it lacks an answer."""
    parsed = read_completion(row, completion)
    if isinstance(parsed, Score) or (parsed.response is None and not parsed.tool_calls):
        return None
    calls = [{"name": call.name, "arguments": call.arguments} for call in parsed.tool_calls]
    if any(call["arguments"] is None for call in calls):
        return None
    turn = {"role": "assistant", "content": parsed.response or "", "tool_calls": calls}
    return turn | ({"reasoning_content": parsed.thinking} if parsed.thinking else {})


def load_scorers(
    parts: Sequence[RewardPart], base_dir: Path, dtype: str
) -> dict[str, RewardModelScorer]:
    """Load the reward models among a reward's parts, by label; every rank must call it."""
    return {
        part.label: RewardModelScorer(part.model, base_dir, dtype)
        for part in parts
        if part.model is not None
    }
