"""Tools answer right, within their bounds, and whatever they are called with."""

from __future__ import annotations

import ast
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.core.errors import ConfigError, DataError, UserError
from ernie_train.data import ChatFormat, ChatTemplate, Record, Tokenizer, load_tokenizer
from ernie_train.environments import EnvironmentConfig, Toolbox, ToolEnvironment, build_toolbox
from ernie_train.environments.calculator import Calculator, calculator
from ernie_train.environments.tool import Signature, ToolError
from ernie_train.environments.user_worker import FileTools
from tests.environments.conftest import TOKENIZER, answer, calls

MY_TOOLS = '''
import os, time

_private = "no tool"

def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first
        b (int): the second
    """
    return a + b

def hang() -> str:
    """Never end."""
    while True:
        time.sleep(1)

def shout() -> str:
    """Write a lot."""
    os.write(1, b"y" * 1_000_000)
    return "<html>\\x1b[31m" + "x" * 20_000_000

def die() -> str:
    """End the process."""
    os._exit(3)

def leave() -> str:
    """Exit."""
    raise SystemExit(0)

def odd() -> object:
    """Return something that is no text."""
    return {"a": [1, {2}]}
'''


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toolbox]:
    root = tmp_path_factory.mktemp("tools")
    (root / "my_tools.py").write_text(MY_TOOLS)
    tools = ["calculator", "python", "lookup", {"python": "my_tools.py"}]
    config = EnvironmentConfig(tools=tools, max_tool_seconds=2.0, max_tool_tokens=64)
    toolbox = build_toolbox(config, load_tokenizer(TOKENIZER), root)
    yield toolbox
    toolbox.close()


def step(environment, name, **arguments):
    """The result of one call, and whether it failed."""
    result = environment.step(calls((name, arguments)))
    (message,), (failed,) = result.messages, result.failed
    assert not result.done and message["role"] == "tool" and message["name"] == name
    return message["content"], failed


def begun(box, **fields):
    environment = ToolEnvironment(box)
    asked = [{"role": "user", "content": "?"}]
    assert environment.reset(Record("prompt", asked, fields=fields)) == asked
    return environment


# ---- the calculator ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1234 * 5678", "7006652"), ("0.1 + 0.2", "0.3"), ("1 / 3", "1/3"), ("-7 // 2", "-4"),
        ("-5 % 3", "1"), ("2 ** -3", "0.125"), ("-0.05 * 1", "-0.05"), ("(2 + 3) * 4", "20"),
        ("3 \u00d7 4 \u00f7 2", "6"), ("0 ** 0", "1"), ("(-1) ** 99999999999", "-1"),
        ("1e3", "1000"), ("--5", "5"), ("2 ** 100", str(2**100)),
    ],
)  # fmt: skip
def test_the_calculator_is_exact(expression, expected):
    assert calculator(expression) == expected


numbers = st.integers(0, 9999).map(str) | st.decimals(0, 99, places=2).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: f"({' '.join(t)})"
    ),
    max_leaves=8,
)


