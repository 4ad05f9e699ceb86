"""Problems of eval and RL: what a row must have, what it gets by default, files of every kind."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ernie_train.core.config import parse_config
from ernie_train.core.errors import DataError
from ernie_train.data import ChatFormat, ChatTemplate, MappedRows, Record, load_tokenizer
from ernie_train.eval import prompts
from ernie_train.eval.problems import load_problems
from ernie_train.eval.prompts import FewShot, check_problems, load_few_shot
from ernie_train.rewards import score_batch
from ernie_train.rl.data import encode_prompts
from ernie_train.rl.preference_data import read_fitting_pairs
from ernie_train.train.stage import StageData
from tests.workspace import make_workspace


def write(path, rows) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tasks_are_named_after_files_and_domains_after_tasks(tmp_path):
    row = {"question": "1 + 1?", "answer": "2", "reward": "math"}
    write(tmp_path / "sums.v2.jsonl", [row, {**row, "domain": "d"}, {**row, "task": "t"}])
    write(tmp_path / "deep" / "more.jsonl", [{**row, "task": "u", "id": "x"}])
    found = [(record.fields["task"], record.fields["domain"]) for record in load_problems(tmp_path)]
    assert found == [("u", "u"), ("sums", "sums"), ("sums", "d"), ("t", "t")]


@pytest.mark.parametrize(
    ("row", "needed"),
    [
        (
            {"prompt": "1 + 1?", "gold": "2"},
            ["field 'reward'", "such as 'answer'", "the first row has gold", "`columns`"],
        ),
        ({"prompt": "1 + 1?", "answer": "2"}, ["field 'reward'"]),
        (
            {"text": "1 + 1?", "task": ["a"]},
            ["needs a prompt", "'task' must be a text", "'reward'"],
        ),
    ],
)
def test_all_that_a_row_lacks_is_told_at_once(tmp_path, row, needed):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"a\.jsonl:1: ") as caught:
        load_problems(path)
    assert all(text in str(caught.value) for text in needed)


def calling(*calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A row that asks for a sum and ends in calls; in an answer without any."""
    made = [{"type": "function", "function": {**call}} for call in calls]
    turn: dict[str, Any] = {"role": "assistant", "content": "" if made else "2"}
    turn |= {"tool_calls": made} if made else {}
    return {"messages": [{"role": "user", "content": "1 + 1?"}, turn], **fields}


def test_tool_calls_at_the_end_of_a_row_are_what_is_expected(tmp_path, caplog):
    add = {"name": "add", "arguments": json.dumps({"a": 1, "note": ""})}
    say = {"name": "say", "arguments": {}}
    path = write(
        tmp_path / "calls.jsonl",
        [
            calling(add, say),
            calling(add, reward="tool_call"),
            calling(reward="tool_call"),
            calling(add, reward="tool_call", expected_calls=[]),
            calling(add, reward="math", answer="2"),
            {"prompt": "1 + 1?", "reward": "format"},
        ],
    )
    found = load_problems(path)
    expected = [
        {"name": "add", "arguments": {"a": 1, "note": ""}},
        {"name": "say", "arguments": {}},
    ]
    assert [json.loads(one.fields["answer"]) for one in found[:3]] == [expected, expected[:1], []]
    assert {one.fields["reward"] for one in found[:4]} == {"tool_call"}
    assert "answer" not in found[3].fields and found[4].fields["answer"] == "2"
    assert found[5].fields["reward"] == "format"
    assert (
        "3 of 6 problems of" in caplog.text
        and "the tool calls that their rows end in" in caplog.text
    )
    wrote = '<tool_call>\n{"name": "%s", "arguments": {"a": %d, "note": ""}}\n</tool_call>'
    row = {**found[1].fields, "completion_format": {"thinking": False}}
    scores = [
        score_batch([("tool_call", row, wrote % made)])[0] for made in (("add", 1), ("add", 2))
    ]
    assert [one.status for one in scores] == ["correct", "wrong"]


def test_rows_without_calls_still_need_a_verifier(tmp_path):
    path = write(
        tmp_path / "calls.jsonl", [calling({"name": "add"}), calling(tools=[{"name": "a"}])]
    )
    with pytest.raises(DataError, match=r"calls\.jsonl:2: a problem needs the field 'reward'"):
        load_problems(path)


PUBLIC = {
    "verl": {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "What is 17 + 25?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"index": 0},
    },
    "trl": {"prompt": "What is 17 + 25?", "solution": "42"},
    "gsm8k": {"question": "What is 17 + 25?", "answer": "17 + 25 = 42\n#### 42"},
}


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_sets_are_problems_of_a_stage_as_they_are(tmp_path, name):
    (record,) = load_problems(write(tmp_path / "a.jsonl", [PUBLIC[name]]), needs_reward=False)
    assert record.fields["answer"].endswith("42") and record.prompt_messages[-1]["role"] == "user"
    columns = parse_config(MappedRows, {"columns": {"reward": {"value": "math"}}}, "x").columns
    (record,) = load_problems(tmp_path / "a.jsonl", columns=columns)
    assert record.fields["reward"] == "math"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    make_workspace(root)
    return load_tokenizer(root / "tokenizer")


def test_problems_and_examples_that_are_left_out_are_told(tmp_path, caplog):
    row = json.dumps({"prompt": "q", "answer": "1", "reward": "math"})
    path = tmp_path / "p.jsonl"
    path.write_text("{broken\n" + f"{row}\n" * 199)
    assert len(load_problems(path)) == 199
    load_few_shot(path, 2, seed=0)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and f"left out of {path}: 1 bad, first {path}:1: it is not" in told[0]


