"""Grade with a user's function in a file: `reward: {python: my_rewards.py:score}`."""

import ast
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ernie_train.core.errors import UserError
from ernie_train.core.foreign_files import read_text
from ernie_train.rewards.score import Score


@dataclass(frozen=True)
class UserReward:
    """Call `function(row, completion)` of `file`: a number from 0 to 1, a boolean or a Score.

    It runs in the scoring processes, one completion at a time. A failure (an error, NaN, a number
    out of range, another type) is "infrastructure" for that completion, with the reason, and never
    a silent zero. One that takes longer than `deadline_s` seconds (None: the service's limit), as
    some regular expressions do on some texts, is "timeout".
    """

    file: str
    function: str
    deadline_s: float | None = None

    @property
    def label(self) -> str:
        return self.function

    def __call__(self, row: dict[str, Any], completion: str) -> Score:
        try:
            return as_score(_load(self.file, self.function)(row, completion))
        except Exception as error:  # a user's code may raise anything
            where = f"{Path(self.file).name}:{self.function}"
            return Score.infrastructure(f"{where}: {type(error).__name__}: {str(error)[:200]}")


def find_user_reward(text: str, base_directory: Path, timeout_s: float | None = None) -> UserReward:
    """Read "file.py:function"; a relative path is taken from `base_directory`.

    The file is parsed and not run. Raises UserError if the file does not exist, is not Python or
    does not define the function.
    """
    name, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier():
        raise UserError(f"reward {text!r}: expected file.py:function, like my_rewards.py:score")
    file = (base_directory / Path(name).expanduser()).resolve()
    try:
        tree = ast.parse(read_text(file))
    except SyntaxError as error:
        raise UserError(f"reward {text!r}: {file}:{error.lineno}: {error.msg}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"reward {text!r}: cannot read {file}: {error}") from None
    names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    names += [target.id for target in targets if isinstance(target, ast.Name)]
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    names += [alias.asname or alias.name for n in imports for alias in n.names]
    if function not in names:
        known = ", ".join(names) or "nothing"
        raise UserError(f"reward {text!r}: {file} defines no {function}; it defines {known}")
    return UserReward(str(file), function, timeout_s)


def as_score(result: Any) -> Score:
    """Convert the result of a user's function to a Score.

    Raises ValueError for NaN and for a number outside of 0 to 1, TypeError for another type.
    """
    if isinstance(result, Score):
        if not 0 <= result.value <= 1:
            raise ValueError(f"a reward must be a number from 0 to 1, not {result.value!r}")
        return result
    # NumPy scalars are not Python booleans; their `item` is.
    value = result.item() if hasattr(result, "item") else result
    if not isinstance(value, Real):
        raise TypeError(f"it gave {type(result).__name__}, not a number, a boolean or a Score")
    return Score.marked(float(value))


@functools.cache
def _load(file: str, function: str) -> Callable[[dict[str, Any], str], Any]:
    path = Path(file)
    # The file can import modules of its own directory.
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Callable[[dict[str, Any], str], Any] = getattr(module, function)
    return found
