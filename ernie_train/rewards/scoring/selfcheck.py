"""Run the canaries: completions with known scores that test a reward before training.

For a sample of the rows the row's own answer must score correct, and completions that answer
nothing must not. A policy learns nothing, or a trick, from a verifier that fails on either.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_train.core.errors import UserError
from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.score import Score, question_of
from ernie_train.rewards.scoring.composition import ComposedReward
from ernie_train.rewards.scoring.reference_completion import (
    build_reference_completion,
    with_response,
)
from ernie_train.rewards.verifiers import tool_call

_SHOWN = 5
_REFERENCE = "gold answer"
_FAILURES = ("timeout", "infrastructure")

# The argument is the name of the function that the problem asks for.
_RESPONSES: dict[str, Callable[[str], str]] = {
    "empty": lambda name: "",
    "junk": lambda name: "zq vexing jumbo 8675309.25 quiz",
    "sys.exit(0)": lambda name: "```python\nimport sys\nsys.exit(0)\n```",
    "always true": lambda name: (
        "```python\nclass Always:\n    def __eq__(self, other):\n        return True\n"
        "    def __ne__(self, other):\n        return False\n"
        f"    def __bool__(self):\n        return True\n\n"
        f"def {name}(*args, **kwargs):\n    return Always()\n```"
    ),
}


def check_reward_on_reference_answers(
    rows: Sequence[dict[str, Any]],
    reward: ComposedReward,
    *,
    sample: int = 16,
    seed: int = 0,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:
    """Grade the canaries of `sample` rows (all, if there are fewer); return their number.

    Only the verifier's score counts, not the format reward; a reward without a verifier, of format
    and reward models alone, has no canaries. A user's function or a rubric need not accept the
    reference answer: they may mark other things. Raises UserError that shows the rows on which
    it fails.
    """
    verifier = reward.config.verifier
    if verifier.name == "format" or verifier.model is not None:
        return 0
    chosen = random.Random(f"canaries/{seed}").sample(range(len(rows)), min(sample, len(rows)))
    trials = [trial for index in sorted(chosen) for trial in _canaries(reward, index, rows[index])]
    graded = [trial for trial in trials if trial.completion is not None]
    scores = reward.grade_verifier(
        [rows[trial.row] for trial in graded],
        [trial.completion or "" for trial in graded],
        stop_requested=stop_requested,
    )
    if stop_requested():
        return len(graded)
    told = {trial: _complaint(trial, score) for trial, score in zip(graded, scores, strict=True)}
    wrong = [
        f"  row {trial.row} ({_short(rows[trial.row])}): {complaint}"
        for trial in trials
        if (complaint := told.get(trial, "no answer that could be graded"))
    ]
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"the reward fails on {len(wrong)} canaries, so nothing may be trained with it:\n"
            + "\n".join(wrong[:_SHOWN])
            + more
        )
    return len(graded)


@dataclass(frozen=True)
class _Canary:
    """Hold a completion for a row, by its number; None if the row has no answer to build it of."""

    row: int
    what: str
    completion: str | None


def _canaries(reward: ComposedReward, index: int, row: dict[str, Any]) -> Iterator[_Canary]:
    verifier = _verifier_name(reward, row)
    if reward.config.verifier.python is None and not _has_rubric(reward, row):
        gold = build_reference_completion(verifier, row)
        yield _Canary(index, _REFERENCE, gold)
        if gold is None:
            return
    yield _Canary(index, "nothing at all", "")
    if verifier == "tool_call" and tool_call.reference_calls(row) == []:
        # If no call is expected, any response is correct and any call is wrong.
        yield _Canary(index, "a tool call", format_completion("I call.", None, [("any_tool", {})]))
        return
    name = str(row.get("entry_point") or "f")
    for what, response in _RESPONSES.items():
        yield _Canary(index, what, with_response(row, response(name)))


def _complaint(canary: _Canary, score: Score) -> str:
    """Return the message if the reward failed on a canary, else an empty text."""
    right = (score.status == "correct") == (canary.what == _REFERENCE)
    if right and score.status not in _FAILURES:
        return ""
    detail = f": {score.detail}" if score.detail else ""
    return f"{canary.what} scores {score.status} {score.value:g}{detail}"


def _verifier_name(reward: ComposedReward, row: dict[str, Any]) -> str:
    """Return the name of the verifier, which decides how a reference completion is built."""
    name = reward.config.verifier.name
    return str(row.get("reward")) if name == "row" else name or "judge"


def _has_rubric(reward: ComposedReward, row: dict[str, Any]) -> bool:
    judge = reward.config.verifier.judge
    return judge is not None and bool(judge.rubric or row.get("rubric"))


def _short(row: dict[str, Any]) -> str:
    """Return the first words of a row's problem, for a message."""
    return (question_of(row) or str(row))[:60]
