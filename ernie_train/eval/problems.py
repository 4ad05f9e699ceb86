"""Problems of evaluation and RL: read them, name their task and domain, check their fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ernie_train.core.errors import ConfigError, DataError, describe
from ernie_train.data import Columns, Record, read_records
from ernie_train.data.reader import HeldOut
from ernie_train.eval.prompts import GOLD, expecting_own_calls
from ernie_train.rewards import reward_named
from ernie_train.rewards.sandbox import layer_in_force

LONGEST_NAME = 200  # characters of a task, a domain or a verifier
SHOWN_PROBLEMS = 10
SHOWN_PLACES = 3  # of one mistake


def load_problems(
    path: str | Path,
    *,
    tasks: Sequence[str] = (),
    max_examples: int | None = None,
    needs_reward: bool = True,
    max_bad_fraction: float = 0.01,
    columns: Columns | None = None,
    format: str = "auto",
    without: HeldOut | None = None,
) -> list[Record]:
    """Read the problems of a path, as `read_records` does, and name their task and domain.

    Rows that do not say what is expected are graded by the tool calls that they end in, if they do.
    A row without `task` belongs to the task that its file is named after, one without `domain` to
    the domain that its task is named after.

    Args:
        tasks: keep only these tasks or domains.
        max_examples: keep only the first of each task.
        needs_reward: require that rows name a verifier.
        max_bad_fraction: share of unreadable rows that is tolerated.
        columns: what to read the columns of rows as.
        format: a name in FORMATS, or "auto".
        without: prompts whose rows are left out, and the file that holds them.

    Raises:
        DataError: a missing path, or rows that lack a prompt, a verifier or a name that is text.
        ConfigError: a name in `tasks` is neither a task nor a domain of these problems.
    """
    records, read = read_records(path, format, max_bad_fraction, columns, without=without)
    read.warn()
    problems = [_with_names(record) for record in records]
    if needs_reward:
        problems = expecting_own_calls(path, problems)
    _check_fields(path, problems, needs_reward)
    known = {record.fields[key] for record in problems for key in ("task", "domain")}
    if unknown := sorted(set(tasks) - known):
        raise ConfigError(f"no task or domain {', '.join(unknown)}; there are {sorted(known)}")
    seen: Counter[str] = Counter()
    kept = []
    for record in problems:
        task, domain = record.fields["task"], record.fields["domain"]
        if tasks and task not in tasks and domain not in tasks:
            continue
        seen[task] += 1
        if max_examples is None or seen[task] <= max_examples:
            kept.append(record)
    return kept


def _with_names(record: Record) -> Record:
    file = Path(record.source.rpartition(":")[0])
    task = record.fields.get("task", file.name.partition(".")[0])
    return replace(record, fields={"domain": task, **record.fields, "task": task})


def _check_fields(path: str | Path, problems: Sequence[Record], needs_reward: bool) -> None:
    """Raise `DataError` that lists what is wrong with the problems' fields, by file and line."""
    places: dict[str, list[str]] = {}  # by reason: a file mostly lacks the same in all its rows
    for record in problems:
        for reason in _wrong_fields(record, needs_reward):
            places.setdefault(reason, []).append(record.source)
    if not places:
        return
    wrong = [
        ", ".join(found[:SHOWN_PLACES])
        + (f" and {len(found) - SHOWN_PLACES} more" if len(found) > SHOWN_PLACES else "")
        + f": {reason}"
        for reason, found in places.items()
    ]
    if len(wrong) > SHOWN_PROBLEMS:
        wrong[SHOWN_PROBLEMS:] = [f"and {len(wrong) - SHOWN_PROBLEMS} other mistakes"]
    keys = ", ".join(sorted(problems[0].fields.keys() - {"task", "domain"})) or "nothing"
    if places.keys() == {_needs("reward")}:
        hint = "One verifier for all rows: {reward: {value: math}}"
    else:
        hint = "Other names are mapped: {answer: gold, reward: {value: math}}"
    raise DataError(
        f"{path}: fields of problems are wrong:\n  " + "\n  ".join(wrong) + "\n"
        f"Beside its prompt the first row has {keys}. {hint}, as `columns` beside the path or as "
        "--columns of eval; docs/rewards.md lists verifiers"
    )


def _needs(key: str) -> str:
    return f"a problem needs the field {key!r}"


def _wrong_fields(record: Record, needs_reward: bool) -> Iterator[str]:
    fields = record.fields
    if not record.messages:
        yield "a problem needs a prompt, or messages"
    for key in ("task", "domain", *(("reward",) if needs_reward else ())):
        value = fields.get(key)
        if value is None:
            yield _needs(key)
        elif not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
            yield f"{key!r} must be a text of 1 to {LONGEST_NAME} characters, not {describe(value)}"
    if needs_reward and "reward" not in fields and not fields.keys() & GOLD:
        yield "a problem needs what its verifier grades by, such as 'answer' (docs/rewards.md)"


def require_verifiers(problems: Sequence[Record]) -> None:
    """Check before training that the problems can be scored after it.

    Raises `UserError` for an unknown reward, and `SandboxUnavailable` if programs must be run and
    no sandbox works.
    """
    names = {str(record.fields["reward"]) for record in problems}
    for name in sorted(names):
        reward_named(name)
    if "code" in names:
        layer_in_force()
