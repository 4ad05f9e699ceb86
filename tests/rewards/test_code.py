"""The verifier of programs: forms of tests, what counts, whose fault it is."""

import time
from dataclasses import replace

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.sandbox.api import Limits, ProgramResult
from ernie_train.rewards.verifiers import code

ROW = {"entry_point": "f", "tests": [[[1], 2], [[40], 41]]}
ASSERTS = {"tests": ["assert f(1) == 2", "assert f(40) == 41"]}
SCRIPTS = {"tests": [{"input": "1\n", "output": "2\n"}, {"input": "40", "output": "41"}]}
RIGHT = "def f(x):\n    return x + 1"


def graded(source, row=ROW):
    return code.score(row, format_completion("because", source))


@pytest.fixture(autouse=True)
def fresh():
    code._solution_scores.clear()


def test_a_right_program_alone_or_in_a_fenced_block():
    assert graded(RIGHT).status == "correct"
    assert graded(f"Here it is:\n```python\n{RIGHT}\n```\nDone.").status == "correct"
    assert graded(f"```\n{RIGHT}\n```\nor\n```py\nf = 3\n```").status == "wrong"


@pytest.mark.parametrize("row", [ROW, ASSERTS], ids=["calls", "asserts"])
@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    return x + 2",
        "def f(x):\n    return 2",  # right for the first test alone
        "def g(x):\n    return x + 1",
        "def f(x):\n    return str(x + 1)",
        "def f(x)\n    return",
        "",
        "f = 3",
        "def f(x):\n    return x + 1.5 - 0.5 + 1e-3",
        "def f(x):\n    return {1, 2}",
        "def f(x):\n    return float('nan')",
        "def f(x):\n    return f(x)",
    ],
)
def test_programs_that_do_not_do_it_are_wrong(source, row):
    result = graded(source, row)
    assert (result.status, result.value) == ("wrong", 0.0)


def test_values_are_compared_as_json_and_floats_to_within_rounding():
    row = {"entry_point": "f", "tests": [[[], [1, 0.3, None, {"a": 0.3}]]]}
    assert graded("def f():\n    return (1, 0.1 + 0.2, None, {'a': 0.3})", row).status == "correct"
    assert graded("def f():\n    return (1, 0.3001, None, {'a': 0.3})", row).status == "wrong"
    assert graded("def f():\n    return (1, 0.3, None)", row).status == "wrong"
    assert graded("def f():\n    return (1, 0.3, None, {'b': 0.3})", row).status == "wrong"
    row = {"entry_point": "f", "tests": [[[], 1]]}
    assert graded("def f():\n    return True", row).status == "wrong"
    row = {"entry_point": "f", "tests": [[[], 1.5]]}
    assert graded("def f():\n    return 10**400", row).status == "wrong"


def test_scripts_are_compared_line_by_line():
    assert graded("print(int(input()) + 1)", SCRIPTS).status == "correct"
    assert graded("print(int(input()) + 1, ' ')\nprint()", SCRIPTS).status == "correct"
    for wrong in (
        "",
        "print(2)",
        "def f(x):\n    return x + 1",
        "print(int(input()) + 1)\nprint(0)",
        "print(int(input()) + 1)\nexit(1)",
        "print(f'{int(input()) + 1}.0')",
    ):
        assert graded(wrong, SCRIPTS).status == "wrong", wrong


def test_a_test_may_be_a_check_function_with_helpers_of_the_tests_own():
    row = {
        "entry_point": "root",
        "preamble": (
            "import math\nfrom typing import List\n"
            "def poly(xs: List[float], x):\n"
            "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n"
            "def root(xs):\n    ''' the problem '''\n"
        ),
        "tests": (
            "METADATA = {}\ndef check(candidate):\n"
            "    for a in range(1, 5):\n"
            "        assert abs(poly([-a, 1.0], candidate([-a, 1.0]))) < 1e-4\n"
        ),
    }  # fmt: skip
    assert graded("def root(xs: List[float]):\n    return -xs[0] / xs[1]", row).status == "correct"
    # The program's own poly, which says that everything is a root, is not the tests'.
    forged = "def poly(xs, x):\n    return 0\ndef root(xs):\n    return 0"
    assert graded(forged, row).status == "wrong"
    assert graded("", row).status == "wrong"  # the head of the preamble alone
    del row["entry_point"]
    assert graded("", row).status == "bad_gold"


