"""Choose the rows of the data that are held out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from ernie_train.cli.init.rows import OwnModel, Rows
from ernie_train.core.errors import DataError, UserError
from ernie_train.data import Columns, ReadReport, Record, find_files, iter_records
from ernie_train.data.files import read_rows
from ernie_train.data.formats import ColumnMap, Row, RowError

SHARE = 0.05  # of the rows, unless something else is asked for
LEAST_ROWS, MOST_ROWS = 4, 500  # that are held out then
FEW_ROWS = 20  # of fewer none is
CANDIDATES = 2  # prompts that are tried, for each row to hold out
ROWS_CONSIDERED = 50_000  # the first of the data, so that a large one need not be read whole


@dataclass(frozen=True)
class HeldOutWish:
    """Say how many rows to hold out, as `--held-out` does: `50`, `5%` or `0`; None: a default."""

    text: str | None = None

    def __post_init__(self) -> None:
        """Raise `UserError` for a text that is neither a number nor a share."""
        if self.text is None or re.fullmatch(r"\d{1,9}|\d{1,2}(\.\d+)?%", self.text, re.ASCII):
            return
        raise UserError(
            f"--held-out {self.text}: rows to hold out are a number such as 50, a share such as "
            "5%, or 0 for none"
        )

    def of(self, rows: Rows, data: str) -> int:
        """Return how many of the rows are to be held out; `UserError` for more than half."""
        if self.text is None:
            some = max(LEAST_ROWS, min(MOST_ROWS, round(SHARE * rows.count)))
            return some if rows.count >= FEW_ROWS else 0
        share = self.text.endswith("%")
        count = round(rows.count * float(self.text[:-1]) / 100) if share else int(self.text)
        if count > rows.count // 2:
            raise UserError(
                f"--held-out {self.text}: {data} has {rows.count} rows, of which at most half, "
                f"{rows.count // 2}, can be held out"
            )
        return count

    def checked(self, rows: Rows, data: str) -> HeldOutWish:
        """Return itself; raises the error of `of`."""
        self.of(rows, data)
        return self


@dataclass
class HeldOutRows:
    """Rows as they stand in the data, and how many different prompts they have."""

    rows: list[Row] = field(default_factory=list)
    prompts: int = 0


def hold_out(
    path: str | Path, count: int, fits: Callable[[Record], bool], columns: Columns | None = None
) -> HeldOutRows:
    """Return at most `count` rows, with every row that asks what one of them asks.

    Which prompts are chosen depends on their texts alone, not on the order of the rows. A prompt is
    passed over whose rows are too many, or of which one does not pass `fits`.

    Raises:
        DataError: the path cannot be read, or no chosen row has one of the columns.
    """
    rows_of = Counter(record.prompt_key for record in _considered(path, columns))
    held = HeldOutRows()
    small = [key for key in sorted(rows_of) if rows_of[key] <= count][: CANDIDATES * count]
    sources: dict[bytes, list[str]] = {key: [] for key in small}
    for record in _considered(path, columns):
        found = sources.get(record.prompt_key)
        if found is not None and fits(record):
            found.append(record.source)
    chosen: set[str] = set()
    for key, found in sources.items():
        if len(found) == rows_of[key] <= count - len(chosen):
            chosen.update(found)
            held.prompts += 1
    held.rows = _rows_at(path, chosen)
    mapped = ColumnMap(columns)
    for row in held.rows:
        mapped(row)
    mapped.check(f"{path}: of the rows to hold out")
    return held


def _considered(path: str | Path, columns: Columns | None) -> Iterator[Record]:
    return islice(iter_records(path, "auto", ReadReport(""), columns), ROWS_CONSIDERED)


def _rows_at(path: str | Path, sources: Collection[str]) -> list[Row]:
    """Return the rows at these places, "file:line", as they stand there."""
    files = find_files(path).files
    located = chain.from_iterable(read_rows(file, lambda count: None) for file in files)
    chosen = ((source, row) for source, row in located if source in sources)
    return [row for _, row in islice(chosen, len(sources)) if not isinstance(row, RowError)]


@dataclass(frozen=True)
class Split:
    """Rows that are held out, and a line that says so."""

    about: str
    rows: list[Row] = field(default_factory=list)


def split(
    data: str, rows: Rows, wish: HeldOutWish, model: OwnModel, seq_len: int, columns: Columns | None
) -> Split:
    """Choose the rows to hold out; there may be none, and `about` says why.

    Raises `UserError` for a wish that the data cannot fulfil.
    """
    if wish.text == "0":
        return Split("none, as --held-out 0 says")
    count = wish.of(rows, data)
    if not count:
        few = f"{rows.count} rows are" if rows.count != 1 else "1 row is"
        return Split(f"none: {few} too few; name rows of another file by validation: in the recipe")
    try:
        found = hold_out(
            data, count, lambda record: model.encodes(record, rows.kind, seq_len), columns
        )
    except DataError as error:
        return Split(f"none: {error}")
    if not found.rows:
        return Split(
            f"none: every prompt of {data} has more than {count} rows, or some that cannot be "
            "trained; --held-out says how many rows there may be"
        )
    same = "" if found.prompts == len(found.rows) else f" ({found.prompts} prompts)"
    return Split(f"{len(found.rows)} rows{same}", found.rows)


def held_out_path(recipe: Path) -> Path:
    """Return where the rows are written that a recipe holds out."""
    return recipe.with_suffix(".held_out.jsonl")
