"""Convert rows of public formats, in all their spellings, to records of one form."""

from ernie_train.data.formats.columns import (
    Column,
    ColumnMap,
    Columns,
    MappedRows,
    parse_columns,
)
from ernie_train.data.formats.kinds import FORMATS, as_prompt, detect_format, missing_keys
from ernie_train.data.formats.messages import REASONING_KEYS, read_call, read_tool
from ernie_train.data.formats.record import Record, verifier_names
from ernie_train.data.formats.values import (
    BlankAnswer,
    Row,
    RowError,
    json_value,
    without_nulls,
)

__all__ = [
    "FORMATS",
    "REASONING_KEYS",
    "BlankAnswer",
    "Column",
    "ColumnMap",
    "Columns",
    "MappedRows",
    "Record",
    "Row",
    "RowError",
    "as_prompt",
    "detect_format",
    "json_value",
    "missing_keys",
    "parse_columns",
    "read_call",
    "read_tool",
    "verifier_names",
    "without_nulls",
]
