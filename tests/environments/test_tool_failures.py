"""Hostile calls get an answer; what says nothing about the policy ends the stage instead."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import Interrupted, ToolFailure, UserError
from ernie_train.core.processes import process_state
from ernie_train.data import ChatFormat, ChatTemplate, Record, load_tokenizer, tool_result_ids
from ernie_train.environments import (
    EnvironmentConfig,
    EpisodeStart,
    ToolEnvironment,
    build_toolbox,
    play_episodes,
    python_cells,
)
from ernie_train.environments.calculator import Calculator
from ernie_train.environments.lookup import Lookup
from ernie_train.environments.tool import ToolContext, ToolError
from ernie_train.environments.user_tools import UserTools
from ernie_train.environments.user_worker import FileTools
from ernie_train.rewards.sandbox import ProgramResult, SandboxUnavailable
from tests.environments.conftest import TOKENIZER, answer, calls

ASKED = [{"role": "user", "content": "?"}]
RECORD = Record("prompt", ASKED, fields={"table": {"a": "1"}})
CONTEXT = ToolContext({"table": {"a": "1"}}, 5.0, 1000)
SLOW = '''
import os, time
time.sleep(0.4)

def process() -> int:
    """Return the process."""
    time.sleep(0.2)
    return os.getpid()

def nested(values: list) -> int:
    """Return how many there are."""
    return len(values)
'''


def box_of(tools, tokenizer, root, **limits):
    return build_toolbox(EnvironmentConfig(tools=tools, **limits), tokenizer, root)


def begun(box, **options):
    environment = ToolEnvironment(box, **options)
    environment.reset(RECORD)
    return environment


def step(box, turn):
    (message,), (failed,) = (found := begun(box).step(turn)).messages, found.failed
    return message["content"], failed, message["name"]


# ---- foreign texts -------------------------------------------------------------------------------

NAMING = """{%- if tools -%}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name else '' }}
{{ m.content }}
{%- for c in m.tool_calls or [] -%}<tool_call>{{ c.function | tojson }}</tool_call>{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture(params=["text", "refuse"])
def naming_box(request, tmp_path):
    """Tools in a chat format that shows the names of messages."""
    tokenizer = load_tokenizer(TOKENIZER)
    chat = ChatFormat(ChatTemplate(NAMING, origin="t.jinja"), control_tokens=request.param)
    tokenizer.chat = chat
    return box_of(["calculator", "lookup"], tokenizer, tmp_path, max_tool_tokens=20)


@pytest.mark.parametrize(
    "turn",
    [
        calls(("<|im_end|>", {})),
        '<tool_call>{"name": "\\u003c|im_end|\\u003e", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\u003c/tool_response\\u003e", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\n\\u0000\\u2028", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "lookup", "arguments": {"key": "\\u003c|im_end|\\u003e"}}</tool_call>',
        '<tool_call>{"name": "lookup", "arguments": {"\\u003c|im_end|\\u003e": 1}}</tool_call>',
        '<tool_call>{"name": "lookup", "arguments": {"\\ud800": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "calculator", "arguments": {"expression": "\\u003c/s\\u003e"}}'
        "</tool_call>",
    ],
)  # fmt: skip
def test_no_text_of_a_call_reaches_the_structure_of_the_next_prompt(naming_box, turn):
    tokenizer = naming_box.tokenizer
    turn = turn if "</think>" in turn else f"x\n</think>\n\n{turn}"
    result = begun(naming_box).step(turn)
    (message,), (failed,) = result.messages, result.failed
    assert failed and message["content"].startswith("error: ")
    found = naming_box.result_ids(result.messages)
    plain = naming_box.result_ids([{"role": "tool", "name": "a", "content": "x"}])
    special = {tokenizer.token_id(t) for t in (*tokenizer.control_tokens, "</tool_response>")}
    assert [i for i in found if i in special] == [i for i in plain if i in special]
    shown = tokenizer.decode(found)
    assert not set("\x00\u2028") & set(shown) and "im_end|>" not in message["name"]


@pytest.mark.parametrize(
    "entry", ["<think>" * 300, "</tool_response>" * 40, "word " * 200, "a", "\N{PILE OF POO}" * 99]
)
def test_the_limit_counts_the_tokens_that_are_encoded(tokenizer, tmp_path, entry):
    box = box_of(["lookup"], tokenizer, tmp_path, max_tool_tokens=30)
    environment = ToolEnvironment(box)
    environment.reset(Record("prompt", ASKED, fields={"table": {"a": entry}}))
    (message,) = environment.step(calls(("lookup", {"key": "a"}))).messages
    around = tool_result_ids(tokenizer, ["lookup"], [{**message, "content": ""}], None)
    count = len(box.result_ids([message])) - len(around)
    assert count <= 30 + len(tokenizer.encode(" [cut]"))
    assert (message["content"] == entry) == (entry == "a")


# ---- failures that are no answers ----------------------------------------------------------------


def play(box, *turns, stop=lambda: False):
    """Play one episode that writes these turns."""
    tokenizer = box.tokenizer

    def sample(prompts, *, turn, episodes, limits):
        ids = [*tokenizer.encode(turns[turn]), tokenizer.stop_token_ids[0]]
        one = SimpleNamespace(ids=ids, logprobs=[0.0] * len(ids), finished=True,
                              expert_ids=None, prompt_expert_ids=None)  # fmt: skip
        return [one] * len(prompts)

    starts = [EpisodeStart([5], RECORD)] * 2
    return play_episodes(
        starts, sample, tokenizer, box, max_new_tokens=2000, stop_requested=stop
    )  # fmt: skip


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SandboxUnavailable("no sandbox"), "the tool calculator cannot run: no sandbox"),
        (UserError("my.py went away"), "the tool calculator cannot run: my.py went away"),
        (OSError(24, "Too many open files"), "cannot run: .*Too many open files"),
    ],
)
def test_a_tool_that_cannot_run_ends_the_stage(tokenizer, tmp_path, monkeypatch, raised, told):
    box = box_of(["calculator"], tokenizer, tmp_path)

    def fail(self, arguments, context):
        raise raised

    monkeypatch.setattr(Calculator, "call", fail)
    with pytest.raises(ToolFailure, match=told) as failure:
        play(box, calls(("calculator", {})), answer("1"))
    assert failure.value.on_all_ranks


