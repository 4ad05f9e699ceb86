"""The verb init: rows that it holds out of training, and its questions in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie_train.cli import recipes
from ernie_train.cli.init.split import hold_out
from ernie_train.core.yaml import load_yaml
from ernie_train.data import ReadReport, Record, iter_records
from ernie_train.data.reader import prompts_of
from tests.workspace import write_rows

Row = dict[str, Any]
SFT: list[Row] = [
    {"prompt": f"{a} + {b}?", "completion": str(a + b), "n": a} for a in range(10) for b in range(8)
]
PAIRS: list[Row] = [
    {"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": "0"} for n in range(40)
]
TEXTS: list[Row] = [{"text": f"{n} and {n + 1} are numbers."} for n in range(40)]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("kind", "rows"), [("sft", SFT), ("dpo", PAIRS), ("pretrain", TEXTS)])
def test_held_out_rows_are_measured_and_not_trained(
    place: Path, cli: Any, tmp_path: Path, kind: str, rows: list[Row]
) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    given = ("--model", place / "model", "--data", "rows.jsonl", "--out", "a.yaml")
    status, told = cli("init", *given)
    assert status == 0 and "held out: 4 rows, in a.held_out.jsonl; rows that ask the " in told, told
    held = read(tmp_path / "a.held_out.jsonl")
    assert len(held) == 4 and all(row in rows for row in held)
    stage = load_yaml(tmp_path / "a.yaml")["stages"][0]
    assert stage["kind"] == kind and stage["validate_every_steps"] >= 1
    source = stage if kind == "dpo" else stage["data"][0]
    assert source["without"] == "a.held_out.jsonl"
    status, told = cli("check", "a.yaml")
    assert status == 0 and "warning" not in told, told
    if kind != "dpo":
        assert "validation: 4 documents, every " in told and "4 held out in " in told.replace(
            "\n", " "
        ), told
    shorter = (f"stages.{kind}.epochs=null", f"stages.{kind}.steps=2", "export=null")
    status, told = cli("run", "a.yaml", "--run-dir", "run", *shorter[kind == "dpo" :],
                       f"stages.{kind}.validate_every_steps=1")  # fmt: skip
    assert status == 0 and "4 held out in " in " ".join(told.split()), told
    metrics = read(next((tmp_path / "run").glob("01-*/metrics.jsonl")))
    assert all("validation_loss" in step for step in metrics)


def test_repeated_prompts_are_on_one_side(place: Path, cli: Any, tmp_path: Path) -> None:
    twice = [*SFT[:30], *({**row, "completion": "so " + row["completion"]} for row in SFT[:30])]
    write_rows(tmp_path / "rows.jsonl", twice)
    given = ("init", "--model", place / "model", "--data", "rows.jsonl", "--held-out", "20%")
    status, told = cli(*given)
    assert status == 0 and "held out: 12 rows (6 prompts)" in told, told
    asked = {row["prompt"] for row in read(tmp_path / "recipe.held_out.jsonl")}
    assert [row["prompt"] in asked for row in twice].count(True) == 12
    write_rows(tmp_path / "same.jsonl", [{**SFT[0], "completion": str(n)} for n in range(40)])
    status, told = cli(*given[:4], "same.jsonl", "--out", "same.yaml")
    assert status == 0, told
    assert "held out: none: every prompt of same.jsonl has more than 4 rows, or some" in told
    assert "without" not in load_yaml(tmp_path / "same.yaml")["stages"][0]["data"][0]


@pytest.mark.parametrize("count", [1, 3, 19])
def test_of_few_rows_none_is_held_out_and_that_is_told(
    place: Path, cli: Any, tmp_path: Path, count: int
) -> None:
    write_rows(tmp_path / "rows.jsonl", SFT[:count])
    status, told = cli("init", "--model", place / "model", "--data", "rows.jsonl")
    few = "rows are" if count > 1 else "row is"
    assert status == 0 and f"held out: none: {count} {few} too few" in told, told
    assert "validation" not in load_yaml(tmp_path / "recipe.yaml")["stages"][0]
    assert not (tmp_path / "recipe.held_out.jsonl").exists()


def test_how_many_are_held_out_can_be_said(place: Path, cli: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", SFT)
    given = ("init", "--model", place / "model", "--data", "rows.jsonl", "--out")
    for name, text, rows in (("a", "7", 7), ("b", "25%", 20), ("c", "40", 40)):
        assert cli(*given, f"{name}.yaml", "--held-out", text)[0] == 0
        assert len(read(tmp_path / f"{name}.held_out.jsonl")) == rows
    assert cli(*given, "d.yaml", "--held-out", "0")[0] == 0
    assert "validation" not in load_yaml(tmp_path / "d.yaml")["stages"][0]
    for text in ("x", "-1", "5.5", "120%", "nan%", "", "1_0"):
        status, told = cli(*given, "e.yaml", f"--held-out={text}")
        assert status == 2 and f"--held-out {text}: rows to hold out" in told, (text, told)
    status, told = cli(*given, "e.yaml", "--held-out", "41")
    assert status == 2 and "--held-out 41: rows.jsonl has 80 rows" in told and "40" in told
    (tmp_path / "e.held_out.jsonl").write_text("mine")
    status, told = cli(*given, "e.yaml")
    assert status == 2 and "e.held_out.jsonl exists, and init overwrites nothing" in told


def test_rows_that_cannot_be_trained_are_not_held_out(
    place: Path, cli: Any, tmp_path: Path
) -> None:
    late = [{"role": "assistant", "content": "!"}, {"role": "system", "content": "late"}]
    bad = [{"messages": [{"role": "user", "content": f"{n}?"}, *late]} for n in range(20)]
    write_rows(tmp_path / "rows.jsonl", [*SFT[:30], *bad])
    given = ("--model", place / "model", "--data", "rows.jsonl", "--max-bad-fraction", 0.5)
    assert cli("init", *given, "--held-out", 15)[0] == 0
    held = read(tmp_path / "recipe.held_out.jsonl")
    assert len(held) == 15 and all("prompt" in row for row in held)


def test_columns_are_those_of_the_data(place: Path, cli: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"f": r["prompt"], "a": f"so #{r['n']}"} for r in SFT])
    columns = ("--columns", "{prompt: f, completion: {column: a, after: '#'}}")
    assert cli("init", "--model", place / "model", "--data", "rows.jsonl", *columns)[0] == 0
    assert set(read(tmp_path / "recipe.held_out.jsonl")[0]) == {"f", "a"}
    assert cli("check", "recipe.yaml")[0] == 0


def test_whole_prompts_are_held_out_as_rows_of_the_file(tmp_path: Path) -> None:
    rows = [
        {"q": one["prompt"], "a": one["completion"], "n": at} for at, one in enumerate(SFT[:40])
    ]
    data = tmp_path / "rows.jsonl"
    write_rows(data, rows + rows[:20])
    columns = {"prompt": "q", "completion": "a"}
    out = rows[7]["q"]

    def fits(record: Record) -> bool:
        return bool(record.messages[0]["content"] != out)

    held = hold_out(data, 6, fits, columns)
    assert 0 < held.prompts <= len(held.rows) <= 6
    assert all(row in rows for row in held.rows), "as they stand in the file"
    write_rows(tmp_path / "held.jsonl", held.rows)
    gone = prompts_of(tmp_path / "held.jsonl", "auto", columns)
    left = list(iter_records(data, "auto", ReadReport(""), columns, without=("held", gone)))
    assert len(left) == 60 - len(held.rows) and held.prompts == len(gone)
    write_rows(data, [*rows[:20], *rows][::-1])
    again = hold_out(data, 6, fits, columns)
    assert {row["n"] for row in again.rows} == {row["n"] for row in held.rows}, "of any order"


def test_a_prompt_that_all_rows_have_is_not_held_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{**SFT[0], "completion": str(n)} for n in range(40)])
    held = hold_out(tmp_path / "rows.jsonl", 4, lambda record: True)
    assert (held.rows, held.prompts) == ([], 0)


# ---- questions -----------------------------------------------------------------------------------


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that has the questions answered from a list, and what was asked."""

    def start(*answers: object) -> list[str]:
        left, asked = [str(answer) for answer in answers], []

        def ask(what: str, default: str) -> str:
            asked.append(what.split()[0])
            return left.pop(0) or default

        monkeypatch.setattr(recipes, "_ask", ask)
        for stream in ("stdin", "stdout"):
            monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
        return asked

    return start


