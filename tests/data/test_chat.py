"""The chat formats: hand-written strings, what transformers renders, and the mask."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import DataError
from ernie_train.data.chat import drop_thinking, encode_chat, prompt_ids, render_chat
from ernie_train.data.tokenizer.sentencepiece import Tokenizer

Message = dict[str, Any]
SYSTEM = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
TOOL = {"name": "add", "description": "a < b & 'é'", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def test_a_turn_with_thinking() -> None:
    content = "<think>\n1+1\n</think>\n\n<response>\n2\n</response>"
    assert render_chat([user("1+1?"), assistant(content)]) == (
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
    assert render_chat([user("q"), message]) == render_chat([user("q"), wanted])


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
    assert render_chat(messages, [TOOL, TOOL], add_generation_prompt=True) == (
        "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n"
        "<global_setting>\nthink_mode=True\n</global_setting>\n\n"
        f"<tool_list>\n[{listed}, {listed}]\n</tool_list><|im_end|>\n\n"
        "<|im_start|>user\nadd<|im_end|>\n\n"
        f"<|im_start|>assistant\n<think>\nuse it\n</think>\n\n{call}{call}<|im_end|>\n\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<response>\ndone\n</response>\n<|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_the_plain_format() -> None:
    messages = [
        {"role": "system", "content": "S"},
        user("a"),
        assistant("<think>x</think><response>\nb\n</response>"),
        user("c"),
    ]
    prompt = "<|begin_of_sentence|>S\nUser: a\nAssistant: b<|end_of_sentence|>User: c\nAssistant: "
    assert render_chat(messages, thinking=False, add_generation_prompt=True) == prompt
    whole = render_chat([*messages, assistant("d")], thinking=False)
    assert whole == prompt + "d</s>"


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
    tools = [{"name": text(), "parameters": {"x": text()}}] * rng.randint(1, 3)
    for _ in range(rng.randint(1, 3)):
        messages.append(user(text()))
        if rng.random() < 0.4:
            calls = [{"name": text(), "arguments": {text(): [1, None, {"y": text()}]}}]
            calls.append({"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}})
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
def test_the_templates_render_the_same_strings(
    tokenizer: Tokenizer, tmp_path: Path, referee: Callable[..., Any], transformers: str
) -> None:
    arguments: list[Path] = []
    for thinking in (True, False):
        directory, cases_path = tmp_path / f"{thinking}", tmp_path / f"{thinking}.json"
        tokenizer.save_pretrained(directory, thinking=thinking)
        cases_path.write_text(json.dumps(template_cases(thinking)))
        arguments += [directory, cases_path]
    out = tmp_path / "out.json"
    referee("chat_render.py", out, *arguments, transformers=transformers)
    answers = json.loads(out.read_text())
    asked = 0
    for thinking, theirs in zip((True, False), answers, strict=True):
        cases = template_cases(thinking)
        for case, text, ids in zip(cases, theirs["text"], theirs["ids"], strict=True):
            messages, tools, ask = case.values()
            assert render_chat(messages, tools, thinking, ask) == text
            if thinking and ask:
                asked += 1
                assert prompt_ids(tokenizer, messages, tools) == ids
            elif thinking:
                ours = encode_chat(tokenizer, messages, tools)[0]
                assert tokenizer.decode(ids[len(ours) :]) == "\n\n"
                assert ids[: len(ours)] == ours
    assert asked > 30


def spans_of(text: str) -> str:
    """What must be trained, found by a pattern instead of by building it."""
    return "".join(re.findall(r"<\|im_start\|>assistant\n<think>\n(.*?<\|im_end\|>)", text, re.S))


@pytest.mark.parametrize("seed", range(60))
def test_exactly_the_assistants_words_are_trained(tokenizer: Tokenizer, seed: int) -> None:
    messages, tools = random_conversation(random.Random(seed))
    ids, trainable = encode_chat(tokenizer, messages, tools)
    text = render_chat(messages, tools)
    assert tokenizer.decode(ids) == text.removesuffix("\n\n") or messages[-1]["role"] != "assistant"
    trained = [token for token, mark in zip(ids, trainable, strict=True) if mark]
    assert tokenizer.decode(trained) == spans_of(text)
    ends = tokenizer.token_id("<|im_end|>")
    assert trained.count(ends) == sum(m["role"] == "assistant" for m in messages)


@pytest.mark.parametrize("thinking", [True, False])
@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(st.text(min_size=1), st.text(), st.text(min_size=1)), min_size=1),
    system=st.text(),
)
def test_a_prompts_ids_are_a_prefix_of_the_conversations(
    tokenizer: Tokenizer, thinking: bool, turns: list[tuple[str, str, str]], system: str
) -> None:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, reasoning, answer in turns:
        messages += [user(question), assistant(answer, reasoning_content=reasoning)]
    try:
        ids, trainable = encode_chat(tokenizer, messages, None, thinking)
    except DataError:
        return  # control tokens, surrogates, answers of newlines alone
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = prompt_ids(tokenizer, messages[:index], None, thinking)
            assert ids[: len(prompt)] == prompt
            assert not trainable[len(prompt) - 1] and trainable[len(prompt)]
    assert trainable[-1]
    assert ids[-1] == (tokenizer.token_id("<|im_end|>") if thinking else tokenizer.eos_token_id)


def test_the_plain_mask(tokenizer: Tokenizer) -> None:
    messages = [user("a"), assistant("true"), user("b"), assistant("false")]
    ids, trainable = encode_chat(tokenizer, messages, None, thinking=False)
    trained = [token for token, mark in zip(ids, trainable, strict=True) if mark]
    assert tokenizer.decode(trained) == "true<|end_of_sentence|>false</s>"


def test_a_turn_of_weight_0_is_not_trained(tokenizer: Tokenizer) -> None:
    messages = [user("a"), assistant("true", weight=0), user("b"), assistant("false", weight=1)]
    ids, trainable = encode_chat(tokenizer, messages)
    trained = [token for token, mark in zip(ids, trainable, strict=True) if mark]
    assert tokenizer.decode(trained) == "\n</think>\n\n<response>\nfalse\n</response>\n<|im_end|>"


@pytest.mark.parametrize("thinking", [True, False])
def test_an_untrained_turn_does_not_merge_with_its_prompt(
    tokenizer: Tokenizer, thinking: bool
) -> None:
    messages = [user("a"), assistant("true", weight=0), user("b"), assistant("false")]
    ids, _ = encode_chat(tokenizer, messages, None, thinking)
    for end in (1, 3):
        prompt = prompt_ids(tokenizer, messages[:end], None, thinking)
        assert ids[: len(prompt)] == prompt


def test_dropping_the_thinking_leaves_the_answer(tokenizer: Tokenizer) -> None:
    full = [user("q"), assistant("<think>\nlong\n</think>\n\n<response>\n2\n</response>")]
    short = drop_thinking(full)
    assert render_chat(short) == render_chat([user("q"), assistant("2")])
    assert "long" in full[1]["content"]
    assert drop_thinking([assistant("2", reasoning_content="x")]) == [assistant("2")]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([user("x"), {"role": "system", "content": "x"}], "only the first"),
        ([{"role": "user", "content": None}], "no text content"),
        ([{"role": "user", "content": ["x"]}], "no text content"),
        ([user("ignore this <|im_end|>"), assistant("x")], r"message 1 .*<\|im_end\|>"),
        ([user("a</s>b")], "control token </s>"),
        ([user("x"), assistant("a<|im_start|>system")], r"message 2 .*<\|im_start\|>"),
        ([user("x"), assistant("a", reasoning_content="<s>")], "message 2 .*<s>"),
        ([user("x"), assistant("", tool_calls=[{"name": "</s>", "arguments": {}}])], "</s>"),
        ([user("x"), assistant("<think>never closed")], "never closes"),
        ([user("x"), assistant("a</think>b", reasoning_content="c")], "both"),
        ([user("x"), assistant("a</think>")], "neither an answer"),
        ([user("x"), assistant("\n")], "neither an answer"),
        ([user("x"), assistant("<response>1</response>and more")], "outside"),
        ([user("x"), assistant("<response>1")], "outside"),
        ([user("x"), assistant("<tool_call>{</tool_call>")], "not valid JSON"),
        ([user("x"), assistant("", tool_calls=[{"arguments": {}}])], "name and arguments"),
        ([user("x"), assistant("y", weight=0.5)], "must be 0 or 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(
    tokenizer: Tokenizer, messages: list[Message], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        encode_chat(tokenizer, messages)


def test_refusals_of_prompts_tools_and_plain_conversations(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="must not end in an assistant turn"):
        prompt_ids(tokenizer, [user("x"), assistant("y")])
    with pytest.raises(DataError, match="message 1 contains"):
        prompt_ids(tokenizer, [user("<|im_end|>")])
    with pytest.raises(DataError, match="tools contain"):
        encode_chat(tokenizer, [user("x")], [{"name": "</s>"}])
    with pytest.raises(DataError, match="Thinking chat format"):
        encode_chat(tokenizer, [user("x")], [TOOL], thinking=False)
    with pytest.raises(DataError, match="no answer"):
        encode_chat(tokenizer, [user("x"), assistant("")], thinking=False)


class WithoutTurnTokens:
    """A tokenizer that lacks two of the tokens."""

    def token_id(self, piece: str) -> int | None:
        return None if piece in ("<|im_end|>", "<|begin_of_sentence|>") else 1


def test_a_tokenizer_without_turn_tokens_is_named() -> None:
    tokenizer: Any = WithoutTurnTokens()
    with pytest.raises(DataError, match=r"no token <\|im_end\|>, which the Thinking"):
        encode_chat(tokenizer, [user("x")])
    with pytest.raises(DataError, match=r"no token <\|begin_of_sentence\|>, which the plain"):
        prompt_ids(tokenizer, [user("x")], thinking=False)
