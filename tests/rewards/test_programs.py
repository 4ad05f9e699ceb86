"""The program of a response: fences of every form, helpers, drafts and examples."""

import time

import pytest

from ernie_train.data.completion_format import format_completion
from ernie_train.rewards import REWARDS
from ernie_train.rewards.verifiers.programs import fenced_blocks, program_of

TWICE = "def twice(x):\n    return 2 * x"
ROW = {"entry_point": "twice", "tests": [[[3], 6], [[0], 0]]}


def indented(text, by):
    return "\n".join(by + line for line in text.splitlines())


FORMS = {
    "shell_first": f"```bash\npython a.py\n```\n\n```python\n{TWICE}\n```",
    "json_first": f'```json\n{{"x": 3}}\n```\nand\n```py\n{TWICE}\n```',
    "output_after": f"```python\n{TWICE}\n```\nOutput:\n```text\n6\n```",
    "in_a_quote": "So:\n" + indented(f"```python\n{TWICE}\n```", "> ") + "\n\nDone.",
    "in_a_quoted_list": indented(f"- a\n- ~~~py\n{indented(TWICE, '  ')}\n~~~", ">"),
    "notebook": f"```ipython3\n{TWICE}\n```",
    "in_a_list": "1. So:\n\n" + indented(f"```python\n{TWICE}\n```", "   "),
    "behind_a_bullet": "- ```python\n" + indented(f"{TWICE}\n```", "  "),
    "tabs": indented(f"```python\n{TWICE}\n```", "\t"),
    "tildes": f"~~~python\n{TWICE}\n~~~",
    "long_fence": f"````python\n{TWICE}\n````",
    "attributes": f'```python title="a.py" linenums="1"\n{TWICE}\n```',
    "braces": f"```{{.python .numberLines}}\n{TWICE}\n```",
    "capital": f"``` Python\n{TWICE}\n```",
    "carriage_returns": f"```python\n{TWICE}\n```".replace("\n", "\r\n"),
    "unclosed": f"Here:\n```python\n{TWICE}",
    "unclosed_before": f"```\nsome text\n```python\n{TWICE}\n```",
    "closed_behind_code": f"```python\n{TWICE}```\nDone.",
    "opened_behind_words": f"The code: ```python\n{TWICE}\n```",
    "fence_in_docstring": '```python\ndef twice(x):\n    """Doubles.\n\n    ```\n    twice(1)\n'
    '    ```\n    """\n    return 2 * x\n```',
    "bare": TWICE,
    "bare_with_fence_in_docstring": 'def twice(x):\n    """\n```python\ntwice(1)\n```\n"""\n'
    "    return 2 * x",
    "usage": f"```python\n{TWICE}\n```\nUsage:\n```python\nassert twice(1) == 3\n```",
    "session": f"```python\n{TWICE}\n```\n```python\n>>> twice(2)\n4\n```",
    "helper_before": "```python\ndef add(a, b):\n    return a + b\n```\nthen\n"
    "```python\ndef twice(x):\n    return add(x, x)\n```",
    "helper_after": "```python\ndef twice(x):\n    return add(x, x)\n```\nwith\n"
    "```python\ndef add(a, b):\n    return a + b\nprint(nothing)\n```",
    "helper_of_a_helper": "```python\nimport math\n```\n```python\ndef add(a, b):\n"
    "    return int(math.fsum([a, b]))\n```\n```python\ndef twice(x):\n    return add(x, x)\n```",
    "constant": "```python\nFACTOR = 2\n```\n```python\ndef twice(x):\n    return FACTOR * x\n```",
    "draft": f"```python\ndef twice(x):\n    return 3 * x\n```\nNo:\n```python\n{TWICE}\n```",
    "unnamed": f"```\n{TWICE}\n```\n\n```\n6\n```",
    "unnamed_and_usage": f"```\n{TWICE}\n```\n```python\nprint(twice(2))\n```",
    "method": "```python\nclass Solution:\n    def twice(self, x):\n        return 2 * x\n```\n"
    "```python\nprint(Solution().twice(2))\n```",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_right_program_is_found_in_every_form(form):
    score = REWARDS["code"](ROW, format_completion("r", FORMS[form]))
    assert score.status == "correct", score.detail


@pytest.mark.parametrize(
    "response",
    [
        f"```python\n{TWICE}\n```\nBetter:\n```python\ndef twice(x):\n    return x\n```",
        "```python\ndef twice(x):\n    return x\n```\n```python\nprint(twice(2))\n```",
        f"```javascript\n{TWICE}\n```",
        "```python\nprint(6)\n```",
        "```python\n```",
    ],
)
def test_no_other_program_is_taken_for_it(response):
    assert REWARDS["code"](ROW, format_completion("r", response)).status == "wrong"


READS = "n = int(input())\nprint(2 * n)"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (f"```python\n{READS}\n```\nInput:\n```\n3\n```", READS),
        (f"```python\n{READS}\n```\nLike:\n```python\nprint(2 * 3)\n```", READS),
        (f"```python\nprint(input())\n```\nor\n```python\n{READS}\n```", READS),
        (
            "```python\ndef main():\n    print(int(input()))\n```\n```python\nmain()\n```",
            "def main():\n    print(int(input()))\n\nmain()",
        ),
    ],
)
def test_of_several_scripts_the_last_that_reads_its_input_counts(response, program):
    assert program_of(response) == program