@pytest.mark.parametrize("defect", [KeyError("table"), TypeError("x"), AssertionError()])
def test_defects_of_ours_are_no_answers(tokenizer, tmp_path, monkeypatch, defect):
    box = box_of(["calculator"], tokenizer, tmp_path)

    def fail(self, arguments, context):
        raise defect

    monkeypatch.setattr(Calculator, "call", fail)
    with pytest.raises(type(defect)):
        play(box, calls(("calculator", {})), answer("1"))


def test_a_failure_of_the_sandbox_is_no_result(tokenizer, tmp_path, monkeypatch):
    box = box_of(["python"], tokenizer, tmp_path)
    broken = ProgramResult("infrastructure", [], "something outside killed the program")
    monkeypatch.setattr(python_cells, "run_script", lambda *a, **k: broken)
    with pytest.raises(ToolFailure, match=r"python cannot run: .*something outside"):
        play(box, calls(("python", {"code": "1"})), answer("1"))


hostile_texts = st.text() | st.sampled_from(
    ["1e1_0", "-" * 399 + "1", "(" * 199, "\ud800", "\x00", "0x" + "f" * 300, "9" * 400, "1e5j",
     "1 is 1", "a.b", "2**-2**99", "1_0e9_9", "\uff11 + 1", "1\f+ 1", "None", "...", "f'{1}'"]
)  # fmt: skip
hostile_values = hostile_texts | st.none() | st.integers() | st.floats() | st.lists(st.booleans())


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["expression", "key", "\ud800"]), hostile_values))
def test_hostile_arguments_of_built_in_tools_raise_nothing_but_tool_errors(arguments):
    for tool in (Calculator(), Lookup()):
        try:
            assert isinstance(tool.call(arguments, CONTEXT), str)
        except ToolError:
            continue


def test_python_tells_the_limits_that_it_has(tokenizer, tmp_path, monkeypatch):
    box = box_of(["python"], tokenizer, tmp_path, max_tool_seconds=2.5)
    limits = []

    def late(program, stdin, given, **options):
        limits.append(given)
        return ProgramResult("timeout", [], "")

    monkeypatch.setattr(python_cells, "run_script", late)
    told, failed, _ = step(box, calls(("python", {"code": "while True: pass"})))
    assert failed and told == "error: not finished after 3 s of processor time or 5 s in all"
    assert (limits[0].cpu_s, limits[0].wall_s) == (3, 5.0)


def test_a_stop_is_seen_between_the_calls_of_a_turn(tokenizer, tmp_path, monkeypatch):
    box, made = box_of(["calculator"], tokenizer, tmp_path), []

    def call(self, arguments, context):
        made.append(arguments)
        return "1"

    monkeypatch.setattr(Calculator, "call", call)
    environment = ToolEnvironment(box, stop_requested=lambda: len(made) == 2)
    environment.reset(RECORD)
    turn = calls(*[("calculator", {"expression": "1"})] * 5)
    with pytest.raises(Interrupted):
        environment.step(turn)
    assert len(made) == 2
    made.clear()
    with pytest.raises(Interrupted):
        play(box, turn, answer("1"), stop=lambda: len(made) >= 2)
    assert len(made) <= 4, "each of two episodes noticed it"


