"""Conversions between problems, token ids and verifiers, for evaluation and RL."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ernie_train.core.errors import DataError
from ernie_train.data import (
    Columns,
    Record,
    Tokenizer,
    prompt_ids,
    read_records,
    require_chat_template,
)
from ernie_train.data.cache import recall, remember
from ernie_train.environments import EnvironmentConfig, Toolbox, open_toolbox
from ernie_train.generate.engine import Completion
from ernie_train.rewards.score import FORMAT_KEY

_log = logging.getLogger(__name__)
_SHOWN = 10  # wrong problems in a message
_REMEMBERED = 100  # problems: fewer are encoded in a moment
TOOL_CALL = "tool_call"  # the verifier of calls
# Fields that verifiers grade by: a row has one of them, but for a verifier of the user's.
GOLD = {"answer", "tests", "hidden_tests", "expected_calls", "assignment", "choices", "rg_entry"}


@dataclass(frozen=True)
class FewShot:
    """Worked examples that stand before each problem as earlier turns.

    examples: rows in their fixed order, each with an answer of the assistant at its end.
    shots: how many of them a problem gets.
    """

    examples: Sequence[Record]
    shots: int

    def before(self, problem: Record) -> list[dict[str, Any]]:
        """Return the turns of the first examples that do not ask the problem itself.

        Raises:
            DataError: there are fewer than `shots` of them.
        """
        asked, pairs = _asked(problem), zip(self.examples, self._questions, strict=True)
        others = (example for example, question in pairs if question != asked)
        chosen = list(islice(others, self.shots))
        if len(chosen) < self.shots:
            raise DataError(f"{self.shots} shots need as many other rows; there are {len(chosen)}")
        return [turn for example in chosen for turn in _turns(example.messages)]

    @cached_property
    def _questions(self) -> list[list[tuple[str, str]]]:
        return [_asked(example) for example in self.examples]


def load_few_shot(
    path: str | Path,
    shots: int,
    seed: int,
    columns: Columns | None = None,
    max_bad_fraction: float = 0.01,
) -> FewShot:
    """Read worked examples from a file of rows, in an order that the seed decides.

    The answer is the assistant's turn at the end of a row, or else its field `answer`.

    Raises:
        DataError: the path cannot be read, rows have no answer, or there are fewer than `shots`.
    """
    records, read = read_records(path, max_bad_fraction=max_bad_fraction, columns=columns)
    read.warn()
    examples = []
    for record in records:
        if not record.messages:
            raise DataError(f"{record.source}: an example needs a prompt, or messages")
        if record.messages[-1]["role"] != "assistant":
            answer = record.fields.get("answer")
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(f"{record.source}: an example needs an answer of the assistant")
            turn = {"role": "assistant", "content": answer}
            record = replace(record, messages=[*record.messages, turn])
        examples.append(record)
    if len(examples) < shots:
        raise DataError(f"{path}: {shots} shots need as many rows; it has {len(examples)}")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(examples))
    return FewShot([examples[at] for at in order], shots)


def _turns(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages but for system texts: that of a conversation is the problem's own."""
    return [message for message in messages if message["role"] != "system"]


def _asked(record: Record) -> list[tuple[str, str]]:
    return [
        (m["role"], " ".join(str(m["content"]).split())) for m in _turns(record.prompt_messages)
    ]


def expecting_own_calls(path: str | Path, problems: Sequence[Record]) -> list[Record]:
    """Return problems, of which those that say nothing else expect their own tool calls.

    Logs how many do so.
    """
    found = [with_own_calls(record) for record in problems]
    if count := sum(one is not other for one, other in zip(problems, found, strict=True)):
        _say_once(
            f"{count} of {len(found)} problems of {path} do not say what is expected: the tool "
            f"calls that their rows end in are (verifier {TOOL_CALL})"
        )
    return found


def with_own_calls(record: Record) -> Record:
    """Return the problem with the tool calls at its end as what is expected.

    That is one that names neither a verifier nor what is expected, and ends in calls; or one of the
    verifier `tool_call` that does not say what is expected: without calls at its end it expects
    none. Every other problem is returned as it is.
    """
    fields = record.fields
    ending = record.messages[len(record.prompt_messages) :]
    calls = [call["function"] for turn in ending for call in turn.get("tool_calls", ())]
    named = fields.get("reward") == TOOL_CALL and bool(ending)
    if fields.keys() & GOLD or not (named or (calls and "reward" not in fields)):
        return record
    expected = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    return replace(record, fields={**fields, "reward": TOOL_CALL, "answer": json.dumps(expected)})


@cache
def _say_once(line: str) -> None:
    _log.warning("%s", line)


