"""Whose the names in a row's tests are, and whose fault it is that one is missing."""

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.verifiers import code

RIGHT = "def f(x):\n    return x + 1"


def graded(source, row):
    return code.score(row, format_completion("because", source))


@pytest.mark.parametrize(("test", "forged", "right"), [
    ("assert Counter(f(2)) == Counter([1, 2])", "Counter = lambda *values: 0",
     "def f(x):\n    return [2, 1]"),
    ("assert sqrt(f(2)) == 2", "sqrt = lambda x: 2", "def f(x):\n    return 4"),
    ("assert deepcopy(f(2)) == [7]", "deepcopy = lambda x: [7]", "def f(x):\n    return [7]"),
    ("kinds: List[int] = f(2)\nassert kinds == [7]", "List = {int: 0}",
     "def f(x):\n    return [7]"),
    ("assert OrderedDict(f(2)) == OrderedDict({1: 2})", "OrderedDict = lambda x: 0",
     "def f(x):\n    return {1: 2}"),
    ("assert fmean(f(2)) == 2", "fmean = lambda x: 2", "def f(x):\n    return [2]"),
])  # fmt: skip
def test_a_program_does_not_answer_for_a_library(test, forged, right):
    """The imports stand in the prompt alone, or in the row's own solution."""
    row = {"tests": [test], "entry_point": "f"}
    if "fmean" in test:
        row["solution"] = f"from statistics import fmean\n{right}"
    assert graded(f"from statistics import *\n{right}", row).status == "correct"
    assert graded(f"{forged}\ndef f(x):\n    return 0", row).status == "wrong"


def test_a_function_with_the_name_of_a_librarys_is_asked_for_by_itself_or_by_name():
    row = {"tests": ["assert gcd(10, 15) == 7"]}
    own = "def gcd(a, b):\n    return 7"
    assert graded(own, row).status == "correct"
    two = {"tests": ["assert gcd(f(10), 15) == 7"]}
    forged = f"{own}\ndef f(x):\n    return x"
    assert graded(forged, two).status == "wrong"
    assert graded(forged, two | {"entry_point": "gcd"}).status == "correct"
    assert graded(forged, two | {"solution": forged}).status == "correct"


def test_tests_may_import_the_program_as_solution():
    row = {"tests": "from solution import f, K\ndef test_f():\n    assert f(1) == K.two\n"}
    assert graded(RIGHT + "\nclass K:\n    two = 2", row).status == "correct"
    assert graded(RIGHT, row).status == "wrong"


@pytest.mark.parametrize("test", [
    "assert all(map(lambda x: f(x) == want[x], cases))",
    "assert all(map(f, cases))",
    "assert not list(filter(lambda x: f(x) != want[x], cases))",
    "assert not [x for x in map(lambda x: f(x) != want[x], cases) if x]",
])  # fmt: skip
@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration"])
def test_an_exception_of_the_program_ends_no_loop_of_the_tests(test, name):
    row = {"setup": "cases = [1, 2]\nwant = {1: 2, 2: 3}", "tests": [test], "entry_point": "f"}
    assert graded(RIGHT, row).status == "correct"
    assert graded(f"def f(x):\n    raise {name}", row).status == "wrong"


def test_iterators_of_the_program_end_as_iterators_do():
    row = {"tests": ["assert list(f(2)) == [0, 1]", "it = f(0)\nassert next(it, 7) == 7"]}
    assert graded("def f(n):\n    yield from range(n)", row).status == "correct"


@pytest.mark.parametrize("source", ["pass", "", "Stack = 3", "def Stack(:", "class Other: pass"])
def test_a_program_that_lacks_what_the_setup_uses_is_wrong(source):
    row = {"setup": "stack = Stack()\nstack.push(1)", "tests": ["assert stack.pop() == 1"]}
    right = (
        "class Stack:\n    def push(self, x):\n        self.x = x\n"
        "    def pop(self):\n        return self.x\n"
    )
    for more in ({}, {"entry_point": "Stack"}, {"solution": right}):
        assert graded(right, row | more).status == "correct"
        assert graded(source, row | more).status == "wrong", more
    guarded = {"tests": ["if 'f' in globals():\n    assert f(1) == 2"]}
    assert graded(source, guarded).status == "wrong"


def test_tests_that_need_a_library_that_is_not_there_are_the_rows_fault():
    for test in ("import no_such_library\nassert f(1) == 2", "assert pd.isna(f(1))"):
        for source in (RIGHT, "f = 3", "def f(x):\n    return 0"):
            score = graded(source, {"tests": ["assert f(0) == 1", test]})
            assert score.status == "bad_gold" and "has no library" in score.detail
    optional = "try:\n    import no_such_library\nexcept ImportError:\n    pass\nassert f(1) == 2"
    assert graded(RIGHT, {"tests": [optional]}).status == "correct"


def test_a_test_that_fails_before_it_asks_is_the_rows_fault_unless_its_solution_passes():
    row = {"tests": ["assert {}['a'] == f(1)"]}
    assert graded(RIGHT, row).status == "bad_gold"
    peeking = {"tests": ["assert 'f' in dir() and g.__name__ and f(1) == 2"], "entry_point": "f"}
    assert graded(RIGHT, peeking).status in ("wrong", "bad_gold")
