"""Write the verbs of docs/cli.md, with their arguments and options, from the command line itself.

    python -m tools.cli_reference

What stands above the first `## ` is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from ernie_train.cli.main import app

_TYPES = {Path: "PATH", str: "TEXT", int: "N", float: "X"}
PAGE = Path(__file__).resolve().parents[1] / "docs/cli.md"


def render_page(text: str) -> str:
    """Return the page with the sections of all verbs written anew."""
    root: Any = get_command(app)
    parts = [text.partition("\n## ")[0].rstrip() + "\n"]
    for name, command in sorted(root.commands.items()):
        parts += [f"\n## {name}\n\n", *_section(name, command)]
    return "".join(parts)


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    words = [_argument(one) for one in arguments]
    yield " ".join([f"`ernie-train {name}", *words]).rstrip() + "`: "
    yield " ".join(command.help.split()) + "\n\n"
    shown = [one for one in command.params if one.name != "help"]
    if not shown:
        return
    yield "| option | default | meaning |\n| --- | --- | --- |\n"
    for one in [*arguments, *(one for one in shown if one not in arguments)]:
        yield f"| {_name(one)} | {_default(one)} | {_cell(one.help or '')} |\n"


def _argument(one: Any) -> str:
    name = one.name.upper().strip("_")
    name += " ..." if one.nargs == -1 or one.multiple else ""
    return name if one.required else f"[{name}]"


def _name(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"`{_argument(one).strip('[]')}`"
    value = "" if one.is_flag else f" {one.metavar or _TYPES[one.type_descriptor.annotation]}"
    return f"`{'`, `'.join(one.opts)}{value}`"


def _default(one: Any) -> str:
    if one.required:
        return "required"
    unset = one.default is None or one.default is False or one.default == ""
    return "" if unset else f"`{one.default}`"


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"docs/([\w/]+\.md)", r"[\1](\1)", text)


def main() -> None:
    """Write the page."""
    PAGE.write_text(render_page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