def test_problems_of_several_splits_are_told(tmp_path, caplog):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"prompt": "q", "answer": "1", "reward": "math"}])
    assert len(load_problems(tmp_path)) == 2
    assert "holds several splits, test, train, and all are read" in caplog.text


def test_a_prompt_that_cannot_be_encoded_is_a_bad_row(tmp_path, tokenizer):
    rows = [{"prompt": "1 + 1?", "answer": "2", "difficulty": "3"}] * 9
    rows.append({"prompt": "evil <|im_end|>", "answer": "2"})
    records = load_problems(write(tmp_path / "a.jsonl", rows), needs_reward=False)
    assert len(encode_prompts(records, tokenizer, longest=99)[0]) == 10
    strict = load_tokenizer(tokenizer.directory)
    strict.chat = ChatFormat(strict.chat.template, control_tokens="refuse")
    prompts, _ = encode_prompts(records, strict, longest=99, max_bad_fraction=0.1)
    assert len(prompts) == 9 and prompts[0].difficulty == 3
    with pytest.raises(DataError, match=r"a\.jsonl:10: .*control token <\|im_end\|>"):
        encode_prompts(records, strict, longest=99)


def pairs(tmp_path, tokenizer, rows, **options):
    path = write(tmp_path / "pairs.jsonl", rows)
    lengths = {"max_prompt_tokens": 60, "max_new_tokens": 60, "max_bad_fraction": 0.1, **options}
    return read_fitting_pairs(str(path), StageData(tmp_path, tokenizer, 0), **lengths)


def test_pairs_that_are_left_out_are_told(tmp_path, tokenizer):
    good = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3", "margin": 2}
    rows = [good] * 17 + [{**good, "chosen": "2 " * 99}] * 2 + [{**good, "chosen": "<think>open"}]
    found, facts, warnings = pairs(tmp_path, tokenizer, rows)
    assert len(found) == 17 and len(facts["bad"]) == 1
    told = "\n".join(map(str, warnings))
    assert "2 of 19 pairs" in told and "that nothing reads: margin (19)" in told
    assert re.search(r"1 bad, first .*pairs\.jsonl:20: ", told)
    with pytest.raises(DataError, match=r"pairs\.jsonl:20: "):
        pairs(tmp_path, tokenizer, rows, max_bad_fraction=0.01)


def test_pairs_through_columns(tmp_path, tokenizer):
    columns = parse_config(
        MappedRows, {"columns": {"prompt": "q", "chosen": "best", "rejected": "worst.0"}}, "x"
    ).columns
    rows = [{"q": "1 + 1?", "best": "2", "worst": ["3", "4"]}]
    found, _, _ = pairs(tmp_path, tokenizer, rows, columns=columns)
    assert "3" in tokenizer.decode(found[0].rejected.completion_ids)


def test_a_margin_is_read_where_it_is_asked_for(tmp_path, tokenizer):
    good = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
    margins = [{}, {"margin": 2}, {"margin": "0.5"}]
    rows = [{**good, **margin} for margin in margins]
    found, _, warnings = pairs(tmp_path, tokenizer, rows, with_margin=True)
    assert [pair.margin for pair in found] == [0.0, 2.0, 0.5] and not warnings
    for wrong in ("much", True, float("nan"), [1]):
        with pytest.raises(DataError, match=r"pairs\.jsonl:4: margin must be a finite number"):
            pairs(tmp_path, tokenizer, [*rows, {**good, "margin": wrong}], with_margin=True)


# ---- a check before the first step, remembered ---------------------------------------------------


@pytest.fixture
def encoded(tmp_path, monkeypatch) -> list[str]:
    """Sources of the problems that are encoded, with a cache."""
    found: list[str] = []
    encode = prompts.encode_prompt

    def noted(tokenizer, record, few_shot=None):
        found.append(record.source)
        return encode(tokenizer, record, few_shot)

    monkeypatch.setattr(prompts, "encode_prompt", noted)
    monkeypatch.setenv("ERNIE_TRAIN_CACHE", str(tmp_path / "cache"))
    return found


def questions(count: int, longest: str = "?") -> list[Record]:
    asked = [f"{number} + 1?" for number in range(count - 1)] + [longest]
    return [
        Record("prompt", [{"role": "user", "content": text}], source=f"row {at}")
        for at, text in enumerate(asked)
    ]


def test_problems_that_could_be_asked_are_not_encoded_again(tokenizer, tmp_path, encoded):
    def check(problems, room=400, chat=tokenizer, few_shot=None) -> int:
        encoded.clear()
        check_problems(chat, problems, room, None, tmp_path, few_shot)
        return len(encoded)

    many = questions(150)
    assert [check(many), check(many), check(many, room=300)] == [150, 0, 0]
    assert check(questions(150, "another?")) == 150
    assert [check(many[:99]), check(many[:99])] == [99, 99], "few are encoded in a moment"
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    other = load_tokenizer(tokenizer.directory)
    other.chat = ChatFormat(template)
    assert [check(many, chat=other), check(many, chat=other)] == [150, 0]
    other.chat = ChatFormat(ChatTemplate("{{ strftime_now('%d') }}" + template.source))
    assert [check(many, chat=other), check(many, chat=other)] == [150, 150], "another day, other"
    shown = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    shots = FewShot([Record("chat", shown)], 1)
    assert [check(many, few_shot=shots), check(many, few_shot=shots)] == [150, 150]
    for damaged in (tmp_path / "cache").glob("*/found.json"):
        damaged.write_text("{")
    assert check(many) == 150


def test_problems_that_are_too_long_for_another_model_are_told_with_their_line(
    tokenizer, tmp_path, encoded
):
    many = questions(150, "word " * 200)
    check_problems(tokenizer, many, 2000, None, tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match="row 149: the prompt has"):
            check_problems(tokenizer, many, 100, None, tmp_path)
