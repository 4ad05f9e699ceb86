"""Rows of public kinds: the messages that each gives, and what of it is trained."""

import random
import re
from typing import Any

import pytest

from ernie_train.data import DataSource, Tokenizer, encode_chat, load_sources
from ernie_train.data.formats import FORMATS, ColumnMap, RowError, detect_format
from ernie_train.data.reader import Record, read_records
from tests.data.format_rows import ANSWER, ASK, CHATS, TIDE, said


def read_one(write_rows: Any, row: dict[str, Any]) -> Record:
    (record,), report = read_records(write_rows("rows.jsonl", [row]))
    assert not report.bad.count and not report.dropped
    return record


@pytest.mark.parametrize("name", CHATS)
def test_conversations(write_rows: Any, tokenizer: Tokenizer, name: str) -> None:
    row, messages = CHATS[name]
    record = read_one(write_rows, row)
    assert record.kind == "chat" and record.messages == messages
    entry = DataSource(path="rows.jsonl")
    path = write_rows("rows.jsonl", [row])
    (documents,), _ = load_sources(
        [entry], tokenizer, kind="sft", seq_len=2048, base_dir=path.parent
    )
    ids, trained = encode_chat(tokenizer, messages, record.tools)
    assert documents[0].ids.tolist() == ids and documents[0].trainable.tolist() == trained
    assert any(trained)


def test_flags_decide_what_is_trained(write_rows: Any, tokenizer: Tokenizer) -> None:
    row = {"src": ["high?", "low?"], "tgt": ["noon", "six"], "label": [0, 1]}
    path = write_rows("rows.jsonl", [row])
    (documents,), _ = load_sources(
        [DataSource(path=path.name)], tokenizer, kind="sft", seq_len=512, base_dir=path.parent
    )
    trained = tokenizer.decode(documents[0].ids[documents[0].trainable].tolist())
    assert "six" in trained and "noon" not in trained


def test_no_null_reaches_the_tools(write_rows: Any) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "tide",
            "description": None,
            "parameters": {
                "type": "object",
                "properties": {"port": {"type": "string", "enum": ["Emden", None]}, "day": None},
            },
        },
    }
    tools = read_one(write_rows, {"messages": [ASK, ANSWER], "tools": [tool]}).tools
    assert tools is not None
    function = tools[0]["function"]
    assert function.keys() == {"name", "parameters"}
    # Arrow writes no null into a list: this one is a choice that the schema offers.
    assert function["parameters"]["properties"] == {
        "port": {"type": "string", "enum": ["Emden", None]}
    }


