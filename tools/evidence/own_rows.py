"""Rows of three public shapes, split into those to train on and those held out.

| kind | a row |
|---|---|
| `tool_calls` | OpenAI's: `messages` whose last turn has `tool_calls`, and `tools`; or a BFCL file `NAME.jsonl` beside its `NAME.answers.jsonl` |
| `questions` | GSM8K's: `question`, and `answer` with the result behind `####` |
| `instructions` | Alpaca's: `instruction`, `input`, `output` |

Files are of any kind that docs/data.md names. Where none is given, rows are made of `data/train`:

    python -m tools.evidence.own_rows DIRECTORY
"""  # noqa: E501

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_train.data.files import find_files
from ernie_train.data.files import read_rows as rows_of_file
from tools.evidence.runs import ROOT

Row = dict[str, Any]
HELD_OUT, LIMIT = 40, 1000
MADE_OF = {"tool_calls": "tools", "questions": "math", "instructions": "science"}


def write_rows(kind: str, path: Path | None, directory: Path, held_out: int, limit: int) -> str:
    """Write `KIND.train.jsonl` and `KIND.held_out.jsonl`; return what they are made of, in words.

    The last `held_out` rows of the first `limit` are held out; rows of tool calls get their
    verifier. Raises `ValueError` where there are too few rows.
    """
    rows = list(made_rows(kind) if path is None else read_rows(kind, path))[:limit]
    if len(rows) <= 2 * held_out:
        raise ValueError(f"{path}: {len(rows)} rows; it takes more than {2 * held_out}")
    if kind == "tool_calls":
        rows = [graded(row) for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:-held_out]), ("held_out", rows[-held_out:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (directory / f"{kind}.{name}.jsonl").write_text(text, encoding="utf-8")
    return f"data/train/{MADE_OF[kind]}.jsonl" if path is None else "/".join(path.parts[-2:])


def made_rows(kind: str) -> Iterator[Row]:
    """Yield rows of a kind, made of the problems in `data/train`."""
    for row in read_objects(ROOT / "data" / "train" / f"{MADE_OF[kind]}.jsonl"):
        question, answer = row["messages"]
        steps = answer.pop("reasoning_content")
        if kind == "tool_calls":
            yield {"messages": [question, answer], "tools": row["tools"]}
        elif kind == "questions":
            yield {"question": question["content"], "answer": f"{steps}\n#### {answer['content']}"}
        else:
            yield {"instruction": question["content"], "input": "", "output": answer["content"]}


def read_rows(kind: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a file, those of BFCL in OpenAI's shape."""
    answers = path.with_name(path.name.replace(".jsonl", ".answers.jsonl"))
    if kind == "tool_calls" and answers != path and answers.exists():
        truth = {row["id"]: row["ground_truth"] for row in read_objects(answers)}
        yield from (bfcl_row(row, truth[row["id"]]) for row in read_objects(path))
    else:
        yield from read_objects(path)


def read_objects(path: Path) -> Iterator[Row]:
    """Yield the rows of the files of a path; raises `ValueError` at one that cannot be read."""
    for file in find_files(path).files:
        for place, row in rows_of_file(file, lambda done: None):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: {row}")
            yield row


def bfcl_row(row: Row, truth: list[dict[str, dict[str, list[Any]]]]) -> Row:
    """Return a row of BFCL with its first allowed values as the answer."""
    expected: list[Row] = [
        {"name": name, "arguments": allowed} for call in truth for name, allowed in call.items()
    ]
    calls = [{"name": call["name"], "arguments": firsts(call["arguments"])} for call in expected]
    made = [{"type": "function", "function": call} for call in calls]
    answer = {"role": "assistant", "tool_calls": made}
    tools = [{"type": "function", "function": json_schema(tool)} for tool in row["function"]]
    return {"messages": [*row["question"][0], answer], "tools": tools, "expected_calls": expected}


def firsts(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the first allowed value of each argument that may not be left out.

    A value that is an object of lists names the allowed values of its members in turn.
    """
    found = {name: values[0] for name, values in arguments.items() if "" not in values}
    return {
        name: firsts(value) if _has_allowed_values(value) else value
        for name, value in found.items()
    }


def _has_allowed_values(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(member, list) for member in value.values())


def json_schema(value: Any) -> Any:
    """Return a function of BFCL with JSON schema's names of types."""
    names = {"dict": "object", "float": "number", "tuple": "array"}
    if isinstance(value, dict):
        return {
            k: names.get(v, v) if k == "type" and isinstance(v, str) else json_schema(v)
            for k, v in value.items()
        }
    return [json_schema(item) for item in value] if isinstance(value, list) else value


def graded(row: Row) -> Row:
    """Return a row with its verifier and, from its own calls, what that expects."""
    expected = row.get("expected_calls")
    if expected is None:
        calls = [call.get("function", call) for call in row["messages"][-1]["tool_calls"]]
        arguments = [c["arguments"] for c in calls]
        arguments = [json.loads(a) if isinstance(a, str) else a for a in arguments]
        expected = [
            {"name": call["name"], "arguments": {k: [v] for k, v in own.items()}}
            for call, own in zip(calls, arguments, strict=True)
        ]
    return {**row, "task": "tool_calls", "domain": "tools", "reward": "tool_call",
            "expected_calls": expected}  # fmt: skip


if __name__ == "__main__":
    for each in MADE_OF:
        write_rows(each, None, Path(sys.argv[1]), HELD_OUT, LIMIT)
