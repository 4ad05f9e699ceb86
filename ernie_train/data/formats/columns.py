"""Map the columns of rows to the keys that formats and verifiers know, as a recipe asks."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ernie_train.core.config import StrictConfig, parse_config
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.core.yaml import parse_yaml
from ernie_train.data.formats.values import (
    ANSWER_KEYS,
    JSON_KEYS,
    Row,
    RowError,
    answer_text,
    json_value,
)


class Column(StrictConfig):
    """Say where the value of a key comes from: a column of the row, or a constant."""

    column: Annotated[str, Field(min_length=1)] | None = None
    """Name of a column, or a path into structs and lists such as `reward_model.ground_truth` or
    `turns.0`.
    """
    after: Annotated[str, Field(min_length=1)] | None = None
    """Keeps the text after the last such marker, as `####` before the result in GSM8K."""
    value: Any = None
    """The same value for every row, in place of a column."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Column":
        if (self.column is None) == (self.value is None):
            raise ValueError("exactly one of column and value must be given")
        if self.after is not None and self.column is None:
            raise ValueError("after needs a column")
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


Columns = Mapping[str, str | Column]


class MappedRows(StrictConfig):
    """Settings of rows whose columns may have names of their own."""

    columns: Annotated[dict[str, str | Column], Field(min_length=1)] | None = None
    """The rows' own names of columns, as `key: column`; others keep their names
    (docs/data.md#columns-of-your-own).
    """

    # Keys that there were not always: recorded settings of runs that were started before stay the
    # same, where these are not set.
    later_keys: ClassVar[tuple[str, ...]] = ("columns", "without")

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        fields, later = type(self).model_fields, self.later_keys
        return {k: v for k, v in values.items() if k not in later or v != fields[k].default}


def parse_columns(text: str, source: str) -> Columns:
    """Return the columns that a YAML text describes, such as `{prompt: question}`.

    Raises:
        ConfigError: it describes none; the message names `source`.
    """
    columns = parse_config(MappedRows, {"columns": parse_yaml(text, source)}, source).columns
    if columns is None:
        raise ConfigError("it is empty; it must be such as {prompt: question}", source)
    return columns


class ColumnMap:
    """Rename, cut and add columns of rows; remembers which columns it has never seen."""

    def __init__(self, columns: Columns | None) -> None:
        self._columns = {
            key: Column(column=column) if isinstance(column, str) else column
            for key, column in (columns or {}).items()
        }
        self._unseen = {c.column: key for key, c in self._columns.items() if c.column is not None}
        self._first_row: list[str] = []

    def __call__(self, row: Row) -> Row:
        """Return the row with its mapped columns last, without nulls, and in verifiers' types.

        Numbers that are answers become texts, JSON texts of `JSON_KEYS` what they hold.

        Raises:
            RowError: a text has no marker to cut it after.
        """
        self._first_row = self._first_row or sorted(row)
        mapped: Row = {}
        for key, column in self._columns.items():
            value = column.value if column.column is None else self._value(row, key, column)
            if value is not None:
                mapped[key] = value
        used = {column.column for column in self._columns.values()}
        rest = {k: v for k, v in row.items() if v is not None and k not in used}
        found = {**rest, **mapped}
        found |= {key: json_value(found[key]) for key in JSON_KEYS if key in found}
        choices = found.get("choices")
        return found | {k: answer_text(found[k], choices) for k in ANSWER_KEYS if k in found}

    def check(self, path: str) -> None:
        """Check that every column was in some row.

        Raises:
            DataError: one was in none.
        """
        if not self._unseen or not self._first_row:
            return
        named = "; ".join(f"columns.{key}: {column}" for column, key in self._unseen.items())
        raise DataError(
            f"{path}: {named}: no row has this column; the first has "
            f"{', '.join(self._first_row)} (columns: {{key: column}} gives each key its column)"
        )

    def _value(self, row: Row, key: str, column: Column) -> Any:
        value = _at(row, str(column.column))
        if value is None:
            return None
        self._unseen.pop(str(column.column), None)
        if column.after is None:
            return value
        if not isinstance(value, str) or column.after not in value:
            raise RowError(f"{key}: there is no {column.after!r} in the column {column.column}")
        return value.rpartition(column.after)[2].strip()


def _at(value: Any, path: str) -> Any:
    """Return what lies at a dotted path of keys and positions; None if nothing does."""
    if isinstance(value, dict) and path in value:
        return value[path]
    head, _, rest = path.partition(".")
    if isinstance(value, dict):
        found = value.get(head)
    elif isinstance(value, list) and head.isdecimal() and int(head) < len(value):
        found = value[int(head)]
    else:
        return None
    return _at(found, rest) if rest else found