def encode_prompt(
    tokenizer: Tokenizer, record: Record, few_shot: FewShot | None = None
) -> list[int]:
    """Return the ids of a problem, without its reference answer, and of the generation prompt."""
    messages = record.prompt_messages
    if few_shot is not None:
        start = len(messages) - len(_turns(messages))  # behind its system text
        messages = [*messages[:start], *few_shot.before(record), *messages[start:]]
    return prompt_ids(tokenizer, messages, record.tools)


def encode_problems(
    tokenizer: Tokenizer,
    problems: Sequence[Record],
    most_tokens: int,
    few_shot: FewShot | None = None,
) -> list[list[int]]:
    """Return the ids of all prompts, each of at most `most_tokens`.

    Raises:
        DataError: prompts that cannot be encoded or are longer, with file and line.
    """
    encoded: list[list[int]] = []
    wrong = []
    for record in problems:
        try:
            encoded.append(encode_prompt(tokenizer, record, few_shot))
        except DataError as error:
            wrong.append(f"{record.source}: {error}")
            continue
        if len(encoded[-1]) > most_tokens:
            wrong.append(
                f"{record.source}: the prompt has {len(encoded[-1])} tokens; beside max_new_tokens "
                f"the model's max_position_embeddings leave {max(0, most_tokens)}"
            )
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise DataError("problems that cannot be asked:\n  " + "\n  ".join(wrong[:_SHOWN] + more))
    return encoded


def check_problems(
    tokenizer: Tokenizer,
    problems: Sequence[Record],
    most_tokens: int,
    environment: EnvironmentConfig | None,
    base_directory: Path,
    few_shot: FewShot | None = None,
) -> None:
    """Check that all problems can be asked, in their environment and behind examples, if any.

    Raises the errors of `open_toolbox`, `require_episodes` and `encode_problems`.
    """
    with open_toolbox(environment, tokenizer, base_directory) as toolbox:
        require_episodes(toolbox, problems)
        asked = [toolbox.offer(problem) if toolbox else problem for problem in problems]
        _check_prompts(tokenizer, asked, most_tokens, few_shot)


def _check_prompts(
    tokenizer: Tokenizer, asked: Sequence[Record], most_tokens: int, few_shot: FewShot | None
) -> None:
    """Raise the errors of `encode_problems`; the length of prompts that have none is remembered.

    Encoding the 3300 problems of the main job took a quarter of the time to its first step, at
    every start of every rank.
    """
    template = tokenizer.chat.template
    by_day = template is not None and template.asks_date and template.date is None
    if few_shot is not None or by_day or len(asked) < _REMEMBERED:
        encode_problems(tokenizer, asked, most_tokens, few_shot)
        return
    prompts = [[record.prompt_messages, record.tools] for record in asked]
    identity = [tokenizer.fingerprint(), tokenizer.chat.fingerprint]
    facts = [*identity, json.dumps(prompts, default=repr)]
    longest = recall(facts).get("longest")
    if not isinstance(longest, int) or longest > most_tokens:
        encoded = encode_problems(tokenizer, asked, most_tokens)
        remember(facts, {"longest": max(map(len, encoded))})


def is_episode(toolbox: Toolbox, offered: Record) -> bool:
    """Return whether a problem, as the toolbox offers it, may call tools."""
    return toolbox.serves(offered) and bool(offered.tools)


def require_episodes(toolbox: Toolbox | None, problems: Sequence[Record]) -> None:
    """Raise `DataError` if there are tools and no problem is offered one."""
    if toolbox is None or any(is_episode(toolbox, toolbox.offer(one)) for one in problems):
        return
    raise DataError(
        f"none of the {len(problems)} problems is offered a tool of {', '.join(toolbox.tools)}: "
        "rows of reward tool_call, rows with other tools of their own and, for lookup, rows "
        "without a table are answered in one turn; leave the tools out, or give other problems"
    )


def user_prompt(record: Record) -> str:
    """Return the text of the last user turn that is asked, for people who read samples."""
    asked = record.prompt_messages
    turns = [m for m in asked if m["role"] == "user"] or asked
    return str(turns[-1]["content"])


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """Return the text of a completion without its stop token."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    return tokenizer.decode(ids)


def problem_row(record: Record, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the row that a verifier gets for a problem, with the form that answers have."""
    asked = {"messages": record.messages, "tools": record.tools}
    return {**asked, **record.fields, FORMAT_KEY: answer_parts(tokenizer)}


def answer_parts(tokenizer: Tokenizer) -> dict[str, bool]:
    """Return which parts a completion has in the model's chat format, as verifiers read it."""
    template = require_chat_template(tokenizer)
    return {"thinking": template.opens_thinking, "response_tags": template.has_response_tags}
