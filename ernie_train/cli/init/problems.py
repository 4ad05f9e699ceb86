"""The rows of a recipe of reinforcement learning: what grades them, and how long they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ernie_train.core.errors import DataError
from ernie_train.data import Columns, Record, Tokenizer
from ernie_train.eval.problems import load_problems, require_verifiers
from ernie_train.eval.prompts import (
    GOLD,
    answer_parts,
    expecting_own_calls,
    problem_row,
    with_own_calls,
)
from ernie_train.rewards import fitting_verifier
from ernie_train.rewards.scoring import build_reference_completion
from ernie_train.rl.data import encode_prompts
from ernie_train.rl.preference_data import encode_completion

BY_ROW = "row"  # the reward of rows that name their verifiers
# Tokens of a completion: the least where rows have solutions, those without any, and those of a
# model that thinks first.
LEAST_NEW, USUAL_NEW, THINKING_NEW = 512, 1024, 4096
BARE_ANSWER = 32  # tokens; a longer answer of the assistant is a solution
UNIT = 64  # lengths are multiples of it


@dataclass(frozen=True)
class Problems:
    """Hold what the rows were found to be as problems.

    verifier: what grades them, or `BY_ROW`. prompts: tokens of those that are short enough. tried:
    the reward can be tried on every row's own answer.
    """

    verifier: str
    prompts: tuple[int, ...]
    max_prompt_tokens: int
    max_new_tokens: int
    tried: bool
    remarks: tuple[str, ...]

    @property
    def seq_len(self) -> int:
        """Return the most tokens of a prompt with its completion."""
        return self.max_prompt_tokens + self.max_new_tokens


def read_problems(
    data: str,
    tokenizer: Tokenizer,
    *,
    limit: int,
    seq_len: int | None,
    columns: Columns | None,
    max_bad_fraction: float,
) -> Problems:
    """Return what the rows of `data` are as problems.

    A prompt has at most half of `limit`, what the model can hold; with its completion it has
    `seq_len` tokens, if that is given.

    Raises `DataError` where more than `max_bad_fraction` of them have nothing to be graded by, or
    no prompt is short enough.
    """

    def problems_of(*, needs_reward: bool) -> list[Record]:
        return load_problems(
            data, needs_reward=needs_reward, max_bad_fraction=max_bad_fraction, columns=columns
        )

    found = expecting_own_calls(data, problems_of(needs_reward=False))
    if by_row := any("reward" in one.fields for one in found):
        require_verifiers(found := problems_of(needs_reward=True))
    graded = [one for one in found if grades(one)]
    lacking = [one for one in found if not grades(one)]
    if not graded or len(lacking) > max_bad_fraction * len(found):
        raise _ungraded(data, lacking, len(found))
    verifier = BY_ROW if by_row else _common_verifier(data, graded)
    most = limit // 2
    prompts, too_long = encode_prompts(
        graded, tokenizer, longest=most, max_bad_fraction=max_bad_fraction
    )
    if not prompts:
        raise DataError(f"{data}: no prompt has at most {most} tokens, half of seq_len")
    lengths = tuple(len(prompt.prompt_ids) for prompt in prompts)
    prompt = min(most, _rounded(max(lengths)))
    new = min(limit - prompt, _rounded(_new_tokens(graded, tokenizer)))
    untried = sum(
        build_reference_completion(
            str(one.fields.get("reward", verifier)), problem_row(one, tokenizer)
        )
        is None
        for one in found
    )
    remarks = {
        f"{len(lacking)} rows have nothing to be graded by, and teach nothing": lacking,
        f"{len(too_long)} prompts longer than {most} tokens are left out": too_long,
        f"{untried} rows have no answer to try the reward on, hence canaries: 0": untried,
    }
    return Problems(
        verifier,
        lengths,
        prompt,
        new if seq_len is None else seq_len - prompt,
        not untried,
        tuple(line for line, told in remarks.items() if told),
    )


def grades(problem: Record) -> bool:
    """Return whether a problem, or a row that can be one, has what a verifier grades by."""
    fields = with_own_calls(problem).fields
    return bool(fields.keys() & GOLD) if "reward" in fields else bool(fitting_verifier(fields))


def _common_verifier(data: str, graded: Sequence[Record]) -> str:
    """Return what grades all of the problems; raises `DataError` where they need several."""
    needed = Counter(fitting_verifier(one.fields) for one in graded)
    by_answer = all(not one.fields.keys() & (GOLD - {"answer"}) for one in graded)
    if by_answer and "math" in needed:
        return "math"  # it compares labels such as true as well, `logic` no numbers
    (verifier, _), *others = needed.most_common()
    if others:
        raise DataError(
            f"{data}: rows need several verifiers, "
            f"{', '.join(f'{name} ({count})' for name, count in needed.most_common())}: name each "
            "row's in a column `reward`, or write a recipe for each part of them"
        )
    return str(verifier)


def _ungraded(data: str, lacking: Sequence[Record], count: int) -> DataError:
    first = lacking[0]
    beside = ", ".join(sorted(first.fields.keys() - {"task", "domain"})) or "nothing"
    what = (
        "have an `answer` that is prose, which no verifier compares"
        if "answer" in first.fields
        else "have no `answer` to grade completions by"
    )
    return DataError(
        f"{data}: {len(lacking)} of {count} rows {what}; the first is {first.source}, with "
        f"{beside} beside its prompt\n"
        "an answer is a number, an expression, a choice, a label or a short text, or ends in one "
        "(#### 42, \\boxed{42}); programs have `tests` (docs/rewards.md)\n"
        "a column of another name: --columns '{answer: NAME}'; a reward of your own: "
        "docs/my_reward.md; to imitate demonstrations: --kind sft"
    )


def _rounded(tokens: int) -> int:
    return -(-tokens // UNIT) * UNIT


def _new_tokens(problems: Sequence[Record], tokenizer: Tokenizer) -> int:
    """Return the tokens that a completion may need, by the rows' solutions if they have any."""
    if answer_parts(tokenizer)["thinking"]:
        return THINKING_NEW
    lengths = []
    for one in problems:
        if turns := one.messages[len(one.prompt_messages) :]:
            try:
                solution = encode_completion(tokenizer, one.prompt_messages, turns, one.tools)
            except DataError:
                continue  # the template cannot show it; it is not trained
            lengths.append(len(solution.completion_ids))
    longest = max(lengths, default=0)
    return USUAL_NEW if longest <= BARE_ANSWER else max(LEAST_NEW, longest)
