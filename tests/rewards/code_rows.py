"""Rows of the verifier of programs, and its verdict on a program."""

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.verifiers import code

ROW = {"entry_point": "f", "tests": [[[1], 2], [[40], 41]]}
ASSERTS = {"tests": ["assert f(1) == 2", "assert f(40) == 41"]}
SCRIPTS = {"tests": [{"input": "1\n", "output": "2\n"}, {"input": "40", "output": "41"}]}
LINES = {"inputs": ["1\n", "40\n"], "outputs": ["2\n", "41\n"]}
CALLS = {"fn_name": "f", "inputs": [[1], [40]], "outputs": [[2], [41]]}
RIGHT = "def f(x):\n    return x + 1"


def graded(source, row=ROW):
    return code.score(row, format_completion("because", source))