def test_names_of_the_tests_are_the_programs_but_builtins_and_modules_are_not():
    row = {"tests": ["assert math.isclose(f(abs(-1)), len('ab'))"]}
    assert graded(RIGHT, row).status == "correct"
    forged = "len = lambda x: 3\nclass math:\n    isclose = lambda *a: True\n"
    assert graded(forged + "def f(x):\n    return 3", row).status == "wrong"
    # A task may ask for the name of a builtin: its solution or entry_point tells.
    row = {"tests": ["assert sum(10, 15) == 6"]}
    own = "def sum(a, b):\n    return 6"
    assert graded(own, row).status == "bad_gold"
    assert graded(own, row | {"entry_point": "sum"}).status == "correct"
    assert graded(own, row | {"solution": own}).status == "correct"
    assert graded("def sum(a, b):\n    return 7", row | {"solution": own}).status == "wrong"


def test_hidden_tests_count_like_visible_ones():
    hidden = {"hidden_tests": ["assert f(-1) == 0"]}
    only_seen = "def f(x):\n    return {1: 2, 40: 41}[x]"
    assert graded(only_seen, ASSERTS).status == "correct"
    assert graded(only_seen, ASSERTS | hidden).status == "wrong"
    assert graded(RIGHT, ASSERTS | hidden).status == "correct"
    assert graded(only_seen, ROW | {"hidden_tests": [[[-1], 0]]}).status == "wrong"
    script = {"hidden_tests": [{"input": "7", "output": "8"}]}
    assert graded("print({1: 2, 40: 41}[int(input())])", SCRIPTS | script).status == "wrong"


@pytest.mark.parametrize("row", [
    {"entry_point": "f", "tests": [[[n], n + 1] for n in range(4)]},
    {"tests": [f"assert f({n}) == {n + 1}" for n in range(4)]},
    {"tests": [{"input": str(n), "output": str(n + 1)} for n in range(4)]},
], ids=["calls", "asserts", "scripts"])  # fmt: skip
def test_the_pass_rate_where_it_is_asked_for(row):
    source = (
        "def f(x):\n    if x == 1:\n        raise ValueError('one')\n    return x + 1\n"
        "if __name__ == '__main__':\n    print(f(int(input())))"
    )
    result = graded(source, row | {"pass_rate": True})
    assert (result.status, result.value) == ("wrong", 0.75)
    assert result.detail.startswith("3 of 4 tests passed: ") and "ValueError: one" in result.detail
    assert (graded(source, row).status, graded(source, row).value) == ("wrong", 0.0)
    right = graded(source.replace("x == 1", "x == 9"), row | {"pass_rate": True})
    assert (right.status, right.value) == ("correct", 1.0)


@pytest.mark.parametrize(
    "tests",
    [None, [], [[1]], [[1, 2]], 7, [[[1], 2, 3]], "", "assert f(1) ==", ["assert f(1) == 2", "("],
     "[1, 2]",
     "assert 1 + 1 == 2", [{"input": "1"}], [[[1], 2], "assert f(1) == 2"],
     "def check(candidate):\n    assert candidate(1) == 2"],
)  # fmt: skip
def test_unusable_tests_are_bad_gold(tests):
    row = {"tests": tests} if tests != [[1, 2]] else {"tests": tests, "entry_point": "f"}
    assert graded(RIGHT, row).status == "bad_gold"


def test_bad_fields_are_bad_gold():
    assert graded(RIGHT, {"tests": [[[1], 2]]}).status == "bad_gold"
    assert graded(RIGHT, ASSERTS | {"setup": 3}).status == "bad_gold"
    assert graded(RIGHT, ASSERTS | {"setup": "def"}).status == "bad_gold"
    assert graded(RIGHT, ASSERTS | {"setup": "import no_such_module"}).status == "bad_gold"
    assert graded("f = 1", ASSERTS | {"solution": "def"}).status == "bad_gold"


@pytest.mark.parametrize("form", [
    {"entry_point": "f", "tests": [[[1], 2], [[2], 2]]},
    {"tests": ["assert f(1) == 2", "assert f(2) == 2"]},
    {"tests": [{"input": "1", "output": "2"}, {"input": "2", "output": "2"}]},
], ids=["calls", "asserts", "scripts"])  # fmt: skip
def test_tests_that_the_rows_own_solution_fails_are_bad_gold(form):
    source = RIGHT + "\nif __name__ == '__main__':\n    print(f(int(input())))"
    assert graded(source, form).status == "wrong"
    score = graded(source, form | {"solution": source})
    assert score.status == "bad_gold" and "own solution fails" in score.detail