@pytest.mark.parametrize("status", ["correct", "wrong"])
def test_functional_tests_are_calls_of_json_values(status):
    test = {"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}
    change = {"correct": "+", "wrong": "-"}[status]
    source = (
        f"class Solution:\n    def shift(self, xs, k):\n        return [x {change} k for x in xs]"
    )
    row = {"entry_point": "shift", "tests": [test]}
    assert REWARDS["code"](row, format_completion("r", source)).status == status


def test_a_functional_test_that_cannot_be_called_is_bad_gold():
    test = {"input": "no json", "output": "4", "testtype": "functional"}
    for row in ({"entry_point": "f", "tests": [test]}, {"tests": [{**test, "input": "3"}]}):
        assert REWARDS["code"](row, format_completion("r", "def f(x):\n    return 4")).status == (
            "bad_gold"
        )


@pytest.mark.parametrize(
    ("value", "expected", "status"),
    [("10 ** 400", 1.5, "wrong"), ("1.5", 1.5, "correct"), ("10 ** 400", 10**400, "correct")],
)
def test_numbers_beyond_a_float_are_compared_and_fail_nothing(value, expected, status):
    row = {"entry_point": "f", "tests": [[[], expected]]}
    source = f"def f():\n    return {value}"
    assert REWARDS["code"](row, format_completion("r", source)).status == status


@pytest.mark.parametrize(("printed", "status"), [("1.0e400", "wrong"), ("2.0e999", "correct")])
def test_decimals_beyond_a_float_are_not_all_equal(printed, status):
    row = {"tests": [{"input": "", "output": "2.0e999"}]}
    assert REWARDS["code"](row, format_completion("r", f"print('{printed}')")).status == status


@pytest.mark.parametrize(
    "text",
    ["```python\n" * 9000, "```\n" * 20_000, "```python\n" + "-" * 40_000 + "1\n```\n```\nf=1\n```",
     "".join(f"```py\ndef f{i}(): return f{i + 1}()\n```\n" for i in range(2000)),
     "x```py" * 15_000],
)  # fmt: skip
def test_hostile_fences_take_little_time(text):
    started = time.monotonic()
    program_of(text, ["f0"])
    assert time.monotonic() - started < 5


def test_languages_and_code_of_blocks():
    # The body of a function that the row begins keeps its indentation.
    text = "```C++ x\n  a\n   b\n```\n~~~\n```\n~~~\n```py"
    assert list(fenced_blocks(text)) == [("c++", "  a\n   b"), ("", "```"), ("py", "")]