def test_each_answer_is_checked_when_it_is_given_and_asked_again(
    place: Path, cli: Any, tmp_path: Path, answering: Any
) -> None:
    write_rows(tmp_path / "rows.jsonl", SFT)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1?"}])
    (tmp_path / "mine.yaml").write_text("mine")
    mistakes = {
        "model": ("nowhere", "rows.jsonl"),
        "data:": ("gone.jsonl", "prompts.jsonl", "."),
        "recipe": ("mine.yaml", "recipe.txt"),
        "rows": ("many", "70"),
        "train": ("qlora",),
    }
    right = {"model": place / "model", "data:": "rows.jsonl", "recipe": "", "rows": "", "train": ""}
    by_flag = []
    flags = dict(zip(right, ("--model", "--data", "--out", "--held-out", "--method"), strict=True))
    known = {"--model": place / "model", "--data": "rows.jsonl"}
    for name, wrong in mistakes.items():
        for answer in wrong:
            given = {**known, flags[name]: answer}
            status, told = cli("init", *(part for pair in given.items() for part in pair))
            assert status == 2, told
            by_flag.append(told.strip())
    asked = answering(*(a for name in right for a in (*mistakes[name], right[name])))
    status, told = cli("init")
    assert status == 0, told
    assert asked == [name for name in right for _ in (*mistakes[name], 1)]
    places = [told.index(message) for message in by_flag]
    assert places == sorted(places), "each where it was made"
    assert len(read(tmp_path / "recipe.held_out.jsonl")) == 4


def test_what_was_given_is_not_asked_and_its_mistakes_end_the_command(
    place: Path, cli: Any, tmp_path: Path, answering: Any
) -> None:
    write_rows(tmp_path / "rows.jsonl", SFT)
    asked = answering("")
    given = ("--model", place / "model", "--data", "rows.jsonl", "--held-out", "0")
    assert cli("init", *given, "--method", "lora")[0] == 0 and asked == ["recipe"]
    asked = answering()
    status, told = cli("init", "--out", "recipe.yaml")
    assert status == 2 and "recipe.yaml exists" in told and asked == []
    assert cli("init", "--model", "nowhere")[0] == 2 and asked == []
    assert cli("init", "--held-out", "x")[0] == 2 and asked == []


def test_of_too_few_rows_it_is_not_asked_how_many_to_hold_out(
    place: Path, cli: Any, tmp_path: Path, answering: Any
) -> None:
    write_rows(tmp_path / "rows.jsonl", SFT[:3])
    asked = answering(place / "model", "rows.jsonl", "", "full")
    status, told = cli("init")
    assert status == 0 and asked == ["model", "data:", "recipe", "train"]
    assert "held out: none: 3 rows are too few" in told
