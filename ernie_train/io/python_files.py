"""Find and load what a recipe names in a user's file, such as `my_rewards.py:score`."""

from __future__ import annotations

import functools
import importlib.util
import symtable
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ernie_train.core.errors import UserError
from ernie_train.core.foreign_files import read_text


def find_definition(text: str, base_directory: Path, what: str, example: str) -> tuple[str, str]:
    """Return the file and the name of "file.py:name"; a relative path is from `base_directory`.

    The file is parsed and not run. Messages begin with `what` it is to be, such as "reward".

    Raises:
        UserError: the file does not exist, is not Python, or does not define the name.
    """
    file_name, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise UserError(f"{what} {text!r}: expected {example}")
    file = (base_directory / Path(file_name).expanduser()).resolve()
    try:
        table = symtable.symtable(read_text(file), str(file), "exec")
    except SyntaxError as error:
        raise UserError(f"{what} {text!r}: {file}:{error.lineno}: {error.msg}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{what} {text!r}: cannot read {file}: {error}") from None
    names = [s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()]
    if name not in names:
        known = ", ".join(names) or "nothing"
        raise UserError(f"{what} {text!r}: {file} defines no {name}; it defines {known}")
    return str(file), name


def load_definition(file: str, name: str) -> Any:
    """Run a file, once in a process, and return what it defines under `name`.

    It can import modules of its own directory. Raises what the file raises.
    """
    return getattr(run_file(file), name)


@functools.cache
def run_file(file: str) -> ModuleType:
    """Run a file, once in a process, as `load_definition` does; return it as a module."""
    path = Path(file)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"user_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