OTHER = said("at six")
PAIRS: dict[str, dict[str, Any]] = {
    "trl texts": {"prompt": ASK["content"], "chosen": "at noon", "rejected": "at six"},
    "trl messages": {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
    "trl conversations": {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
    "whole conversations beside a prompt": {
        "prompt": ASK["content"],
        "prompt_id": "7",
        "chosen": [ASK, ANSWER],
        "rejected": [ASK, OTHER],
        "messages": [ASK, ANSWER],
        "score_chosen": 8.0,
    },
    "paddleformers": {
        "messages": [ASK],
        "chosen_response": [ANSWER],
        "rejected_response": [OTHER],
    },
    "swift": {"messages": [ASK, ANSWER], "rejected_response": "at six"},
    "erniekit": {
        "src": [ASK["content"]],
        "tgt": [],
        "response": [["at six"], ["at noon"]],
        "sort": [0, 1],
    },
    "erniekit of texts": {
        "src": [ASK["content"]],
        "response": ["at noon", "at six"],
        "sort": [1, 0],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASK["content"]}],
        "chosen": {"from": "gpt", "value": "at noon"},
        "rejected": {"from": "gpt", "value": "at six"},
    },
    "alpaca": {
        "instruction": ASK["content"],
        "input": None,
        "output": None,
        "chosen": "at noon",
        "rejected": "at six",
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences(write_rows: Any, name: str) -> None:
    record = read_one(write_rows, PAIRS[name])
    assert record.kind == "preference" and record.messages == [ASK]
    assert (record.chosen, record.rejected) == ([ANSWER], [OTHER])


PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "verl": (
        {
            "data_source": "ports",
            "prompt": [ASK],
            "ability": "tides",
            "reward_model": {"style": "rule", "ground_truth": "noon"},
            "extra_info": {"index": 0, "split": None},
        },
        {"answer": "noon", "task": "ports", "domain": "tides"},
    ),
    "trl": ({"prompt": ASK["content"], "solution": "noon"}, {"answer": "noon"}),
    "its own names come first": (
        {"prompt": [ASK], "solution": "because", "answer": "noon", "task": "t", "data_source": "d"},
        {"answer": "noon", "task": "t"},
    ),
    "question and answer": (
        {"question": ASK["content"], "answer": "it is\n#### noon", "answers": None},
        {"answer": "it is\n#### noon"},
    ),
    "an answer that is a number": ({"question": ASK["content"], "answer": 12}, {"answer": "12"}),
    "a decimal": ({"prompt": ASK["content"], "ground_truth": 1e-05}, {"answer": "1e-05"}),
    "a number of verl": (
        {"prompt": [ASK], "reward_model": {"ground_truth": 204}},
        {"answer": "204"},
    ),
    "no number": ({"question": ASK["content"], "answer": True}, {"answer": True}),
    "the place of a choice": (
        {"question": ASK["content"], "choices": ["six", "noon"], "answer": 1},
        {"answer": "noon"},
    ),
    "a number beside choices": (
        {"question": ASK["content"], "choices": ["6", "12"], "answer": 12},
        {"answer": "12"},
    ),
    "bfcl": ({"question": [[ASK]], "function": [TIDE]}, {"tools": [TIDE]}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(write_rows: Any, name: str) -> None:
    row, fields = PROBLEMS[name]
    record = read_one(write_rows, row)
    assert record.prompt_messages == [ASK]
    assert {key: record.fields.get(key) for key in fields} == fields
    assert None not in record.fields.values()


@pytest.mark.parametrize("key", ["answer", "solution", "response", "completion", "output"])
def test_an_answer_that_is_a_number_is_trained_as_its_text(write_rows: Any, key: str) -> None:
    asked = {"completion": "prompt", "output": "instruction"}.get(key, "question")
    record = read_one(write_rows, {asked: ASK["content"], key: 12})
    assert record.kind == "chat" and record.messages == [ASK, said("12")]
    untold = {asked: ASK["content"], key: float("nan")}
    records, report = read_records(write_rows("rows.jsonl", [untold]), max_bad_fraction=1)
    assert report.bad.count or records[0].kind == "prompt"


@pytest.mark.parametrize(("asked", "told"), [("instruction", "output"), ("prompt", "completion"),
                                             ("problem", "solution")])  # fmt: skip
@pytest.mark.parametrize("thought", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_beside_an_answer_is_read_and_no_unread_key(
    write_rows: Any, tokenizer: Tokenizer, asked: str, told: str, thought: str
) -> None:
    row = {asked: ASK["content"], told: "at noon", thought: "the table says so", "rating": 5}
    record = read_one(write_rows, row)
    assert record.messages == [ASK, said("at noon", reasoning_content="the table says so")]
    path = write_rows("rows.jsonl", [row])
    _, report = load_sources(
        [DataSource(path=path.name)], tokenizer, kind="sft", seq_len=512, base_dir=path.parent
    )
    assert report.sources[0].unread == {"rating": 1}


def test_a_program_beside_tests_is_no_answer(write_rows: Any) -> None:
    row = {"prompt": "double x", "solution": "def f(x): return 2 * x", "tests": [[[1], 2]]}
    assert "answer" not in read_one(write_rows, row).fields


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASK, said("a", loss=0.5)]}, "message 2: loss must be true or false"),
        ({"messages": [ASK, said("a", weight="no")]}, "message 2: weight must be true or false"),
        ({"messages": [ASK, said("a", weight=1, loss=False)]}, "contradict each other"),
        ({"messages": [{**ASK, "loss": True}, ANSWER]}, r"message 1 \(user\) is to be trained"),
        ({"messages": [ASK, said("a", train_detail=[{"begin": 0}])]}, "train_detail cannot be"),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "images cannot be trained"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "content that is not text",
        ),
        ({"messages": [ASK, said("a", reasoning="r", thinking="s")]}, "two different reasonings"),
        ({"messages": [ASK, ANSWER], "label": [1, 0]}, "label has 2 entries for 1 answers"),
        ({"messages": [ASK, ANSWER], "label": ["yes"]}, "a label must be true or false"),
        ({"messages": [ASK, said("a", weight=1)], "label": [0]}, "label and the flags"),
        ({"messages": [ASK, ANSWER], "weight": 0.3}, "weight must be true or false"),
        ({"prompt": "q", "completion": "a", "label": False}, r"\(KTO\), which no stage trains"),
        ({"messages": [ASK, ANSWER], "system": "s", "tools": "{"}, "tools is not valid JSON"),
        ({"messages": [ASK, ANSWER], "tools": ["{"]}, "a tool is not valid JSON"),
        ({"src": ["q", "r"], "tgt": ["a"]}, "2 src and 1 tgt do not make a conversation"),
        ({"src": ["q"], "tgt": [3]}, "tgt must be a text or a list of texts"),
        ({"src": ["q"], "tgt": [], "response": ["a", "b"]}, "sort must hold two different"),
        ({"src": ["q"], "response": ["a", "b"], "sort": [1, 1]}, "sort must hold two different"),
        ({"src": ["q"], "response": ["a"], "sort": [1, 0]}, "response must hold two answers"),
        ({"src": ["s", "q"], "tgt": ["x", "a"], "is_system": 1}, "first src is the system"),
        (
            {"prompt": "q", "chosen": [ANSWER, ASK], "rejected": "b"},
            "chosen must begin and end with an answer",
        ),
        ({"chosen": [ASK, ANSWER, ASK], "rejected": [ASK, OTHER]}, "chosen must begin and end"),
        (
            {"messages": [{"role": "x" * 9999, "content": "q"}]},
            r"role 'x{59}\.\.\.; a message needs",
        ),
        ({"messages": "[{"}, "messages is not valid JSON"),
        ({"messages": [ASK], "rejected_response": "b"}, "must end with the preferred answer"),
    ],
)
def test_what_cannot_be_trained_as_asked_is_refused(
    write_rows: Any, row: dict[str, Any], reason: str
) -> None:
    _, report = read_records(write_rows("rows.jsonl", [row]), max_bad_fraction=1)
    assert report.bad.count == 1
    assert re.search(reason, report.bad.listed[0].reason), report.bad.listed[0].reason


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, said(" \n")]},
        {"instruction": "q", "output": "\t"},
        {"prompt": "q", "completion": " "},
        {"prompt": "q", "chosen": "a", "rejected": "  "},
        {"question": "q", "answer": "\n"},
    ],
)
def test_blank_answers_are_left_out_and_counted(write_rows: Any, row: dict[str, Any]) -> None:
    good = {"messages": [ASK, ANSWER]}
    records, report = read_records(write_rows("rows.jsonl", [good, row]), max_bad_fraction=0)
    assert len(records) == 1 and report.dropped == {"with a blank answer": 1}


