"""Columns with names of their own: renamed, cut, dug out, constant; and mistakes in them."""

from typing import Any

import pytest

from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.data import DataSource, MappedRows, Tokenizer, load_sources, parse_columns
from ernie_train.data.reader import Record, read_records

GSM = {"question": "A box holds 6. And 7 boxes?", "answer": "7 * 6 #### is\n#### 42 "}


def columns_of(columns: Any) -> Any:
    return parse_config(MappedRows, {"columns": columns}, "recipe").columns


def read_one(write_rows: Any, row: dict[str, Any], columns: Any) -> Record:
    path = write_rows("rows.jsonl", [row])
    (record,), _ = read_records(path, max_bad_fraction=0, columns=columns_of(columns))
    return record


def test_a_problem_out_of_columns(write_rows: Any) -> None:
    columns = {
        "prompt": "question",
        "answer": {"column": "answer", "after": "####"},
        "domain": {"value": "math"},
        "reward": {"value": "math"},
        "difficulty": {"value": 2},
    }
    record = read_one(write_rows, GSM, columns)
    assert record.kind == "prompt" and record.messages[0]["content"] == GSM["question"]
    assert record.fields == {"answer": "42", "domain": "math", "reward": "math", "difficulty": 2}


def test_columns_that_are_not_mapped_keep_their_names(write_rows: Any) -> None:
    row = {"ask": "q", "reply": "a", "task": "t", "system": "be brief", "note": None}
    record = read_one(write_rows, row, {"prompt": "ask", "completion": "reply"})
    assert [m["content"] for m in record.messages] == ["be brief", "q", "a"]
    assert record.fields == {"task": "t"}


@pytest.mark.parametrize(
    ("path", "value"),
    [("a.b.c", "x"), ("turns.1.text", "second"), ("dotted.name", "y"), ("scores.0", "3")],
)
def test_paths_lead_into_structs_and_lists(write_rows: Any, path: str, value: Any) -> None:
    row = {
        "prompt": "q",
        "a": {"b": {"c": "x"}},
        "turns": [{"text": "first"}, {"text": "second"}],
        "dotted.name": "y",
        "scores": [3],
    }
    assert read_one(write_rows, row, {"answer": path}).fields["answer"] == value


def test_a_null_column_is_absent(write_rows: Any) -> None:
    rows = [{"q": "q", "r": None}, {"q": "q", "r": "a"}]
    path = write_rows("rows.jsonl", rows)
    columns = columns_of({"question": "q", "answer": "r"})
    first, second = read_records(path, columns=columns)[0]
    assert (first.kind, second.kind) == ("prompt", "chat")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "frage"},
            r"columns\.prompt: frage: no row has .* answer, question",
        ),
        ({"question": "prompt", "answer": "question"}, r"columns\.question: prompt: no row"),
        ({"prompt": "turns.²"}, r"columns\.prompt: turns\.²: no row"),
        ({"answer": {"column": "answer", "after": "####!"}}, r"rows\.jsonl:1: answer: there is no"),
        ({"prompt": "question.x"}, r"columns\.prompt: question\.x: no row has this column"),
    ],
)
def test_columns_that_do_not_fit_the_rows(write_rows: Any, columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_one(write_rows, GSM | {"turns": ["x"]}, columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "columns"),
        ({"prompt": 3}, r"columns\.prompt"),
        ({"prompt": {}}, "exactly one of column and value"),
        ({"prompt": {"column": "a", "value": 1}}, "exactly one of column and value"),
        ({"prompt": {"value": "a", "after": "x"}}, "after needs a column"),
        ({"prompt": {"colum": "a"}}, "colum"),
    ],
)
def test_mistakes_in_columns_are_those_of_the_recipe(columns: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(DataSource, {"path": "x", "columns": columns}, "recipe")


def test_columns_of_the_command_line() -> None:
    columns = parse_columns("{prompt: question, reward: {value: math}}", "--columns")
    assert set(columns) == {"prompt", "reward"}
    for text in ("", "prompt", "{prompt: {}}", "{prompt: ["):
        with pytest.raises(ConfigError, match="--columns"):
            parse_columns(text, "--columns")


def test_recorded_settings_without_columns_are_those_of_before() -> None:
    assert "columns" not in DataSource(path="x").model_dump(mode="json")
    source = DataSource(path="x", columns={"prompt": "q"})
    assert source.model_dump(mode="json")["columns"] == {"prompt": "q"}


def test_sft_trains_the_mapped_columns(write_rows: Any, tokenizer: Tokenizer) -> None:
    path = write_rows("rows.jsonl", [{"ask": "how many?", "reply": "seven", "gold": 7}])
    source = {"path": path.name, "columns": {"prompt": "ask", "completion": "reply"}}
    (documents,), _ = load_sources(
        [parse_config(DataSource, source, "recipe")],
        tokenizer,
        kind="sft",
        seq_len=256,
        base_dir=path.parent,
    )
    document = documents[0]
    assert "seven" in tokenizer.decode(document.ids[document.trainable].tolist())
    assert "how many?" in tokenizer.decode(document.ids.tolist())


def test_what_verifiers_take_as_lists_may_be_json_text_as_csv_has_it(write_rows: Any) -> None:
    row = {"prompt": "q", "choices": '["six", "noon"]', "answer": 1, "expected_calls": "[]",
           "assignment": '{"Zoey": true}', "rubric": "[no JSON", "note": "[1]"}  # fmt: skip
    assert read_one(write_rows, row, {"prompt": "prompt"}).fields == {
        "choices": ["six", "noon"], "answer": "noon", "expected_calls": [],
        "assignment": {"Zoey": True}, "rubric": "[no JSON", "note": "[1]"}  # fmt: skip
