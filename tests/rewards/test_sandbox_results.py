"""What comes back from programs and from the tests of rows."""

import pytest

from ernie_train.rewards.sandbox.api import Tests, run_calls, run_script, run_tests
from tests.rewards.sandboxes import RIGHT


def test_calls_return_values_and_errors(layer):
    outcome = run_calls("def f(x):\n    return 6 / x", "f", [[4], [0]])
    assert outcome.kind == "returned"
    assert outcome.values == [["value", 1.5], ["error", "ZeroDivisionError: division by zero"]]


def test_calls_do_not_see_each_others_changes(layer):
    source = "def f(x):\n    x.append(1)\n    return x"
    assert run_calls(source, "f", [[[0]], [[0]]]).values == [["value", [0, 1]]] * 2


def test_a_script_reads_and_writes_the_standard_streams(layer):
    source = "import os, sys\nn = int(input())\nprint(n + 1, flush=True)\nos.write(1, b'raw')\n"
    assert run_script(source + "sys.stdout.write(open(0).read())", "4\nrest").values == ["5\nraw"]
    echo = "import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])\nexit()"
    assert run_script(echo, "ab\nü€\n").values == ["ba\n€ü\n"]


@pytest.mark.parametrize(
    "end", ["exit(3)", "1 / 0", "raise SystemExit('no')", "import os\nos._exit(1)"]
)
def test_a_script_that_does_not_end_well_has_failed(end):
    assert run_script(f"print(5)\n{end}", "").kind == "failed"
    assert run_script("print(5)\nraise SystemExit", "").values == ["5\n"]


def test_tests_see_exact_values_of_plain_types(layer):
    values = (
        "(1, [2.5, None], 'ü')", "{1, 2}", "frozenset({3})", "{1: 'a', (2, 3): True}", "b'\\x00x'",
        "1 << 70", "-(3 ** 50)", "1e300", "complex(0.1, -0.0)", "range(3)", "''",
        "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('0.10')",
        "__import__('datetime').date(2024, 2, 29)", "__import__('collections').deque([1])",
    )  # fmt: skip
    tests = [f"v = f({n}); assert v == {v} and type(v) is type({v})" for n, v in enumerate(values)]
    outcome = run_tests(f"def f(n):\n    return [{', '.join(values)}][n]", Tests(tests, ["f"]))
    assert outcome.values == [[True, ""]] * len(values)
    nan = Tests(["import math", "assert math.isnan(f()) and f() != f()"], ["f"])
    assert run_tests("def f():\n    return float('nan')", nan).values == [[True, ""]] * 2


def test_tests_use_the_objects_of_the_program(layer):
    source = (
        "class Node:\n    def __init__(self, value):\n        self.value, self.next = value, None\n"
        "    def __len__(self):\n        return 1 + (len(self.next) if self.next else 0)\n"
        "    def __getitem__(self, i):\n        return self.value + i\n"
        "def total(node):\n    return node.value + (total(node.next) if node.next else 0)\n"
        "def count(n):\n    yield from range(n)\n"
    )
    tests = Tests(
        setup="head = Node(1)\nhead.next = Node(value=2)\n",
        tests=[
            "assert total(head) == 3", "assert head.next.value == 2", "assert len(head) == 2",
            "assert head[4] == 5", "assert list(count(3)) == [0, 1, 2]",
            "assert [total(n) for n in [head, head.next]] == [3, 2]",
            "assert Node(1) != Node(1) and head.next is not None",
        ],
        names=["Node", "total", "count"],
    )  # fmt: skip
    assert run_tests(source, tests).values == [[True, ""]] * 7


def test_the_exceptions_of_the_program_reach_the_tests():
    expecting = "try:\n    f(0)\nexcept {}:\n    caught = True\nelse:\n    raise ValueError\n"
    source = "def f(x):\n    if x:\n        raise AssertionError\n    raise KeyError('k')"
    tests = ["KeyError", "LookupError", "ValueError"]
    outcome = run_tests(source, Tests([expecting.format(t) for t in tests], ["f"]))
    assert [passed for passed, _ in outcome.values] == [True, True, False]
    forged = expecting.format("AssertionError").replace("f(0)", "f(1)")
    assert run_tests(source, Tests([forged], ["f"])).values[0][0] is False


def test_a_test_that_catches_everything_does_not_hide_the_end_of_the_program():
    catching = "try:\n    f(1)\nexcept BaseException:\n    pass"
    outcome = run_tests("import os\ndef f(x):\n    os._exit(0)", Tests([catching] * 2, ["f"]))
    assert [passed for passed, _ in outcome.values] == [False, False]


def test_unittest_cases_count_by_method():
    case = (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_a(self):\n        self.assertEqual(f(1), 2)\n"
        "    def test_b(self):\n        self.assertEqual(f(1), 3)\n"
        "    def test_c(self):\n        with self.assertRaises(TypeError):\n            f('a')\n"
        "    def test_d(self):\n        self.skipTest('later')\n"
    )
    outcome = run_tests(RIGHT, Tests([case, "assert f(0) == 1"], ["f"]))
    assert [passed for passed, _ in outcome.values] == [True, False, True, False, True]


def test_a_setup_that_fails_is_the_rows_fault_unless_the_program_had_a_hand_in_it():
    tests = Tests(["assert f(1) == 2"], ["f"], setup="import no_such_module")
    outcome = run_tests(RIGHT, tests)
    assert outcome.kind == "bad_tests" and "no_such_module" in outcome.detail
    tests = Tests(["assert f(1) == 2"], ["f"], setup="first = f('x')")
    assert run_tests(RIGHT, tests).values[0][0] is False