@given(expressions)
def test_the_calculator_agrees_with_fractions(expression):
    """Referee: the same tree over Fractions of its literals."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(expression, node))
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        kinds = {ast.Add: "__add__", ast.Sub: "__sub__", ast.Mult: "__mul__"}
        if isinstance(node.op, ast.Div):
            return left / right
        return getattr(left, kinds[type(node.op)])(right)

    try:
        expected = value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="division by zero"):
            calculator(expression)
        return
    assert Fraction(calculator(expression)) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "10**10**10", "9**9**9", "2 ** 99999999", "1e99999", "7 % 0", "1 / 0", "0 ** -1", "(" * 390,
        "__import__('os').system('id')", "True + 1", "x", "", "1 +", "2 ^ 3", "9 if 1 else 2",
        "[1] * 9", "'a' * 9999999", "1,000", "5j", "0x10", "1" * 401, "2 ** 0.5", "lambda: 1",
        "\0", "\ud800", "99999999999 ** 999", "f'{1}'", "1e5 ** 1e5",
    ],
)  # fmt: skip
def test_the_calculator_refuses_at_once(expression):
    started = time.process_time()
    with pytest.raises(ToolError):
        calculator(expression)
    assert time.process_time() - started < 0.5


# ---- look-up -------------------------------------------------------------------------------------


def test_lookup_reads_the_row_s_table(box):
    environment = begun(box, table={"pen": "3", "ink": {"price": 4}})
    assert step(environment, "lookup", key=" pen ") == ("3", False)
    assert step(environment, "lookup", key="ink") == ('{"price": 4}', False)
    told, failed = step(environment, "lookup", key="cup")
    assert failed and told == "error: the table has no entry 'cup'; it has pen, ink"


def test_lookup_is_offered_to_rows_with_a_table_alone(box):
    told, failed = step(begun(box), "lookup", key="pen")
    assert failed and "there is no tool of this name, only add, calculator" in told
    with pytest.raises(DataError, match="table must be an object"):
        begun(box, table=[1, 2])


# ---- Python --------------------------------------------------------------------------------------


def test_python_keeps_variables_for_one_episode(box):
    environment = begun(box)
    assert step(environment, "python", code="x = 3\nprint('hello')\nx + 1") == ("hello\n4", False)
    assert step(environment, "python", code="y = x * 2\ny") == ("6", False)
    told, failed = step(environment, "python", code="print(y)\ny / 0")
    assert failed and told == "error: 6\nline 2: ZeroDivisionError: division by zero"
    assert step(environment, "python", code="x, y") == ("(3, 6)", False)
    assert "NameError" in step(begun(box), "python", code="x")[0], "another episode has its own"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("while True: pass", "error: not finished after 2 s"),
        ("print('z' * 100_000_000)", "zzzz"),
        ("import os\nos.write(1, b'a' * 10_000_000)", "bytes of output"),
        ("import os\nos._exit(0)", "ended itself"),
        ("raise SystemExit", ""),
        ("open('/etc/passwd').read()", "Error"),
        ("import socket\nsocket.socket()", "Error"),
        ("import os\nos.fork()", "Error"),
        ("import os\nos.environ['HOME']", "KeyError"),
        ("def f(:", "SyntaxError"),
        ("x = [0] * 10**10", "MemoryError"),
    ],
)  # fmt: skip
def test_hostile_cells_answer_and_cost_no_variable(box, code, told):
    environment = begun(box)
    step(environment, "python", code="kept = 41")
    found, _ = step(environment, "python", code=code)
    assert told in found and len(found) < 1000
    assert step(environment, "python", code="kept + 1") == ("42", False)


# ---- a user's file -------------------------------------------------------------------------------


def test_schemas_come_from_types_and_docstrings(box):
    assert set(box.tools) == {
        "calculator", "python", "lookup", "add", "hang", "shout", "die", "leave", "odd"
    }  # fmt: skip
    assert box.tools["add"].schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the first"},
                    "b": {"type": "integer", "description": "the second", "default": 2},
                },
                "required": ["a"],
            },
        },
    }


def test_a_user_s_function_answers_or_tells_what_went_wrong(box):
    environment = begun(box)
    assert step(environment, "add", a=1) == ("3", False)
    assert "is no JSON: Object of type set is not JSON" in step(environment, "odd")[0]
    assert step(environment, "add", a="q")[0].startswith("error: a: Input should be a valid int")
    assert step(environment, "add", c=1)[0].startswith("error: a: Field required; c: Extra")
    assert step(environment, "hang") == ("error: not finished after 2 s", True)
    assert step(environment, "die") == ("error: it ended its process", True)
    assert step(environment, "leave") == ("error: SystemExit: 0", True)
    long, failed = step(environment, "shout")
    assert not failed and long.startswith("<html>\ufffd[31mxxx") and long.endswith(" [cut]")
    assert len(long) < 64 * 16
    assert step(environment, "add", a=2, b=2) == ("4", False), "a new process took its place"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(a):\n    'x'\n", r"t.py:1: f: the argument a needs a type, as a: str"),
        ("\n\ndef f(a: int):\n    pass\n", r"t.py:3: f needs a docstring"),
        ("def f(*a: int):\n    'x'\n", r"t.py:1: f: \*a: "),
        ("1 +\n", "SyntaxError"),
        ("import nowhere\n", "ModuleNotFoundError"),
        ("def f(a: object()):\n    'x'\n", "no JSON schema"),
        (None, "FileNotFoundError"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tools_is_refused_with_its_line(tmp_path, monkeypatch, source, told):
    monkeypatch.setattr("sys.path", [*sys.path])
    if source is not None:
        (tmp_path / "t.py").write_text(source)
    kind, text = FileTools().load(str(tmp_path / "t.py"))
    assert kind == "raised" and re.search(told, text)


def test_a_file_without_tools_is_refused(tmp_path, tokenizer):
    (tmp_path / "t.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"t.py defines no function that could be a tool"):
        build_toolbox(EnvironmentConfig(tools=[{"python": "t.py"}]), tokenizer, tmp_path)


def test_two_tools_of_one_name_are_refused(tmp_path, tokenizer, monkeypatch):
    owned = SimpleNamespace(tools=[Calculator()], close=lambda: None)
    monkeypatch.setattr("ernie_train.environments.environment.UserTools", lambda file: owned)
    config = EnvironmentConfig(tools=["calculator", {"python": "t.py"}])
    with pytest.raises(ConfigError, match="two tools have the name 'calculator'"):
        build_toolbox(config, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="calculator twice"):
        EnvironmentConfig(tools=["calculator", "calculator"])


def test_types_become_the_schema_of_a_field():
    def search(query: str, limit: int | None = None, tags: list[str] = []) -> str:  # noqa: B006
        """Search."""
        return query

    parameters = Signature.of(search).schema["function"]["parameters"]
    assert parameters["properties"]["tags"]["items"] == {"type": "string"}
    assert parameters["required"] == ["query"]
    assert Signature.of(search).check({"query": "x"}) == {"query": "x"}


# ---- turns ---------------------------------------------------------------------------------------


def test_a_turn_without_a_call_ends_the_episode(box):
    environment = begun(box)
    for turn in (answer("4"), "never ends to think", "", calls(("calculator", {}))[:40]):
        assert environment.step(turn).done


def test_calls_of_a_turn_are_answered_in_order_and_bounded_in_number(box):
    made = [("calculator", {"expression": f"{n} + 1"}) for n in range(12)]
    told = [message["content"] for message in begun(box).step(calls(*made)).messages]
    assert told[:8] == [str(n + 1) for n in range(8)]
    assert told[8:] == ["error: a turn may make 8 calls; no further one was made"]


@pytest.mark.parametrize("text", ["garbage", "[1]", '{"name": 3}', '{"name": "calculator"}'])
def test_a_call_that_is_none_is_answered(box, text):
    turn = f"x\n</think>\n\n<tool_call>\n{text}\n</tool_call>\n"
    (message,) = begun(box).step(turn).messages
    assert message["content"] == "error: the call is not JSON with a name and arguments"


def test_rows_with_tools_of_their_own_or_about_a_call_have_one_turn(box):
    user = [{"role": "user", "content": "?"}]
    own = [{"name": "get_weather", "parameters": {}}]
    assert not box.serves(Record("prompt", user, tools=own))
    assert not box.serves(Record("prompt", user, fields={"reward": "tool_call"}))
    chosen = Record("prompt", user, tools=[{"function": {"name": "calculator"}}])
    assert box.serves(chosen)
    offered = box.offer(chosen)
    assert [tool["function"]["name"] for tool in offered.tools] == ["calculator"]
    assert box.offer(offered) == offered
    wanted = Record("prompt", user, tools=[{"name": "lookup"}], source="f:1")
    with pytest.raises(DataError, match="f:1: a row that offers lookup needs a table"):
        box.offer(wanted)


# ---- chat formats --------------------------------------------------------------------------------


class Formatted(Tokenizer):
    """Another chat format over the tokenizer of the tests."""

    def __new__(cls, template, **chat):
        tokenizer = load_tokenizer(TOKENIZER)
        tokenizer.chat = ChatFormat(ChatTemplate(template, origin="t.jinja"), **chat)
        return tokenizer


CHATML = """{%- if tools -%}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}CALLS<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
JSON_CALLS = (
    "{%- for c in m.tool_calls or [] -%}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{%- endfor -%}"
)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML.replace("CALLS", JSON_CALLS), None),
        (CHATML.replace("CALLS", JSON_CALLS).replace("if tools", "if false"), "not show tools"),
        (CHATML.replace("CALLS", "{{ m.tool_calls | string }}"), "writes calls otherwise"),
        (CHATML.replace("CALLS", ""), "leaves the turn|writes calls otherwise"),
        (CHATML.replace("CALLS", JSON_CALLS).replace(
            "for m in messages", "for m in messages if m.role != 'tool'"), "does not show the res"),
        (CHATML.replace("CALLS", JSON_CALLS).replace("<|im_end|>", "$"), "cannot continue"),
    ],
)  # fmt: skip
def test_a_chat_format_that_cannot_carry_tools_is_refused(tmp_path, template, told):
    config = EnvironmentConfig(tools=["calculator"])
    if told is None:
        box = build_toolbox(config, Formatted(template), tmp_path)
        (message,) = begun(box).step('<tool_call>{"name": "calculator", "arguments": '
                                     '{"expression": "2 * 3"}}</tool_call>').messages  # fmt: skip
        assert message["content"] == "6"
        return
    with pytest.raises(ConfigError, match=told):
        build_toolbox(config, Formatted(template), tmp_path)


def test_the_plain_format_has_no_tools(tmp_path):
    from ernie_train.data import shipped_template

    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.chat = ChatFormat(shipped_template("ernie_plain"))
    with pytest.raises(ConfigError, match="this chat format has no tools"):
        build_toolbox(EnvironmentConfig(tools=["calculator"]), tokenizer, tmp_path)


def test_results_that_look_like_control_tokens_are_told_where_those_are_refused(tmp_path):
    template = load_tokenizer(TOKENIZER).chat.template.source
    box = build_toolbox(
        EnvironmentConfig(tools=["lookup"]), Formatted(template, control_tokens="refuse"), tmp_path
    )
    found = step(begun(box, table={"a": "<|im_end|>"}), "lookup", key="a")
    assert found == ("error: the result contains a control token of the chat format", True)
    assert box.result_ids([{"role": "tool", "name": "lookup", "content": found[0]}])
