"""Problems as task generators return them, and as rows of a data file.

A generator is a pure function `generate(rng) -> Item | None`; None means "this draw is no good,
take the next one". All randomness comes from the given generator, so that a row depends on
nothing but the seed and its number.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Slip:
    """A worked solution with one usual mistake, which the answer need not show."""

    think: str
    answer: str
    calls: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Item:
    """One problem with its worked solution.

    `key` names the problem without its wording: two prompts with one key are the same problem,
    and all of them fall into the same split. `reward` and `fields` are what the verifier needs.
    `slip` is None unless the problem invites its task's mistake.
    """

    key: str
    prompt: str
    think: str
    answer: str
    reward: str
    fields: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    calls: list[dict[str, Any]] | None = None
    slip: Slip | None = None


Generator = Callable[[random.Random], Item | None]


@dataclass(frozen=True)
class Task:
    """A named generator and the domain whose files its rows go to."""

    name: str
    domain: str
    generate: Generator


def to_row(
    task: Task, item: Item, *, verifiable: bool = True, slipped: bool = False
) -> dict[str, Any]:
    """Return the JSON object of one line: messages in OpenAI form, and what a verifier needs.

    Without `verifiable` the verifier's fields are left out: training on worked solutions does not
    read them, and they are a third of a file. A `slipped` row shows the item's slip, if it has
    one; the verifier's fields are right all the same.
    """
    shown = item.slip if slipped and item.slip is not None else item
    assistant: dict[str, Any] = {"role": "assistant", "reasoning_content": shown.think}
    if shown.calls is None:
        assistant["content"] = shown.answer
    else:
        assistant["tool_calls"] = [{"type": "function", "function": c} for c in shown.calls]
    row: dict[str, Any] = {
        "domain": task.domain,
        "task": task.name,
        "messages": [{"role": "user", "content": item.prompt}, assistant],
    }
    if item.tools is not None:
        row["tools"] = item.tools
    if verifiable:
        row |= {"answer": item.answer, "reward": item.reward, **item.fields}
        if shown is not item and item.reward == "code":
            row["solution"] = item.answer  # else a program in the messages is taken for it
    return row


def count_on(start: int, step: int, times: int) -> str:
    """Return `3:8 2:16 1:24`: `step` is added so many times; before the colon, how many are left.

    Sums and products by counting: each number follows from the one before it, so that a small
    model need not know tables by heart, and the count says where to stop.
    """
    if times == 0:
        return f"0:{start}"
    return " ".join(f"{times - done}:{start + (done + 1) * step}" for done in range(times))


def count_down(total: int, step: int) -> str:
    """Return `1:16 2:8 3:0`: `step` is taken away until 0; the last count is the quotient."""
    times = total // step
    return " ".join(f"{done}:{total - done * step}" for done in range(1, times + 1))
