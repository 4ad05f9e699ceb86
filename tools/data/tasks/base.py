"""Problems as task generators return them, and as rows of a data file.

A generator is a pure function `generate(rng, level) -> Item | None`; None means "this draw is no
good, take the next one". All randomness comes from the given generator, so that a row depends on
nothing but the seed and its number.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One problem with its worked solution.

    `key` names the problem without its wording: two prompts with one key are the same problem,
    and all of them fall into the same split. `think` works the solution out; `reward` and `fields`
    are what the verifier needs.
    """

    key: str
    prompt: str
    think: str
    answer: str
    reward: str
    fields: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    calls: list[dict[str, Any]] | None = None


Generator = Callable[[random.Random, int], Item | None]


@dataclass(frozen=True)
class Task:
    """A named generator and the domain whose files its rows go to."""

    name: str
    domain: str
    generate: Generator


def to_row(
    task: Task, level: int, item: Item, *, solved: bool = True, verifiable: bool = True
) -> dict[str, Any]:
    """Return the JSON object of one line: messages in OpenAI form, and what a verifier needs.

    `solved` rows end in the worked solution. Without `verifiable` the verifier's fields are left
    out: training on worked solutions does not read them, and they are a third of a file.
    """
    row: dict[str, Any] = {
        "domain": task.domain,
        "task": task.name if level == 1 else f"{task.name}_{level}",
        "messages": [{"role": "user", "content": item.prompt}],
    }
    if solved:
        row["messages"].append(_solution(item))
    if item.tools is not None:
        row["tools"] = item.tools
    if verifiable:
        row |= {"answer": item.answer, "reward": item.reward, **item.fields}
    return row


def _solution(item: Item) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "reasoning_content": item.think}
    if item.calls is None:
        turn["content"] = item.answer
    else:
        turn["tool_calls"] = [{"type": "function", "function": call} for call in item.calls]
    return turn


def level_of(task_name: str) -> int:
    """Return the level in a row's `task`: 1 without a number behind it."""
    _, _, level = task_name.rpartition("_")
    return int(level) if level in ("2", "3") else 1


def held_out(*parts: object, share: float = 0.3) -> bool:
    """Whether a combination is one of those that no demonstration shows.

    The hash of its parts decides, so that it is the same in every draw and under every seed.
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
