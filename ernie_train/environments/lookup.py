"""Look-up in the table that a problem's row carries in its field `table`."""

from __future__ import annotations

import json
from typing import Any

from ernie_train.environments.tool import Signature, ToolContext, ToolError

TABLE = "table"
_SHOWN_KEYS = 10


def lookup(key: str) -> str:
    """Return the entry of the table under a key.

    Args:
        key: the name of the entry
    """
    raise NotImplementedError(f"{key}: the table is the row's")


class Lookup:
    """Returns a key's entry for the tool `lookup`: text, or JSON where it is no text."""

    signature = Signature.of(lookup)
    schema = signature.schema

    def call(self, arguments: dict[str, Any], context: ToolContext) -> str:
        key = self.signature.check(arguments)["key"].strip()
        table = context.row[TABLE]
        if key not in table:
            known = ", ".join(list(table)[:_SHOWN_KEYS])
            more = ", ..." if len(table) > _SHOWN_KEYS else ""
            raise ToolError(f"the table has no entry {key[:80]!r}; it has {known}{more}")
        entry = table[key]
        return entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
