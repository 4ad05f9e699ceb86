"""The program `ernie-train`, also `python -m ernie_train`: how its process begins and ends."""

from ernie_train.cli.main import main
from ernie_train.core import processes
from ernie_train.core.cpu import defer_imports


def program() -> None:
    """Run the command of this process's arguments, and end the process with its status."""
    defer_imports()
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        processes.leave(end.code)
    processes.leave(0)


if __name__ == "__main__":
    program()