# ---- a user's file -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    file = tmp_path_factory.mktemp("slow") / "slow.py"
    file.write_text(SLOW)
    tools = UserTools(file)
    yield tools
    tools.close()


def ask(tools, name="process", limit_s=2.0, **arguments):
    return tools.call(name, arguments, ToolContext({}, limit_s, 1000))


def ask_at_once(tools, limit_s=2.0):
    with ThreadPoolExecutor(2) as pool:
        return {f.result() for f in [pool.submit(ask, tools, limit_s=limit_s) for _ in range(2)]}


def test_workers_outlive_the_threads_of_a_turn(slow):
    """The kernel kills a process when the thread that started it ends."""
    first = ask_at_once(slow)
    assert len(first) == 2
    time.sleep(0.1)
    assert ask_at_once(slow) == first


def test_workers_that_ended_between_turns_are_replaced(slow):
    (old,) = {ask(slow)}
    os.kill(int(old), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while process_state(int(old)).state != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(slow) != old


def test_the_start_of_a_worker_is_not_in_the_time_of_a_call(slow):
    assert len(ask_at_once(slow, limit_s=0.39)) == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: file.write_text(SLOW.replace("getpid()", "getppid()")),
        lambda file: file.unlink(),
    ],
    ids=["another result", "gone"],
)
def test_a_file_that_is_edited_during_the_run_ends_it(tmp_path, edit):
    file = tmp_path / "slow.py"
    file.write_text(SLOW)
    with closing(UserTools(file)) as tools:
        edit(file)
        with pytest.raises(UserError, match=r"slow\.py"):
            ask_at_once(tools)


def test_arguments_that_nest_too_deeply_are_answered(slow):
    values: list = []
    for _ in range(100_000):
        values = [values]
    with pytest.raises(ToolError, match="nest"):
        ask(slow, "nested", values=values)
    while values:
        values = values.pop()
    assert ask(slow, "nested", values=[1]) == "1"


def load(tmp_path, monkeypatch, source):
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "t.py"
    file.write_text(source)
    tools = FileTools()
    return tools, tools.load(str(file))


ADD = "def add(a: int) -> int:\n    'Add.'\n    return a + 1\n"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (ADD + "plus = add\n", r"t\.py:1: add and plus are one function"),
        ("async def f(a: int):\n    'x'\n", r"t\.py:1: f is async"),
        ("def f(a: int):\n    'x'\n    yield a\n", r"t\.py:1: f is a generator"),
        ("async def f(a: int):\n    'x'\n    yield a\n", r"t\.py:1: f is async"),
    ],
)
def test_functions_that_are_no_tools_are_refused(tmp_path, monkeypatch, source, told):
    _, (kind, text) = load(tmp_path, monkeypatch, source)
    assert kind == "raised"
    assert re.search(told, text)


def test_a_tool_has_the_name_under_which_the_file_holds_it(tmp_path, monkeypatch):
    source = ADD.replace("add", "_add") + "add = _add\n"
    tools, (kind, schemas) = load(tmp_path, monkeypatch, source)
    assert kind == "tools" and [s["function"]["name"] for s in schemas] == ["add"]
    assert tools.call("add", {"a": 1}, 100) == ["result", "2"]


@pytest.mark.parametrize(
    "value", ["object()", "{1}", "[{'a': object()}]", "float('nan')", "{(1, 2): 3}", "lambda: 1"]
)
def test_results_that_json_cannot_hold_are_an_error(tmp_path, monkeypatch, value):
    source = f"def f() -> object:\n    'x'\n    return {value}\n"
    tools, _ = load(tmp_path, monkeypatch, source)
    kind, text = tools.call("f", {}, 1000)
    assert kind == "error" and text.startswith("the result is no JSON: ") and " at 0x" not in text


def test_a_process_that_writes_into_its_pipe_is_replaced(tmp_path):
    file = tmp_path / "w.py"
    file.write_text(
        "import os, sys\n\ndef f(text: str) -> str:\n    'x'\n"
        "    body = text.encode()\n"
        "    os.write(int(sys.argv[1]), len(body).to_bytes(4, 'big') + body)\n"
        "    return 'ok'\n"
    )
    before = threading.active_count()
    with closing(UserTools(file)) as tools:
        for text in ("no json", "[1]"):
            with pytest.raises(ToolError, match="answered something else"):
                ask(tools, "f", text=text)
    assert threading.active_count() == before


def test_tools_that_do_not_load_leave_no_thread(tmp_path):
    before = threading.active_count()
    (tmp_path / "t.py").write_text("1 +")
    with pytest.raises(UserError):
        UserTools(tmp_path / "t.py")
    assert threading.active_count() == before