@pytest.mark.parametrize(("body", "wall_s"), [("pass", 20), ("time.sleep(0.01)", 1)])
def test_tests_that_never_end_are_the_rows_fault(monkeypatch, body, wall_s):
    monkeypatch.setattr(api, "DEFAULT_LIMITS", Limits(cpu_s=1, wall_s=wall_s))
    endless = {"tests": [f"import time\nf(1)\nwhile True:\n    {body}"], "solution": RIGHT}
    assert graded(RIGHT, endless).status == "bad_gold"


def test_the_solution_is_tried_once_and_only_when_a_program_fails(monkeypatch):
    ran = []
    run_tests = api.run_tests
    monkeypatch.setattr(api, "run_tests", lambda s, t: ran.append(s) or run_tests(s, t))
    row = ASSERTS | {"solution": RIGHT}
    for source, expected in ((RIGHT + "\n", "correct"), ("f = 1", "wrong"), ("f = 2", "wrong")):
        assert graded(source, row).status == expected
    assert ran == [RIGHT, "f = 1", RIGHT, "f = 2"]


@pytest.mark.parametrize("row", [ROW, ASSERTS], ids=["calls", "asserts"])
def test_the_solution_may_stand_in_a_fenced_block_or_be_empty(row):
    for solution in (f"So:\n```python\n{RIGHT}\n```\n", ""):
        assert graded("def f(x):\n    return 7", row | {"solution": solution}).status == "wrong"
        assert graded(RIGHT, row | {"solution": solution}).status == "correct"
    broken = "```python\ndef f(x):\n    return 7\n```"
    assert graded("f = 1", row | {"solution": broken}).status == "bad_gold"


def test_an_accident_of_the_solution_says_nothing_about_the_completion(monkeypatch):
    outcomes = {
        "f = 1": ProgramResult("failed", [], "slow"),
        RIGHT: ProgramResult("timeout", [], "busy"),
    }
    monkeypatch.setattr(api, "run_tests", lambda source, tests: outcomes[source])
    row = ASSERTS | {"solution": RIGHT}
    assert graded("f = 1", row).status == "timeout"
    outcomes[RIGHT] = ProgramResult("returned", [[True, ""], [True, ""]])
    assert graded("f = 1", row).status == "wrong"  # the accident was not remembered


@pytest.mark.parametrize("kind", ["timeout", "infrastructure"])
def test_accidents_keep_their_name_in_every_form(kind, monkeypatch):
    for name in ("run_calls", "run_tests", "run_script"):
        monkeypatch.setattr(api, name, lambda *arguments: ProgramResult(kind, [], "why"))
    for row in (ROW, ASSERTS, SCRIPTS):
        assert (graded(RIGHT, row).status, graded(RIGHT, row).detail) == (kind, "why")


def test_programs_end_at_their_limits(monkeypatch):
    monkeypatch.setattr(api, "DEFAULT_LIMITS", Limits(cpu_s=1, wall_s=10))
    for row in (ROW, ASSERTS, SCRIPTS):
        score = graded("while True:\n    pass", row)
        assert score.status == "wrong" and "more than 1 s of processor time" in score.detail
    assert graded("#" * 60_000).detail == "a program of 60000 characters"


@pytest.mark.parametrize(("cpu_s", "status"), [(0.01, "wrong"), (0.3, "timeout")])
def test_all_tests_of_a_script_together_are_bounded(monkeypatch, cpu_s, status):
    """A script that sleeps is wrong; one that works on too many tests was not graded."""
    monkeypatch.setattr(code, "_ALL_SCRIPTS_S", 0.2)
    ran = []

    def run(source, stdin):
        ran.append(stdin)
        time.sleep(0.15)
        return ProgramResult("returned", [f"{int(stdin) + 1}\n"], cpu_s=cpu_s)

    monkeypatch.setattr(api, "run_script", run)
    score = graded("...", {"tests": SCRIPTS["tests"] * 6, "pass_rate": True})
    assert score.status == status and "of 12 tests took" in score.detail
    assert len(ran) == 2


def test_a_program_that_takes_seconds_and_one_that_writes_megabytes_are_right():
    slow = "import time\nwhile time.process_time() < 2.2:\n    pass\nprint(int(input()) + 1)"
    assert graded(slow, SCRIPTS | {"tests": SCRIPTS["tests"][:1]}).status == "correct"
    lines = "\n".join(map(str, range(300_000)))
    long = {"tests": [{"input": "", "output": lines}]}
    assert graded("for i in range(300_000):\n    print(i)", long).status == "correct"


NUMPY = "import numpy as np\ndef f(x):\n    return np.array([x, 1]).sum()\nprint(f(int(input())))"