KEYS_OF_ROWS = """
messages conversations prompt completion chosen rejected rejected_response instruction input output
history system tools label weight loss question answer response src tgt sort is_system text
reward_model context reasoning images query
"""
KEYS_OF_TURNS = "content value tool_calls function_call reasoning thinking weight loss images"
ROW_KEYS, TURN_KEYS = KEYS_OF_ROWS.split(), KEYS_OF_TURNS.split()


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 3 or kind < 0.4:
        texts = ("", "x", " ", "[", "[]", "{}", "[1]", '[{"role": "user", "content": "q"}]')
        return rng.choice([None, 0, 1, 2.5, True, False, float("nan"), *texts])
    if kind < 0.6:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.8:
        return random_turn(rng, depth)
    keys = ("type", "text", "function", "arguments", "name", "ground_truth")
    return {rng.choice(keys): random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def random_turn(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    roles = ["user", "assistant", "tool", "system", "human", "gpt", "function_call", "observation"]
    turn = {"role": rng.choice(roles), "content": rng.choice(["x", "y", random_value(rng, 3)])}
    extra = {rng.choice(TURN_KEYS): random_value(rng, depth + 1) for _ in range(rng.randint(0, 2))}
    return {**turn, **extra}


def test_no_row_is_more_than_a_bad_row() -> None:
    rng = random.Random(5)
    read = 0
    for _ in range(5000):
        row = {rng.choice(ROW_KEYS): random_value(rng) for _ in range(rng.randint(1, 5))}
        for key in rng.sample(("messages", "prompt", "chosen", "rejected"), 2):
            if rng.random() < 0.5:
                row[key] = [random_turn(rng) for _ in range(rng.randint(0, 4))]
        row = ColumnMap(None)(row)
        name = detect_format(row)
        try:
            record = FORMATS[name].read(row) if name else None
        except RowError:
            continue
        if record is not None:
            read += 1
            turns = [*record.messages, *(record.chosen or []), *(record.rejected or [])]
            assert all(isinstance(turn["content"], str) for turn in turns)
            assert {turn["role"] for turn in turns} <= {"system", "user", "assistant", "tool"}
    assert read > 100


def test_formats_may_change_from_row_to_row(write_rows: Any) -> None:
    rows = [CHATS["gsm8k"][0], {"messages": [ASK, ANSWER]}, PAIRS["trl texts"]]
    records, report = read_records(write_rows("rows.jsonl", rows))
    assert [r.kind for r in records] == ["chat", "chat", "preference"]
    assert report.format == "question_answer+messages+preference"


def test_keys_that_nothing_reads_are_told(write_rows: Any, tokenizer: Tokenizer) -> None:
    row = {"messages": [ASK, {**ANSWER, "rating": 5, "name": "n"}], "quality": 3, "task": "tides"}
    path = write_rows("rows.jsonl", [row, row, {"messages": [ASK, ANSWER]}])
    _, report = load_sources(
        [DataSource(path=path.name)], tokenizer, kind="sft", seq_len=512, base_dir=path.parent
    )
    assert report.sources[0].unread == {"messages.rating": 2, "quality": 2}
    assert "messages.rating (2), quality (2)" in str(report.as_table().caption)
