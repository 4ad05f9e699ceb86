"""The parser of completions against hand-written cases, the writer, and hostile text."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.data.completion_format import (
    RESPONSE_CLOSE,
    THINK_CLOSE,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    format_completion,
    parse_completion,
    tool_call_block,
)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nwhy\n</think>\n\n<response>\n12\n</response>\n",
        "why\n</think>\n\n<response>\n12\n</response>\n<|im_end|>\n",
        "<think>why</think><response>12</response>",
        " \n<think>\nwhy\n</think>\n\n\n\n\n<response>\n12\n</response></s>",
        "\nwhy\n\n</think> \n<response>12</response>",
    ],
)
def test_reads_every_spelling_of_the_format(text: str) -> None:
    parsed = parse_completion(text)
    assert (parsed.thinking, parsed.response) == ("why", "12")
    assert parsed.finished_thinking and parsed.tool_calls == [] and parsed.stray == []


def test_without_a_closing_tag_everything_is_reasoning() -> None:
    parsed = parse_completion("<think>\nfirst\n<response>\n12\n</response>\n")
    assert parsed.thinking == "first\n<response>\n12\n</response>"
    assert parsed.response is None and not parsed.finished_thinking


def test_a_model_without_thinking_answers_directly() -> None:
    parsed = parse_completion("12<|end_of_sentence|>", thinking=False)
    assert parsed.thinking is None and parsed.response == "12"


def test_an_unclosed_response_is_stray() -> None:
    parsed = parse_completion("a</think>\n<response>\n12")
    assert parsed.response is None and parsed.stray == ["<response>\n12"]


def test_text_outside_of_blocks_and_second_responses_are_stray() -> None:
    parsed = parse_completion(
        "a</think>so<response>1</response>\nand <response>2</response>\nend</think>"
    )
    assert parsed.response == "1"
    assert parsed.stray == ["so", "and", "<response>2</response>", "end</think>"]


def test_indentation_of_the_response_stays() -> None:
    code = "    def f():\n        return 1"
    assert parse_completion(format_completion("r", code)).response == code


def test_tool_calls_are_typed() -> None:
    parsed = parse_completion(
        'x</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": 2}]}}\n</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": "{\\"c\\": 3}"}</tool_call>'
    )
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [
        ("f", {"a": [1, {"b": 2}]}),
        ("g", {"c": 3}),
    ]
    assert parsed.tool_calls[0].raw == '{"name": "f", "arguments": {"a": [1, {"b": 2}]}}'


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "not json",
        '["f"]',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {}} trailing',
        '{"name": "f", "arguments": "{"}',
        '{"name": "f", "arguments": {"a": 1, "a": 2}}',
        '{"name": "f", "name": "g", "arguments": {}}',
        '{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}',
        '{"name": "f", "arguments": {"a": {"b": 1, "b": 1}}}',
        '{"a":' * 100_000,
        '{"name": "f", "arguments": {"a": ' + "9" * 10_000 + "}}",
    ],
)
def test_a_malformed_call_has_no_arguments(body: str) -> None:
    parsed = parse_completion(f"x</think><tool_call>{body}</tool_call><response>1</response>")
    assert len(parsed.tool_calls) == 1 and parsed.tool_calls[0].arguments is None
    assert parsed.response == "1"


def test_a_closing_tag_inside_a_json_string_does_not_end_the_call() -> None:
    arguments = {"text": f"a {TOOL_CALL_CLOSE} b {TOOL_CALL_OPEN}"}
    parsed = parse_completion(format_completion("r", tool_calls=[("say", arguments)]))
    assert [call.arguments for call in parsed.tool_calls] == [arguments] and parsed.stray == []


def test_an_unclosed_call_is_stray() -> None:
    parsed = parse_completion('x</think><tool_call>{"name": "f", "arguments": {}}')
    assert parsed.tool_calls == [] and len(parsed.stray) == 1


@pytest.mark.parametrize(
    "unit",
    [
        "<tool_call>{",
        "<tool_call>{}",
        "<tool_call>{</tool_call>",
        "<response></response>",
        "} ",
        "</s>",
        "</s>\n",
    ],
)
def test_hostile_repetition_takes_linear_time(unit: str) -> None:
    started = time.monotonic()
    parse_completion("</think>" + unit * (200_000 // len(unit)))
    assert time.monotonic() - started < 5  # 0.2 MB; a quadratic scan takes a minute


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=6,
)
STOPS = ("<|im_end|>", "<|end_of_sentence|>", "</s>")
plain = st.text(max_size=60).filter(lambda text: not any(stop in text for stop in STOPS))


@given(
    plain.filter(lambda t: THINK_CLOSE not in t and not t.strip().startswith("<think>")),
    st.none() | plain.filter(lambda t: RESPONSE_CLOSE not in t),
    st.lists(st.tuples(plain, st.dictionaries(plain, json_values, max_size=3)), max_size=3),
)
def test_what_is_written_is_read_back(
    reasoning: str, response: str | None, calls: list[tuple[str, dict[str, object]]]
) -> None:
    written = format_completion(reasoning, response, calls)
    if any(stop in written for stop in STOPS):  # may come from nested JSON strings
        return
    parsed = parse_completion(written)
    assert parsed.thinking == reasoning.strip("\n")
    assert parsed.response == (None if response is None else response.strip("\n"))
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == calls
    assert parsed.stray == []
    # The generation prompt holds the opening tag, so the model's own text lacks it.
    assert parse_completion(written.removeprefix("<think>\n")) == parsed


@given(st.text(max_size=200) | st.lists(st.sampled_from(
    ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "{", "}",
     '"name"', ":", '"', "\n", " ", "a", "</s>"])).map("".join))  # fmt: skip
def test_parsing_never_raises(text: str) -> None:
    parsed = parse_completion(text)
    assert parsed.finished_thinking == (THINK_CLOSE in text)
    json.dumps([call.arguments for call in parsed.tool_calls])


def test_tool_calls_without_a_thinking_part_are_read():
    call = tool_call_block("get", {"city": "Oslo"})
    parsed = parse_completion(f"Let me look.\n{call}", thinking=False)
    assert [c.name for c in parsed.tool_calls] == ["get"]
    assert parsed.tool_calls[0].arguments == {"city": "Oslo"}
    assert (parsed.thinking, parsed.response, parsed.stray) == (None, "Let me look.", [])
    tagged = parse_completion(f"Let me look.\n{call}", thinking=False, tagged=True)
    assert (tagged.response, tagged.stray) == (None, ["Let me look."])
    assert parse_completion("<tool_call> is a tag", thinking=False).response == (
        "<tool_call> is a tag"
    )


def test_a_stop_token_as_text_ends_nothing() -> None:
    call = tool_call_block("write", {"text": "<s>old</s> and <|im_end|> here"})
    parsed = parse_completion(f"plan\n</think>\n\n{call}<|im_end|>")
    assert parsed.tool_calls[0].arguments == {"text": "<s>old</s> and <|im_end|> here"}
    assert parse_completion("a</s>b</s>\n", thinking=False).response == "a</s>b"
    after = parse_completion("why\n</think>\n<|im_end|>\n<response>\n12\n</response>")
    assert (after.response, after.stray) == (None, [])


def test_answers_without_tags_count_where_the_format_has_none() -> None:
    text = "<think>\n12\n</think>\n\nThe answer is 12."
    assert parse_completion(text).response is None
    plain = parse_completion(text, thinking=False)
    assert (plain.thinking, plain.response) == ("12", "The answer is 12.")
    assert parse_completion("12\n</think>\n\n13", tagged=False).response == "13"
    assert not parse_completion("<think>\n12", thinking=False).finished_thinking
