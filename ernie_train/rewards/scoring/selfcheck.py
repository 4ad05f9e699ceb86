"""Run the canaries: completions with known scores that test a reward before training.

For a sample of the rows the row's own answer must score correct, and completions that answer
nothing must not. A policy learns nothing, or a trick, from a verifier that fails on either.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from ernie_train.core.errors import UserError
from ernie_train.data.completion_format import format_completion
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

    Only the verifier's score counts, not the format reward; a reward of format alone has no
    canaries. A user's function need not accept the reference answer: it may mark other things.
    Raises UserError that shows the rows on which the reward fails.
    """
    if reward.verifier.name == "format":
        return 0
    chosen = random.Random(f"canaries/{seed}").sample(range(len(rows)), min(sample, len(rows)))
    trials: list[tuple[int, str, str]] = []
    wrong: list[str] = []
    for index in sorted(chosen):
        row = rows[index]
        verifier = _verifier_name(reward, row)
        gold = build_reference_completion(verifier, row)
        if reward.verifier.python is None:
            if gold is None:
                wrong.append(f"  row {index} ({_short(row)}): no answer that could be graded")
                continue
            trials.append((index, _REFERENCE, gold))
        trials.append((index, "nothing at all", ""))
        name = str(row.get("entry_point") or "f")
        if verifier == "tool_call" and tool_call.reference_calls(row) == []:
            # If no call is expected, any response is correct and any call is wrong.
            call = format_completion("I call.", None, [("any_tool", {})])
            trials.append((index, "a tool call", call))
            continue
        for what, response in _RESPONSES.items():
            trials.append((index, what, with_response(row, response(name))))
    scores = reward.grade_verifier(
        [rows[index] for index, _, _ in trials],
        [completion for _, _, completion in trials],
        stop_requested=stop_requested,
    )
    if stop_requested():
        return len(trials)
    for (index, what, _), score in zip(trials, scores, strict=True):
        if (score.status == "correct") != (what == _REFERENCE) or score.status in _FAILURES:
            told = f"{score.status} {score.value:g}{': ' + score.detail if score.detail else ''}"
            wrong.append(f"  row {index} ({_short(rows[index])}): {what} scores {told}")
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"the reward fails on {len(wrong)} canaries, so nothing may be trained with it:\n"
            + "\n".join(wrong[:_SHOWN])
            + more
        )
    return len(trials)


def _verifier_name(reward: ComposedReward, row: dict[str, Any]) -> str:
    """Return the name of the verifier, which decides how a reference completion is built."""
    name = reward.verifier.name
    return str(row.get("reward")) if name == "row" else name or "judge"


def _short(row: dict[str, Any]) -> str:
    """Return the first words of a row's problem, for a message."""
    messages = row.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else {}
    text = row.get("question") or (first.get("content") if isinstance(first, dict) else "") or row
    return str(text)[:60]