@pytest.mark.skipif(api.current_layer().numpy is None, reason="the sandbox cannot read numpy")
def test_programs_and_tests_may_use_numpy(layer):
    function = NUMPY.rpartition("\n")[0]
    assert graded(NUMPY, SCRIPTS).status == "correct"
    assert graded(function).status == "correct"
    assert graded(function.replace("1]", "2]")).status == "wrong"
    assert graded(function, ASSERTS).status == "correct"
    row = {"tests": ["assert np.allclose(f(1), np.array([2.0]))"], "entry_point": "f"}
    assert graded(function, row).status == "correct"
    forged = "class np:\n    allclose = array = lambda *values: True\ndef f(x):\n    return 0"
    assert graded(forged, row).status == "wrong"


def test_where_the_sandbox_cannot_read_numpy_no_program_is_blamed_for_it(monkeypatch):
    layer = replace(api.current_layer(), numpy=None)
    monkeypatch.setattr(api, "current_layer", lambda: layer)
    for row in (ROW, ASSERTS, SCRIPTS, ROW | {"pass_rate": True}):
        score = graded(NUMPY, row)
        assert score.status == "infrastructure" and "numpy" in score.detail
        assert graded("import no_such_library\n" + NUMPY, row).status == "wrong"


def test_no_sandbox_is_no_verdict(monkeypatch):
    def refuse():
        raise api.SandboxUnavailable("none works")

    monkeypatch.setattr(api, "current_layer", refuse)
    with pytest.raises(api.SandboxUnavailable):
        graded(RIGHT)


def test_tests_that_ask_nothing_of_the_program_are_bad():
    for test in (
        "if __name__ == '__main__':\n    assert f(1) == 2",
        "class Tests:\n    def test_f(self):\n        assert f(1) == 2",
        "def verify():\n    assert f(1) == 2",
    ):
        assert graded("def f(x):\n    return 7", {"tests": [test]}).status == "bad_gold"


def test_the_setup_may_ask_for_the_tests():
    row = {"setup": "value = f(1)", "tests": ["assert value == 2"], "entry_point": "f"}
    assert graded(RIGHT, row).status == "correct"
    assert graded("def f(x):\n    return 7", row).status == "wrong"


def test_functions_named_test_are_called():
    row = {"tests": ["def test_f():\n    assert f(1) == 2", "def test_g():\n    assert f(2) == 3"]}
    assert graded(RIGHT, row).status == "correct"
    assert graded("def f(x):\n    return 2", {**row, "pass_rate": True}).value == 0.5


def test_an_exception_of_the_programs_own_class_counts_as_the_builtin_that_it_extends():
    source = "class Bad(ValueError): pass\ndef f(x):\n    raise Bad('no')"
    test = "try:\n    f(1)\n    raise SystemError\nexcept {}:\n    pass"
    assert graded(source, {"tests": [test.format("ValueError")]}).status == "correct"
    assert graded(source, {"tests": [test.format("KeyError")]}).status == "wrong"


@pytest.mark.parametrize(
    ("written", "expected", "status"),
    [
        ("1.4142135623730951", "1.414213562", "correct"),
        ("a 0.50 \n\n", "a 0.5", "correct"),
        ("3", "3.0", "correct"),
        ("1e-17", "0.000", "correct"),
        ("1.414220", "1.414213562", "wrong"),
        ("nan", "1.5", "wrong"),
        ("3.0", "3", "wrong"),
        ("1 2", "1  2", "wrong"),
        ("0.5 0.5", "0.5", "wrong"),
        ("2e500", "1.5e400", "wrong"),
        ("2e500", "1.5", "wrong"),
    ],
)
def test_decimals_of_a_script_are_compared_to_within_rounding(written, expected, status):
    row = {"tests": [{"input": "", "output": expected}]}
    assert graded(f"print({written!r})", row).status == status


@pytest.mark.parametrize(
    "source",
    [
        "import threading, time\ndef g():\n    time.sleep(0.05)\n    print(int(input()) + 1)\n"
        "threading.Thread(target=g).start()",
        "import atexit\natexit.register(lambda: print(int(input()) + 1))",
    ],
)
def test_a_script_ends_with_its_threads_and_its_exit_functions(source):
    assert graded(source, SCRIPTS).status == "correct"


def test_the_method_of_a_class_solution_is_called():
    source = "class Solution:\n    def f(self, x):\n        return x + 1"
    assert graded(source).status == "correct"


def test_a_block_of_output_behind_the_program_is_not_the_program():
    assert graded(f"```python\n{RIGHT}\n```\nIt prints:\n```\n2\n```").status == "correct"
