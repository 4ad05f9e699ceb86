"""The two ERNIE formats: hand-written strings, what a server renders, masks and refusals."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import DataError
from ernie_train.data import (
    encode_chat,
    prompt_ids,
    render_chat,
    shipped_template,
)
from ernie_train.data.tokenizer import Tokenizer

Message = dict[str, Any]
THINKING = shipped_template("ernie_thinking")
SYSTEM = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
FUNCTION = {"name": "add", "description": "a < b & 'é'", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def test_a_turn_with_thinking() -> None:
    content = "<think>\n1+1\n</think>\n\n<response>\n2\n</response>"
    assert render_chat(THINKING, [user("1+1?"), assistant(content)]) == (
        SYSTEM + "<|im_start|>user\n1+1?<|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\n1+1\n</think>\n\n"
        "<response>\n2\n</response>\n<|im_end|>\n\n"
    )


@pytest.mark.parametrize(
    "message",
    [
        assistant("<think>1+1</think>2"),
        assistant("<think>\n1+1\n</think>\n2\n"),
        assistant("1+1</think>\n\n\n<response>\n2\n</response>\n"),
        assistant("2", reasoning_content="1+1"),
        assistant("<response>\n2\n</response>", reasoning_content="\n1+1\n"),
    ],
)
def test_every_way_to_give_the_reasoning_renders_alike(message: Message) -> None:
    wanted = assistant("<think>\n1+1\n</think>\n\n<response>\n2\n</response>")
    assert render_chat(THINKING, [user("q"), message]) == render_chat(THINKING, [user("q"), wanted])


def test_system_tools_calls_and_results() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("add"),
        assistant(None, reasoning_content="use it", tool_calls=[CALL, CALL["function"]]),
        {"role": "tool", "content": "3"},
        assistant("done"),
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>\n'
    listed = '{"name": "add", "description": "a < b & \'é\'", "parameters": {"type": "object"}}'
    listed = f'{{"type": "function", "function": {listed}}}'
    assert render_chat(THINKING, messages, [TOOL, FUNCTION], add_generation_prompt=True) == (
        "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n"
        "<global_setting>\nthink_mode=True\n</global_setting>\n\n"
        f"<tool_list>\n[{listed}, {listed}]\n</tool_list><|im_end|>\n\n"
        "<|im_start|>user\nadd<|im_end|>\n\n"
        f"<|im_start|>assistant\n<think>\nuse it\n</think>\n\n{call}{call}<|im_end|>\n\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n\n"
        "<|im_start|>assistant\n<response>\ndone\n</response>\n<|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_earlier_turns_show_their_answer_alone() -> None:
    messages = [
        user("a"),
        assistant("b", reasoning_content="r1"),
        user("c"),
        assistant("", reasoning_content="r2", tool_calls=[CALL]),
        {"role": "tool", "content": "3"},
        assistant("d", reasoning_content="r3"),
    ]
    text = render_chat(THINKING, messages)
    assert "assistant\n<response>\nb\n</response>" in text and "r1" not in text
    assert "<think>\nr2\n</think>\n\n<tool_call>" in text and "<think>\nr3\n</think>" in text


def test_the_plain_format(plain: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        user("a"),
        assistant("<think>x</think><response>\nb\n</response>"),
        user("c"),
    ]
    prompt = "<|begin_of_sentence|>S\nUser: a\nAssistant: b<|end_of_sentence|>User: c\nAssistant:"
    assert render_chat(plain, messages, add_generation_prompt=True) == prompt
    assert render_chat(plain, [*messages, assistant("d")]) == prompt + " d<|end_of_sentence|>"


def test_plain_ids_are_those_of_the_whole_text(plain: Tokenizer) -> None:
    messages = [user("the sum"), assistant("the answer is"), user("knight"), assistant("true")]
    ids, trainable = encode_chat(plain, messages)
    assert ids == plain.encode(render_chat(plain, messages))
    assert ids[: len(prompt_ids(plain, messages[:3]))] == prompt_ids(plain, messages[:3])
    trained = [token for token, mark in zip(ids, trainable, strict=True) if mark]
    answers = " the answer is<|end_of_sentence|> true<|end_of_sentence|>"
    assert plain.decode(trained) == answers


def as_a_server_gets_it(tool: Message) -> Message:
    """A tool as an OpenAI client sends it and a server hands it to the template."""
    function = tool.get("function", tool)
    return {
        "function": {"parameters": function["parameters"], "description": None, "strict": None}
        | {k: v for k, v in function.items() if k != "parameters"},
        "type": "function",
    }


def test_tools_reach_the_model_alike_from_rows_and_from_clients() -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "string", "enum": ["a", None], "description": None}},
        "required": ["x"],
    }
    row_tools = [FUNCTION, {"name": "f", "parameters": schema}, {"name": "g", "parameters": {}}]
    question = [user("q")]
    trained = render_chat(THINKING, question, row_tools, add_generation_prompt=True)
    served = THINKING.render(
        question, [as_a_server_gets_it(t) for t in row_tools], add_generation_prompt=True
    )
    assert trained == served
    assert '"enum": ["a", null]' in trained and '"description": null' not in trained


def test_short_parameters_become_the_schema_that_they_stand_for() -> None:
    short = render_chat(THINKING, [user("q")], [{"name": "f", "parameters": {"place": "string"}}])
    schema = {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    }
    assert short == render_chat(THINKING, [user("q")], [{"name": "f", "parameters": schema}])


def test_content_of_every_form_that_servers_pass_on() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    listed = THINKING.render([user(parts), {"role": "tool", "content": [{"k": 1, "n": None}]}])  # type: ignore[arg-type]
    assert "<|im_start|>user\nab<|im_end|>" in listed
    assert '<tool_response>\n{"k": 1}\n</tool_response>' in listed
    developer = THINKING.render([{"role": "developer", "content": "S"}, user("q")])
    assert developer == THINKING.render([{"role": "system", "content": "S"}, user("q")])
    for key in ("reasoning", "thoughts"):
        turn = THINKING.render([user("q"), {"role": "assistant", "content": "a", key: "why"}])
        assert "<think>\nwhy\n</think>" in turn
    with pytest.raises(DataError, match="message 2 is a system message; only the first"):
        THINKING.render([user("q"), {"role": "system", "content": "S"}])


def random_message_text(rng: random.Random) -> str:
    parts = [
        "the sum ",
        "12 ",
        "\n",
        "  x",
        "{'a': 1}",
        '"q" ',
        "é漢",
        "<b>&amp;",
        "{{ x }}",
        "```",
    ]
    return "".join(rng.choices(parts, k=rng.randint(1, 6))) + "."


def random_conversation(rng: random.Random) -> tuple[list[Message], list[Message] | None]:
    def text() -> str:
        return random_message_text(rng)

    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": text()})
    schema = {"type": "object", "properties": {text(): {"enum": [text(), None, 1.5]}}}
    tools = [{"name": text(), "parameters": schema}] * rng.randint(1, 3)
    for _ in range(rng.randint(1, 3)):
        messages.append(user(text()))
        if rng.random() < 0.4:
            calls = [{"name": text(), "arguments": {text(): [1, None, {"y": text()}]}}]
            calls.append({"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}})
            content = rng.choice([None, "", f"<think>\n{text()}\n</think>\n\n", text()])
            messages.append(assistant(content, tool_calls=calls[: rng.randint(1, 2)]))
            messages.append({"role": "tool", "content": text()})
        style = rng.randrange(5)
        if style == 0:
            messages.append(assistant(text()))
        elif style == 1:
            messages.append(assistant(text(), reasoning_content=text()))
        elif style == 2:
            messages.append(assistant(f"<think>\n{text()}\n</think>\n\n{text()}"))
        elif style == 3:
            messages.append(assistant(f"{text()}</think><response>\n{text()}\n</response>\n"))
        else:
            call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
            messages.append(assistant(f" <think>{text()}</think>\n{call}"))
    if rng.random() < 0.5:
        messages.pop()
    return messages, tools if rng.random() < 0.4 else None


def template_cases(thinking: bool) -> list[dict[str, Any]]:
    rng = random.Random(5)
    cases: list[dict[str, Any]] = []
    while len(cases) < 200:
        messages, tools = random_conversation(rng)
        if not thinking:  # the plain template knows neither tools nor reasoning
            tools = None
            messages = [m for m in messages if m["role"] in ("system", "user")]
            messages.append(assistant("12"))
            messages += [user("and?")] * rng.randint(0, 1)
        ask = messages[-1]["role"] != "assistant"
        cases.append({"messages": messages, "tools": tools, "add_generation_prompt": ask})
    return cases


@pytest.mark.parametrize("transformers", ["newest", "4.57"])
def test_transformers_renders_and_encodes_alike(
    tokenizer: Tokenizer,
    plain: Tokenizer,
    tmp_path: Path,
    referee: Callable[..., Any],
    transformers: str,
) -> None:
    arguments: list[Path] = []
    for saved, thinking in ((tokenizer, True), (plain, False)):
        directory, cases_path = tmp_path / f"{thinking}", tmp_path / f"{thinking}.json"
        saved.save_pretrained(directory)
        cases_path.write_text(json.dumps(template_cases(thinking)))
        arguments += [directory, cases_path]
    out = tmp_path / "out.json"
    referee("chat_render.py", out, *arguments, transformers=transformers)
    answers = json.loads(out.read_text())
    for own, thinking, theirs in zip((tokenizer, plain), (True, False), answers, strict=True):
        cases = template_cases(thinking)
        asked = 0
        for case, text, ids in zip(cases, theirs["text"], theirs["ids"], strict=True):
            messages, tools, ask = case.values()
            assert render_chat(own, messages, tools, add_generation_prompt=ask) == text
            if ask:
                asked += 1
                assert prompt_ids(own, messages, tools) == ids
            else:
                ours = encode_chat(own, messages, tools)[0]
                assert own.decode(ids[len(ours) :]).strip() == ""
                assert ids[: len(ours)] == ours
        assert asked > 30


def test_transformers_parses_completions(
    tokenizer: Tokenizer, plain: Tokenizer, tmp_path: Path, referee: Callable[..., Any]
) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    completions = [
        "why\n</think>\n\n<response>\n12\n</response>\n<|im_end|>",
        f"why\n</think>\n\n{call}{call}<|im_end|>",
        "never closed",
    ]
    case = {"messages": [user("q")], "tools": None, "add_generation_prompt": True}
    (tmp_path / "cases.json").write_text(json.dumps([{**case, "parse": completions}]))
    arguments: list[Path] = []
    for name, saved in (("thinking", tokenizer), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
        arguments += [tmp_path / name, tmp_path / "cases.json"]
    referee("chat_render.py", tmp_path / "out.json", *arguments)
    parsed, none = (answer["parsed"] for answer in json.loads((tmp_path / "out.json").read_text()))
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}] * 2
    assert parsed == [
        {"role": "assistant", "reasoning_content": "why", "content": "12"},
        {"role": "assistant", "reasoning_content": "why", "tool_calls": calls},
        {"role": "assistant", "reasoning_content": "never closed"},
    ]
    assert none == []
