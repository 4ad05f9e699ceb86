"""The `preview` verb: rows of data files as they are read, rendered and trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ernie_train.core.errors import DataError, UserError
from ernie_train.data import (
    Columns,
    EncodedDocument,
    ReadReport,
    Record,
    Tokenizer,
    encode_chat,
    encode_records,
    forgeable_turns,
    iter_records,
    load_tokenizer,
    preview,
    prompt_ids,
)
from ernie_train.data.reader import BadRows, grouped, remarks, splits_warning
from ernie_train.weights.model_directory import find_model

SHOWN_LEFT_OUT = 10
# Of a turn, a text, or the fields of a row: one of a million would run the row out of the terminal.
SHOWN_CHARACTERS = 4000


@dataclass(frozen=True)
class PreviewSettings:
    """Settings of a preview.

    row: shows this row alone, by its line or as "file:line"; otherwise the first `rows` are shown.
    most_rows: how many rows are read at most; 0 reads all.
    max_tokens: how many tokens of a row are shown, half of them from its end.
    """

    columns: Columns | None = None
    row: str | None = None
    rows: int = 3
    most_rows: int = 1000
    seq_len: int = 4096
    max_tokens: int = 400


def preview_data(
    data: str, tokenizer: Tokenizer | None, settings: PreviewSettings, console: Console
) -> None:
    """Print rows of `data`; with a tokenizer also their text, what is trained, and lengths.

    Raises:
        DataError: the path cannot be read, or holds no rows.
        UserError: there is no such row as `settings.row`.
    """
    read = ReadReport(data)
    found = iter_records(data, "auto", read, settings.columns)
    if settings.row is not None:
        read.wanted = partial(_is_row, row=settings.row)  # it may be any of those left out
        _print_one(found, read, settings.row, tokenizer, settings, console)
        return
    records = list(islice(found, settings.most_rows or None))
    if not read.rows:
        raise DataError(f"{data} holds no rows")
    for record in records[: settings.rows]:
        _print_record(record, tokenizer, settings, console)
    console.rule("the data")
    _print_counts(records, read, settings, console)
    if tokenizer is None:
        lines = remarks(data, {}, BadRows(), read.unread, read.passed_over)  # left out: told below
        lines += [splits_warning(data, read.splits)] if read.splits else []
        for line in lines:
            console.print(line, highlight=False)
    else:
        kind: Any = "pretrain" if all(r.kind == "text" for r in records) else "sft"
        _, report = encode_records(records, read, tokenizer, kind=kind, seq_len=settings.seq_len)
        console.print(report.as_table())
        if kind == "sft" and (line := forgeable_turns(tokenizer)):
            console.print(line, highlight=False)
        read.left_out, read.dropped = report.sources[0].left_out, report.sources[0].dropped
    _print_left_out(grouped(read.bad, read.left_out, read.dropped), console)


def preview_tokenizer(
    model: Path | None, tokenizer: Path | None, template: str | None
) -> Tokenizer | None:
    """Return the tokenizer that `--tokenizer` or `--model` names; None if neither is given.

    `template` replaces its chat template.
    """
    if model is not None and tokenizer is not None:
        raise UserError("--model and --tokenizer name the tokenizer twice; leave one of them out")
    if tokenizer is not None:
        return load_tokenizer(tokenizer, template=template)
    if model is None:
        return None
    return load_tokenizer(find_model(model).tokenizer, template=template)


def _print_one(
    found: Iterator[Record],
    read: ReadReport,
    row: str,
    tokenizer: Tokenizer | None,
    settings: PreviewSettings,
    console: Console,
) -> None:
    for record in found:
        if _is_row(record.source, row):
            _print_record(record, tokenizer, settings, console)
            return
    for left_out in read.bad.listed + read.left_out:
        if _is_row(left_out.source, row):
            console.print(f"left out: {left_out}", highlight=False)
            return
    raise UserError(f"--row {row}: {read.path} has no such row; it has {read.rows} rows")


def _is_row(source: str, row: str) -> bool:
    place, _, line = source.rpartition(":")
    line = line.removeprefix("row ")
    return row in (source, line, f"{place}:{line}", f"{Path(place).name}:{line}")


def _print_record(
    record: Record, tokenizer: Tokenizer | None, settings: PreviewSettings, console: Console
) -> None:
    console.rule(f"{record.source} ({record.kind})")
    turns = [("", turn) for turn in record.messages]
    turns += [("chosen ", turn) for turn in record.chosen or []]
    turns += [("rejected ", turn) for turn in record.rejected or []]
    for name, turn in turns:
        _print_turn(name, turn, console)
    if record.text is not None and tokenizer is None:
        console.print(_shown(record.text), highlight=False)
    fields = {key: value for key, value in record.fields.items() if key != "tools"}
    if record.tools:
        tools = json.dumps(record.tools, ensure_ascii=False)
        console.print(f"tools: {_shown(tools)}", highlight=False)
    if fields:
        written = json.dumps(fields, ensure_ascii=False, default=str)
        console.print(f"fields: {_shown(written)}", highlight=False)
    if tokenizer is not None:
        _print_encoded(record, tokenizer, settings, console)


def _print_turn(name: str, turn: dict[str, Any], console: Console) -> None:
    note = " (not trained)" if turn.get("weight", 1) == 0 else ""
    console.print(Text(f"{name}{turn['role']}{note}:", "bold"), end=" ")
    parts = [f"<reasoning> {turn['reasoning_content']}"] if "reasoning_content" in turn else []
    parts += [turn["content"]] if turn["content"] else []
    for call in turn.get("tool_calls", []):
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        parts.append(f"calls {call['function']['name']}({arguments})")
    console.print(_shown("\n".join(parts)), highlight=False)


def _shown(text: str) -> str:
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} ... {left_out:,} characters ... {text[-half:]}"


def _print_encoded(
    record: Record, tokenizer: Tokenizer, settings: PreviewSettings, console: Console
) -> None:
    """Print the text of a row with what is trained, or why it is left out."""
    try:
        documents = _encoded(record, tokenizer, settings.seq_len)
    except DataError as error:
        console.print(f"left out: {record.source}: {error}", highlight=False)
        return
    for name, document in documents:
        trained = int(document.trainable[1:].sum())
        console.print(f"{name}{len(document.ids)} tokens, {trained} trained:", highlight=False)
        console.print(preview(tokenizer, document, settings.max_tokens, console), soft_wrap=True)


def _encoded(
    record: Record, tokenizer: Tokenizer, seq_len: int
) -> list[tuple[str, EncodedDocument]]:
    """Return (name, document) of what a stage makes of a record.

    Raises:
        DataError: it cannot be encoded, or is left out for another reason.
    """
    import numpy as np  # only this verb's arrays

    if record.kind == "prompt":
        ids = prompt_ids(tokenizer, record.messages, record.tools)
        nothing = np.zeros(len(ids), dtype=np.bool_)
        return [("prompt: ", EncodedDocument(np.array(ids, np.int32), nothing))]
    if record.kind == "preference":
        both = {"chosen: ": record.chosen or [], "rejected: ": record.rejected or []}
        encoded = {
            name: encode_chat(tokenizer, [*record.messages, *turns], record.tools)
            for name, turns in both.items()
        }
        return [
            (name, EncodedDocument(np.array(ids, np.int32), np.array(trainable, np.bool_)))
            for name, (ids, trainable) in encoded.items()
        ]
    kind: Any = "pretrain" if record.kind == "text" else "sft"
    read = ReadReport(record.source)
    documents, report = encode_records([record], read, tokenizer, kind=kind, seq_len=seq_len)
    source = report.sources[0]
    if left_out := source.bad.listed + source.left_out:
        raise DataError(left_out[0].reason)
    return [("", document) for document in documents]


def _print_counts(
    records: list[Record], read: ReadReport, settings: PreviewSettings, console: Console
) -> None:
    kinds = Counter(record.kind for record in records)
    formats = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.print(
        f"{read.path}: {read.rows} rows of the format {read.format or 'unknown'} in {read.files} "
        f"file{'s' if read.files != 1 else ''}: {formats or 'none can be used'}",
        highlight=False,
    )
    if settings.most_rows and len(records) == settings.most_rows:
        console.print(f"only the first {read.rows} rows were read; --max-rows 0 reads all")


def _print_left_out(reasons: list[str], console: Console) -> None:
    for reason in reasons[:SHOWN_LEFT_OUT]:
        console.print(f"left out: {reason}", highlight=False)
    if len(reasons) > SHOWN_LEFT_OUT:
        console.print("and other reasons")
