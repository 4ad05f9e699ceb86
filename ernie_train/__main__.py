"""The program `ernie-train`, also `python -m ernie_train`: how its process begins and ends."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ernie_train.core import processes


def program() -> None:
    """Run the command of this process's arguments, and end the process with its status."""
    if not _has_shown_status(sys.argv[1:]):
        from ernie_train.cli.main import main

        try:
            main()
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            processes.leave(end.code)
    processes.leave(0)


def _has_shown_status(arguments: Sequence[str]) -> bool:
    """Show `status RUN_DIR`, if that is asked; False leaves it to the command, with any mistake.

    People and scripts ask for it again and again, and Typer, with pydantic, would take more than
    half of its time.
    """
    if len(arguments) != 2 or arguments[0] != "status" or arguments[1].startswith("-"):
        return False
    from ernie_train.cli.status import print_status
    from ernie_train.core.terminal import Terminal, show_every_character

    show_every_character()
    try:
        print_status(Path(arguments[1]), Terminal())
    except Exception:  # the command meets it again, and says it in its way
        return False
    return True


if __name__ == "__main__":
    program()
