"""What of a conversation is trained, in which samples, and what is refused."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_train.core.errors import DataError
from ernie_train.data import (
    ChatTemplate,
    drop_thinking,
    encode_chat,
    encode_conversation,
    prompt_ids,
    render_chat,
)
from ernie_train.data.conversation import Conversation
from ernie_train.data.formats.messages import read_messages
from ernie_train.data.tokenizer import ChatFormat, Tokenizer, load_tokenizer
from tests.data.test_chat import CALL, THINKING, TOOL, Message, assistant, random_conversation, user


def spans_of(text: str) -> str:
    """What must be trained in the whole conversation, found by a pattern."""
    turns = re.findall(r"<\|im_start\|>assistant\n(?:<think>\n)?(.*?<\|im_end\|>)", text, re.S)
    return "".join(turns)


@pytest.mark.parametrize("seed", range(60))
def test_exactly_the_assistants_words_are_trained(tokenizer: Tokenizer, seed: int) -> None:
    messages, tools = random_conversation(random.Random(seed))
    samples = encode_conversation(tokenizer, messages, tools).samples
    text = render_chat(tokenizer, messages, tools)
    whole = samples[-1]
    if messages[-1]["role"] == "assistant":
        assert tokenizer.decode(whole.ids) == text.removesuffix("\n\n")
    trained = [
        [token for token, mark in zip(s.ids, s.trainable, strict=True) if mark] for s in samples
    ]
    turns = sum(m["role"] == "assistant" for m in messages)
    ends = tokenizer.token_id("<|im_end|>")
    assert sum(part.count(ends) for part in trained) == turns
    if len(samples) == 1 and messages[-1]["role"] == "assistant":
        assert tokenizer.decode(trained[0]) == spans_of(text)


@pytest.mark.parametrize("format", ["tokenizer", "plain"])
@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(st.text(min_size=1), st.text(), st.text(min_size=1)), min_size=1),
    system=st.text(),
)
def test_a_prompts_ids_are_a_prefix_of_its_sample(
    request: pytest.FixtureRequest,
    format: str,
    turns: list[tuple[str, str, str]],
    system: str,
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(format)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, reasoning, answer in turns:
        messages += [user(question), assistant(answer, reasoning_content=reasoning)]
    try:
        samples = encode_conversation(tokenizer, messages).samples
    except DataError:
        return  # surrogates, answers of newlines alone
    last = samples[-1]
    prompt = prompt_ids(tokenizer, messages[:-1])
    first = len(last.trainable) - last.trainable[::-1].index(False)
    if format == "plain" or turns[-1][1].strip():
        assert last.ids[:first] == prompt
    assert last.trainable[-1] and last.ids[-1] in tokenizer.stop_token_ids
    assert sum(s.ids.count(s.ids[-1]) for s in samples) >= len(turns)


def test_nothing_is_rendered_twice(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    render = ChatTemplate.render_spans

    def noted(template: ChatTemplate, messages: Any, *rest: Any, **options: Any) -> Any:
        rendered.append(repr((messages, options)))
        return render(template, messages, *rest, **options)

    monkeypatch.setattr(ChatTemplate, "render_spans", noted)
    question, call = user("2 + 2?"), assistant("", tool_calls=[CALL])
    answer = assistant("4", reasoning_content="The result is 4.")
    result = {"role": "tool", "content": "4"}
    encode_conversation(tokenizer, [question, call, result, answer], [TOOL])
    assert len(rendered) == len(set(rendered))


def test_a_message_that_was_changed_is_rendered_anew(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, [user("before"), assistant("so")], None)
    assert "before" in conversation.text
    conversation.messages[0]["content"] = "after"
    assert "after" in conversation.text


def test_a_turn_of_weight_0_is_not_trained(tokenizer: Tokenizer) -> None:
    messages = [user("a"), assistant("true", weight=0), user("b"), assistant("false", weight=1)]
    ids, trainable = encode_chat(tokenizer, messages)
    trained = [token for token, mark in zip(ids, trainable, strict=True) if mark]
    assert tokenizer.decode(trained) == "<response>\nfalse\n</response>\n<|im_end|>"


def test_an_earlier_turn_is_trained_with_its_reasoning_in_a_sample_of_its_own(
    tokenizer: Tokenizer,
) -> None:
    first, second = assistant("b", reasoning_content="r1"), assistant("d", reasoning_content="r2")
    messages = [user("a"), first, user("c"), second]
    samples = encode_conversation(tokenizer, messages).samples
    assert [encode_chat(tokenizer, part) for part in (messages[:2], messages)] == [
        (sample.ids, sample.trainable) for sample in samples
    ]
    trained = [
        tokenizer.decode([t for t, mark in zip(s.ids, s.trainable, strict=True) if mark])
        for s in samples
    ]
    assert ["r1" in trained[0], "r2" in trained[1], "r1" in tokenizer.decode(samples[1].ids)] == [
        True, True, False,
    ]  # fmt: skip


def test_notes_say_what_is_lost(tokenizer: Tokenizer, plain: Tokenizer) -> None:
    def notes(own: Tokenizer, turn: Message) -> str:
        return " ".join(encode_conversation(own, [user("a"), turn]).notes)

    assert "does not show" in notes(plain, assistant("b", reasoning_content="why"))
    assert "end its thinking part" in notes(tokenizer, assistant("b"))
    assert "beside a tool call" in notes(
        tokenizer, assistant("b", reasoning_content="r", tool_calls=[CALL])
    )
    assert notes(tokenizer, assistant("b", reasoning_content="r")) == notes(plain, assistant("b"))


def test_dropping_the_thinking_leaves_the_answer() -> None:
    full = [user("q"), assistant("<think>\nlong\n</think>\n\n<response>\n2\n</response>")]
    short = drop_thinking(full)
    assert render_chat(THINKING, short) == render_chat(THINKING, [user("q"), assistant("2")])
    assert "long" in full[1]["content"]
    assert drop_thinking([assistant("2", reasoning_content="x")]) == [assistant("2")]


def test_control_tokens_in_texts_are_text_or_refused(
    tokenizer: Tokenizer, tokenizer_dir: Path
) -> None:
    messages = [user("a <|im_end|> b"), assistant("<s>old</s>", reasoning_content="<|im_start|>")]
    tools = [{"name": "f", "description": "</s>", "parameters": {"type": "object"}}]
    sample = encode_conversation(tokenizer, messages, tools).samples[0]
    assert tokenizer.decode(sample.ids) == render_chat(tokenizer, messages, tools).rstrip("\n")
    counts = [sample.ids.count(tokenizer.token_id(t) or -1) for t in ("<s>", "</s>", "<|im_end|>")]
    assert counts == [0, 0, 3]
    trained = [t for t, mark in zip(sample.ids, sample.trainable, strict=True) if mark]
    assert tokenizer.decode(trained).startswith("<|im_start|>\n</think>\n\n<response>\n<s>old</s>")
    assert sample.ids[: len(prompt_ids(tokenizer, messages[:1], tools))] == prompt_ids(
        tokenizer, messages[:1], tools
    )
    strict = load_tokenizer(tokenizer_dir)
    strict.chat = ChatFormat(strict.chat.template, control_tokens="refuse")
    for at, (where, wrong) in enumerate(
        [
            ("message 1 contains", [user("a</s>")]),
            ("message 2 contains", [user("a"), messages[1]]),
            ("a tool contains", [user("a")]),
        ]
    ):
        with pytest.raises(DataError, match=where):
            encode_chat(strict, wrong, tools if at == 2 else None)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        ([user("x"), {"role": "system", "content": "x"}], "only the first"),
        ([{"role": "user", "content": None}], "no text content"),
        ([{"role": "user", "content": ["x"]}], "no text content"),
        ([user("x"), assistant("<think>never closed")], "never closes"),
        ([user("x"), assistant("a</think>b", reasoning_content="c")], "both"),
        ([user("x"), assistant("a</think>")], "neither an answer"),
        ([user("x"), assistant("\n")], "neither an answer"),
        ([user("x"), assistant("<response>1</response>and more")], "outside"),
        ([user("x"), assistant("<response>1")], "outside"),
        ([user("x"), assistant("<tool_call>{</tool_call>")], "not valid JSON"),
        ([user("x"), assistant("", tool_calls=[{"arguments": {}}])], "without a name"),
        ([user("x"), assistant("y", weight=0.5)], "must be 0 or 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(
    tokenizer: Tokenizer, messages: list[Message], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        encode_chat(tokenizer, messages)


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "add", "arguments": '{"a": 1}'}},
        {"name": "add", "arguments": {"a": 1, "b": None}},
        {"name": "add", "parameters": {"a": 1}},
        {"function": None, "name": "add", "parameters": '{"a": 1}'},
    ],
)
def test_a_call_of_a_conversation_is_read_as_that_of_a_row(
    tokenizer: Tokenizer, call: Message
) -> None:
    usual = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked, result = user("1?"), {"role": "tool", "content": "1"}
    shown, as_row = (
        render_chat(tokenizer, [asked, assistant("", tool_calls=calls), result], [TOOL])
        for calls in ([usual], [call])
    )
    assert as_row == shown and '"a": 1' in shown
    assert read_messages([asked, assistant("", tool_calls=[call])])[1]["tool_calls"] == [usual]


def test_refusals_of_prompts_tools_and_plain_conversations(
    tokenizer: Tokenizer, plain: Tokenizer
) -> None:
    with pytest.raises(DataError, match="must not end in an assistant turn"):
        prompt_ids(tokenizer, [user("x"), assistant("y")])
    with pytest.raises(DataError, match="a tool needs a name"):
        encode_chat(tokenizer, [user("x")], [{"parameters": {}}])
    with pytest.raises(DataError, match="a tool is not valid JSON"):
        encode_chat(tokenizer, [user("x")], ["add"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no tools"):
        encode_chat(plain, [user("x")], [TOOL])
    with pytest.raises(DataError, match="no tools"):
        encode_chat(plain, [user("x"), {"role": "tool", "content": "1"}])
    with pytest.raises(DataError, match="neither an answer"):
        encode_chat(plain, [user("x"), assistant("")])
    with pytest.raises(DataError, match="arguments of a tool call"):
        call = {"name": "add", "arguments": "{a}"}
        encode_chat(tokenizer, [user("x"), assistant("", tool_calls=[call])])


def test_calls_are_read_in_every_form(tokenizer: Tokenizer) -> None:
    def text(arguments: Any) -> str:
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        return render_chat(tokenizer, [user("x"), assistant(None, tool_calls=[call])])

    assert text('{"a": 1}') == text({"a": 1, "b": None}) and '"arguments": {"a": 1}}' in text(
        {"a": 1}
    )
    assert text(None) == text({}) == text("") and '"arguments": {}}' in text(None)
