"""The verb init: its recipes are valid, fit the memory, and run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from ernie_train import __version__
from ernie_train.cli import recipes
from ernie_train.cli.init import LEAST_STEPS, SCHEMA, Given, completed
from ernie_train.core.errors import UserError
from ernie_train.core.terminal import Terminal
from ernie_train.core.yaml import load_yaml
from ernie_train.data import encode_chat, load_tokenizer, read_records, shipped_template
from tests.workspace import rows, write_rows

ASKED = {"prompt": "What is 1 + 1?"}
KINDS: dict[str, list[dict[str, Any]]] = {
    "messages": rows(30, 1),
    "alpaca": [{"instruction": "Add 1.", "input": str(i), "output": str(i + 1)} for i in range(9)],
    "texts": [{"text": f"{i} and {i + 1} are numbers."} for i in range(40)],
    "pairs": [{**ASKED, "chosen": "2", "rejected": str(i)} for i in range(3, 12)],
    "mapped": [{"frage": "1 + 1?", "antwort": f"so #### {i}"} for i in range(9)],
}  # fmt: skip
STAGES = {"texts": "pretrain", "pairs": "dpo"}
NO_TOOLS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COLUMNS = "{prompt: frage, completion: {column: antwort, after: '####'}}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_of_each_kind_of_rows_passes_check(
    place: Path, cli: Any, tmp_path: Path, kind: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", KINDS[kind])
    mapped = ("--columns", COLUMNS) if kind == "mapped" else ()
    given = ("--model", place / "model", "--data", "rows.jsonl", "--out", "my own.yaml", *mapped)
    status, told = cli("init", *given)
    assert status == 0, told
    recipe = load_yaml(tmp_path / "my own.yaml")
    stage = recipe["stages"][0]
    assert __version__.startswith(f"{recipe['version']}.")
    assert stage["kind"] == STAGES.get(kind, "sft") and recipe["name"] == "my-own"
    assert "lora" not in stage and f"{len(KINDS[kind])} rows" in told
    status, told = cli("check", "my own.yaml")
    assert status == 0 and "warning" not in told, told
    first = (tmp_path / "my own.yaml").read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA}"
    schema = json.loads((tmp_path / SCHEMA).read_text())
    assert list(Draft202012Validator(schema).iter_errors(recipe)) == []


def test_the_recipe_runs(place: Path, cli: Any, tmp_path: Path) -> None:
    assert cli("init", "--model", place / "model", "--data", place / "train.jsonl")[0] == 0
    shorter = ("stages.sft.epochs=null", "stages.sft.steps=2", "export=null")
    status, told = cli("run", "recipe.yaml", "--run-dir", "run", *shorter)
    assert status == 0, told
    assert len((tmp_path / "run/01-sft/metrics.jsonl").read_text().splitlines()) == 2


def test_the_longest_row_fits_and_few_rows_make_several_steps(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    made = rows(100, 4)
    made[50]["messages"][0]["content"] = "What is this? " * 20
    write_rows(tmp_path / "rows.jsonl", made)
    assert cli("init", "--model", place / "model", "--data", "rows.jsonl")[0] == 0
    tokenizer = load_tokenizer(place / "tokenizer")
    records, _ = read_records(tmp_path / "rows.jsonl")
    lengths = [len(encode_chat(tokenizer, record.messages)[0]) for record in records]
    stage = load_yaml(tmp_path / "recipe.yaml")["stages"][0]
    assert max(lengths) <= stage["seq_len"] < max(lengths) + 64
    step = stage["grad_accum_steps"] * stage["seq_len"]
    assert sum(lengths) // step >= LEAST_STEPS or stage["grad_accum_steps"] == 1
    assert f"{sum(lengths)} tokens; the longest that fits has {max(lengths)}" in cli(
        "init", "--model", place / "model", "--data", "rows.jsonl", "--out", "b.yaml"
    )[1].replace("\n", " ")


def test_what_exceeds_the_memory_is_lora_and_then_recomputed(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    model = ("--model", place / "model", "--data", place / "train.jsonl")
    found = []
    for number, memory in enumerate((1.0, 0.0022, 0.001)):
        status, told = cli("init", *model, "--out", f"{number}.yaml", "--memory-gb", memory)
        assert status == 0, told
        recipe = load_yaml(tmp_path / f"{number}.yaml")
        found.append(("lora" in recipe["stages"][0], "parallel" in recipe, "warning" in told))
    assert found[0] == (False, False, False)
    assert found[-1] == (True, True, True)
    full = cli("init", *model, "--out", "full.yaml", "--memory-gb", 0.001, "--method", "full")
    assert "lora" not in load_yaml(tmp_path / "full.yaml")["stages"][0] and full[0] == 0
    assert cli("init", *model, "--out", "lora.yaml", "--method", "lora")[0] == 0
    assert load_yaml(tmp_path / "lora.yaml")["stages"][0]["lora"] == {"rank": 16}


def test_nothing_is_overwritten(place: Path, cli: Any, tmp_path: Path) -> None:
    given = ("--model", place / "model", "--data", place / "train.jsonl")
    (tmp_path / "recipe.yaml").write_text("mine")
    status, told = cli("init", *given)
    assert status == 2 and "recipe.yaml exists" in told
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    (tmp_path / SCHEMA).write_text("{}")
    status, told = cli("init", *given, "--out", "other.yaml")
    assert status == 2 and SCHEMA in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.schema.json", "recipe.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"--data": "prompts.jsonl"}, "1 of 1 rows have no `answer`"),
        ({"--data": "both.jsonl"}, "rows of chat and prompt: give --kind upo, which trains on all"),
        ({"--kind": "ppo"}, "--kind ppo: sft, pretrain, dpo, upo"),
        ({"--kind": "dpo"}, "rows of chat are none that --kind dpo trains on"),
        ({"--data": "odd.jsonl"}, "cannot tell the format"),
        ({"--out": "recipe.txt"}, "a recipe is a .yaml file"),
        ({"--out": "no/where.yaml"}, "there is no directory no"),
        ({"--method": "qlora"}, "--method qlora"),
        ({"--template": "nothing.jinja"}, "nothing.jinja"),
        ({"--seq-len": "3"}, "no row has at most 3 tokens"),
        ({"--seq-len": "100000"}, "seq_len"),
    ],
)
def test_mistakes_are_one_message(
    place: Path, cli: Any, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1?", "reward": "math"}])
    both = [{"prompt": "1 + 1?", "answer": "2"}, {"question": "1 + 1?", "answer": "2"}]
    write_rows(tmp_path / "both.jsonl", both)
    write_rows(tmp_path / "odd.jsonl", [{"frage": "1 + 1?"}])
    before = sorted(tmp_path.iterdir())
    given = {"--model": str(place / "model"), "--data": str(place / "train.jsonl"), **changes}
    status, told = cli("init", *(part for pair in given.items() for part in pair))
    assert status == 2 and message in told and "Traceback" not in told, told
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_not_given_is_asked_in_a_terminal(
    place: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, told = cli("init")
    assert status == 2 and "--model and --data must be given" in told
    with pytest.raises(UserError, match=r"^--data must be given"):
        completed(Given(model=place), None, Terminal())
    asked: list[str] = []

    def ask(what: str, default: str) -> str:
        asked.append(what)
        return {"m": str(place / "model"), "d": str(place / "train.jsonl")}.get(what[0], default)

    monkeypatch.setattr(recipes, "_ask", ask)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert cli("init", "--method", "lora")[0] == 0
    assert [what.split()[0] for what in asked] == ["model", "data:", "train", "recipe", "rows"]
    assert (tmp_path / "recipe.yaml").exists()


def test_rows_that_cannot_be_read_are_left_out_where_that_is_asked_for(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", KINDS["alpaca"])
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"instruction": "Add 1.", "input": ""}\n')
    given = ("init", "--model", place / "model", "--data", "rows.jsonl", "--out", "own.yaml")
    status, told = cli(*given)
    assert status == 2 and "rows.jsonl:10: it lacks output, which the format alpaca" in told
    assert "--max-bad-fraction" in told
    assert cli(*given, "--max-bad-fraction", 0.2)[0] == 0
    assert load_yaml(tmp_path / "own.yaml")["stages"][0]["max_bad_fraction"] == 0.2
    assert cli("check", "own.yaml")[0] == 0


def test_rows_that_are_all_left_out_are_told_with_their_reason_and_the_remedy(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "count", "arguments": {"to": 8}}]}
    asked = {"messages": [{"role": "user", "content": "to 8?"}, call], "tools": [{"name": "count"}]}
    write_rows(tmp_path / "calls.jsonl", [asked] * 12)
    (tmp_path / "no_tools.jinja").write_text(NO_TOOLS)
    given = ("init", "--model", place / "model", "--data", "calls.jsonl")
    status, told = cli(*given, "--template", "no_tools.jinja")
    assert status == 2 and "calls.jsonl: every row is left out:\n  12 rows: message 2: " in told
    assert "leaves the turn or its tool call out" in told and "first at calls.jsonl:1\n" in told
    assert "at most" not in told
    named = re.search(r"--template (\S+recipes/chatml_tools\.jinja), or your own", told)
    assert named and cli(*given, "--template", named[1])[0] == 0, "found from any directory"


def test_rows_of_which_the_template_shows_some_are_refused_as_check_would(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "no_tools.jinja").write_text(NO_TOOLS)
    call = {"function": {"name": "f", "arguments": {}}}
    called = {"messages": [{"role": "user", "content": "?"},
                           {"role": "assistant", "content": "", "tool_calls": [call]}]}  # fmt: skip
    write_rows(tmp_path / "some.jsonl", [*rows(20, 0), *[called] * 4])
    given = ("init", "--model", place / "model", "--data", "some.jsonl")
    status, told = cli(*given, "--template", "no_tools.jinja")
    assert status == 2 and "4 of 24 rows are bad" in told and "some.jsonl:21: message 2: " in told
    assert "--max-bad-fraction" in told and "chatml_tools.jinja, or your own" in told
    assert not (tmp_path / "recipe.yaml").exists()
    allowed = ("--template", "no_tools.jinja", "--max-bad-fraction", "0.5")
    status, told = cli(*given, *allowed)
    assert status == 0 and "left out of some.jsonl: 4 bad, first some.jsonl:21: " in told
    assert cli("check", "recipe.yaml")[0] == 0


def test_a_line_break_in_the_name_of_the_data_stays_in_its_comment(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    name = "rows\nseed: 12345\n#.jsonl"
    write_rows(tmp_path / name, KINDS["messages"])
    assert cli("init", "--model", place / "model", "--data", name)[0] == 0
    recipe = load_yaml(tmp_path / "recipe.yaml")
    assert "seed" not in recipe and recipe["stages"][0]["data"][0]["path"] == name
    assert cli("check", "recipe.yaml")[0] == 0


def test_keys_that_nothing_reads_are_told(place: Path, cli: Any, tmp_path: Path) -> None:
    text = "Write a function that adds two numbers. " * 4
    write_rows(tmp_path / "mbpp.jsonl", [{"text": text, "code": "a + b"}] * 8)
    status, told = cli("init", "--model", place / "model", "--data", "mbpp.jsonl")
    assert status == 0 and "keys of mbpp.jsonl that nothing reads: code (8)" in told


def test_marks_of_turns_that_text_can_forge_are_warned_of(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", KINDS["alpaca"])
    shutil.copytree(place / "tokenizer", tmp_path / "plain")
    (tmp_path / "plain/chat_template.jinja").write_text(shipped_template("ernie_plain").source)
    given = ("init", "--model", place / "model", "--data", "rows.jsonl")
    for verb in (
        ("preview", "rows.jsonl", "--tokenizer", "plain"),
        (*given, "--template", "ernie_plain"),
        ("check", "recipe.yaml"),
    ):
        status, told = cli(*verb)
        assert status == 0 and "marks turns by plain text, 'Assistant:'" in " ".join(told.split())
    for verb in (
        ("preview", "rows.jsonl", "--model", place / "model"),
        (*given, "--out", "a.yaml"),
    ):
        assert "marks turns" not in cli(*verb)[1]
