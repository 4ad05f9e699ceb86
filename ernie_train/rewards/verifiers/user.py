"""Grade with a user's function in a file: `reward: {python: my_rewards.py:score}`."""

from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from ernie_train.io.python_files import find_definition, load_definition
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

    def __call__(self, row: dict[str, Any], completion: str) -> Score:
        try:
            return as_score(load_definition(self.file, self.function)(row, completion))
        except Exception as error:  # a user's code may raise anything
            where = f"{Path(self.file).name}:{self.function}"
            return Score.infrastructure(f"{where}: {type(error).__name__}: {str(error)[:200]}")


def find_user_reward(text: str, base_directory: Path, timeout_s: float | None = None) -> UserReward:
    """Read "file.py:function", as `find_definition` does, with its errors."""
    example = "file.py:function, like my_rewards.py:score"
    return UserReward(*find_definition(text, base_directory, "reward", example), timeout_s)


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
