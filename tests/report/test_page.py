"""What the report says of whole, broken, hostile and long runs. The browser has its own tests."""

from __future__ import annotations

import json
import random
import re
import sys
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import GateError
from ernie_train.eval.gates import check_gate
from ernie_train.io.run_dir import RunLock
from ernie_train.report import overview, write_report
from ernie_train.report.curves import MOST_POINTS, curve
from ernie_train.report.reading import MOST_PROBLEMS, reading_lists
from ernie_train.report.run_files import SOLVED, Curves, StageFiles, read_run
from ernie_train.train.stage import Gate
from tests.report.made_runs import HOSTILE, make_run, write_lines

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    """The page's tags, its text outside of scripts, and the JSON that the script draws."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.html)
        held = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.html)
        assert held is not None
        self.data: dict[str, Any] = json.loads(held[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def report(*runs: Path) -> Page:
    return Page(write_report(list(runs))[0])


def test_a_whole_run_is_told_whole(made: Path) -> None:
    page = report(made)
    for told in (
        "made complete", "60 of 60", "30 s", "passed eval/math at least 0.5: 0.800",
        "from 0.01 and up to 3", "entropy fell to 0.0010 nats", "0.800 [0.700, 0.900]",
        "no such key" in json.dumps(page.data) and "sft", "optim:", "0.2.0", "data",
    ):  # fmt: skip
        assert str(told) in " ".join(page.text.split()), told
    assert "Missing or damaged" not in page.text
    sft, rl = page.data["charts"]
    assert [item["name"] for item in sft["first"]][:2] == ["loss", "grad_norm"]
    assert sft["heat"][0]["layers"] == [1, 2, 3]
    assert sft["heat"][0]["measures"]["load_max"][1][:2] == [3.0, 2.0]
    assert rl["heat"] == []
    iterations = page.data["readings"][0]["columns"]
    assert [c["label"] for c in iterations] == [f"iteration {n}" for n in range(1, 13)]
    turns = iterations[0]["rows"][1]["turns"]
    assert [(t["role"], t["failed"]) for t in turns] == [
        ("assistant", False), ("tool lookup", True), ("assistant", False),
    ]  # fmt: skip
    held_out = page.data["readings"][1]
    assert held_out["aligned"] and [c["label"] for c in held_out["columns"]] == [
        "after sft", "after rl",
    ]  # fmt: skip


def test_several_runs_are_compared(made: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", name="second", steps=30)
    recipe = (other / "recipe.yaml").read_text().replace("lr: 0.001", "lr: 0.002")
    (other / "recipe.yaml").write_text(recipe)
    page = report(made, other)
    assert "stages.sft.optim.lr: 0.001 -> 0.002" in page.text
    loss = page.data["charts"][0]["first"][0]["lines"]
    assert [(line["run"], len(line["x"])) for line in loss] == [("made", 60), ("second", 30)]
    assert {"made: after rl", "second: after rl"} <= {t["name"] for t in page.data["tasks"]}


# ---- runs that are not whole


def break_nothing_begun(run: Path) -> str:
    for stage in ("01-sft", "02-rl"):
        (run / stage).rename(run.parent / stage)
    return "made not complete"


def break_half_line(run: Path) -> str:
    path = run / "02-rl/metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    (run / "02-rl/DONE").unlink()
    return "11 of 12"


def break_lines(run: Path) -> str:
    path = run / "01-sft/metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[4:7] = ["{", "[1]", '{"loss": ' + "9" * 5000 + "}"]
    path.write_text("\n".join(lines) + "\n")
    return "metrics.jsonl: 3 damaged lines left out, the first is 5"


def break_values(run: Path) -> str:
    odd = [
        {"step": "1", "loss": 1}, {"loss": 1}, {"step": True, "loss": 1}, {"step": -4, "loss": 1},
        {"step": 1, "loss": "low", "kl": None, "x": [1], "time": 3}, {"step": 10**400, "loss": 1},
        {"step": 2, "loss": 10**400, "time": {"seconds": "nan", "unix_s": "soon"}},
    ]  # fmt: skip
    write_lines(run / "01-sft/metrics.jsonl", odd)
    return "values are no numbers and left out"


def test_what_comes_after_the_stages_is_not_missed_before_their_end(made: Path) -> None:
    for name in ("02-rl/DONE", "evaluation.json"):
        (made / name).unlink()
    assert "Missing or damaged" not in report(made).text


def break_recipe(run: Path) -> str:
    (run / "recipe.yaml").write_text("name: [\n")
    return "damaged: recipe.yaml"


def break_recipe_kind(run: Path) -> str:
    (run / "recipe.yaml").write_text("name: {a: 1}\nstages: {sft: 3}\nevaluation: 7\n")
    return "sft"


def break_other_version(run: Path) -> str:
    (run / "recipe.yaml").write_text(
        "name: old\nstages: [{name: sft, kind: gone, steps: many, gate: 4}, 5]\n"
    )
    return "gone"


def break_missing(run: Path) -> str:
    for name in ("recipe.yaml", "environment.json", "01-sft/data_report.json", "evaluation.json"):
        (run / name).unlink()
    return "recipe.yaml is missing"


def break_stage_names(run: Path) -> str:
    names = json.dumps(["a\0b", "x" * 300, "\ud800", "../../up", ""])
    stages = [{"name": name, "kind": "sft"} for name in json.loads(names)]
    (run / "recipe.yaml").write_text(json.dumps({"name": "odd", "stages": stages}))
    return "xxxx"


def break_numbers(run: Path) -> str:
    huge = 10**400
    odd = [{"step": 1, "reward": huge, "advantage": -huge, "parts": {"a": huge, "b": float("inf")}}]
    write_lines(run / "02-rl/samples.jsonl", odd)
    result = json.loads((run / "evaluation.json").read_text())
    result["trained"]["tasks"][0]["accuracy"] = huge
    (run / "evaluation.json").write_text(json.dumps(result))
    (run / "environment.json").write_text(json.dumps({"starts": [{"unix_s": huge}]}))
    return "complete"


def break_json(run: Path) -> str:
    for name in ("environment.json", "01-sft/evaluation.json", "02-rl/DONE"):
        (run / name).write_text('{"a":' * 100_000)
    (run / "evaluation.json").write_text('{"trained": {"tasks": [3, {"task": null}]}}')
    return "nested too deeply"


def break_binary(run: Path) -> str:
    for name in ("recipe.yaml", "01-sft/metrics.jsonl", "02-rl/samples.jsonl"):
        (run / name).write_bytes(bytes(range(256)) * 50 + b"\n")
    return "not UTF-8 text"


def break_files(run: Path) -> str:
    (run / "01-sft/metrics.jsonl").unlink()
    (run / "01-sft/metrics.jsonl").mkdir()
    (run / "02-rl/samples.jsonl").unlink()
    (run / "02-rl/samples.jsonl").symlink_to("/dev/zero")
    return "it is a device, not a file"


def break_samples(run: Path) -> str:
    odd = [{"step": [1]}, {"step": 1, "turns": [3, {"role": 5, "content": {"a": "b"}}]},
           {"step": 1, "parts": {"a": None}, "reward": "x", "prompt": 5}]  # fmt: skip
    write_lines(run / "02-rl/samples.jsonl", odd)
    return "complete"


@pytest.mark.parametrize(
    "damage", [value for name, value in globals().items() if name.startswith("break_")]
)
def test_a_broken_run_has_a_report_that_says_so(made: Path, damage: Any) -> None:
    told = damage(made)
    assert told in " ".join(report(made).text.split())


def test_a_running_run_is_told_as_running(made: Path) -> None:
    break_half_line(made)
    assert "broken off" in report(made).text
    with RunLock(made):
        text = report(made).text
    assert "running" in text and "broken off" not in text


def test_a_run_that_was_stopped_is_told_as_saved(made: Path) -> None:
    (made / "02-rl/DONE").unlink()
    (made / "02-rl/checkpoints/step_000011").mkdir(parents=True)
    assert "broken off" in report(made).text, "a step is lost"
    (made / "02-rl/checkpoints/step_000012").mkdir()
    text = report(made).text
    assert "stopped, saved at step 12 of 12" in text and "broken off" not in text


# ---- bad input


def test_foreign_text_is_text(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", text=HOSTILE)
    page = report(path)
    plain = report(make_run(tmp_path / "plain"))
    # Not a tag more than those of a run with plain texts, but for the list of what is missing.
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert [t for t, _ in page.tags].count("script") == 3
    assert not [a for _, a in page.tags for name in a if name.startswith("on")]
    assert not CONTROLS.search(page.text) and not CONTROLS.search(json.dumps(page.data))
    shown = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page.html, flags=re.S)
    assert not CONTROLS.search(shown)
    assert "\\x1b[2J" in page.text and "{{ 7 * 7 }}" in page.text


def test_megabyte_lines_make_no_megabyte_page(made: Path) -> None:
    long = "x" * 2**20
    rows = [{"step": n, "prompt": long, "completion": long, "task": long} for n in range(5)]
    write_lines(made / "02-rl/samples.jsonl", [*rows, {"step": 1, "prompt": "y" * 2**23}])
    page = report(made)
    assert len(page.html) < 7e6
    assert "1 damaged lines left out" in page.text  # longer than any line that makes sense


def test_solved_problems_are_not_all_held_in_memory(made: Path) -> None:
    row = {"source": "s", "prompt": "p" * 100_000, "completion": "c" * 4000}
    write_lines(made / "01-sft" / SOLVED, [{**row, "sample": n} for n in range(400)])
    run = read_run(made)
    tracemalloc.start()
    try:
        (held_out,) = [one for one in reading_lists(run) if one["aligned"]]
        assert tracemalloc.get_traced_memory()[1] < 15e6
    finally:
        tracemalloc.stop()
    assert len(held_out["columns"][0]["rows"]) == MOST_PROBLEMS


def test_metrics_without_number_or_end_are_drawn(made: Path) -> None:
    largest = sys.float_info.max
    odd = ("nan", "inf", largest)
    rows = [{"step": n, f"m{n}": 1.0, "loss": odd[n % 3]} for n in range(2100)]
    rows[1]["m1"] = largest
    write_lines(made / "01-sft/metrics.jsonl", rows)
    page = report(made)
    assert "only the first 2000 names of metrics are read" in page.text
    (sft, _) = page.data["charts"]
    assert sft["left_out"] > 1800
    assert "are NaN or infinite" in sft["first"][0]["lines"][0]["summary"]


def test_100k_steps_take_seconds_and_few_megabytes(made: Path) -> None:
    row = json.dumps({f"metric/{n}": 0.12345678901234 * n for n in range(12)})[1:]
    path = made / "01-sft/metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}, "loss": 1.0, {row}\n' for n in range(1, 100_001)))
    began = time.process_time()
    out, _ = write_report([made])
    assert time.process_time() - began < 10
    assert out.stat().st_size < 8e6


def test_a_shortened_curve_keeps_mean_and_spikes() -> None:
    rng = random.Random(1)
    curves, values = Curves(), [rng.random() for _ in range(10_007)]
    values[1234], values[77] = 50.0, float("nan")
    for step, value in enumerate(values):
        curves.add(step, "loss", value)
    found = curve(curves, "loss")
    assert found is not None and len(found["x"]) == MOST_POINTS and found["x"][-1] == 10_006
    assert max(found["high"]) == 50.0
    width = 10_007 / MOST_POINTS
    at = next(i for i, high in enumerate(found["high"]) if high == 50.0)
    assert at == int(1234 / width)
    # Means of equally many values: theirs is that of all.
    finite = [v for v in values if v == v]
    assert sum(found["y"]) / MOST_POINTS == pytest.approx(sum(finite) / len(finite), rel=2e-3)
    assert "1 values are NaN or infinite" in found["summary"]


def test_gates_are_judged_as_the_run_judges_them() -> None:
    rng = random.Random(2)

    def result() -> dict[str, Any]:
        found = {d: {"accuracy": rng.choice((0.2, 0.5, 0.8))} for d in ("math", "logic")}
        mean = sum(v["accuracy"] for v in found.values()) / 2
        return {"tasks": [], "domains": found, "mean_accuracy": mean}

    states = set()
    for _ in range(60):
        gate = {"metric": rng.choice(("eval/math", "eval/mean")), "at_least": 0.5,
                "max_regression": rng.choice((None, 0.2))}  # fmt: skip
        now, before = result(), rng.choice((None, result()))
        stage = StageFiles(Path(), "s", {"gate": gate}, Curves(), None, None, {"trained": now})
        try:
            check_gate(Gate(**gate), "s", now, before)
            expected = "passed"
        except GateError:
            expected = "missed"
        assert overview._gate(stage, before and {"trained": before})[1] == expected
        states.add(expected)
    assert states == {"passed", "missed"}


def test_the_gate_of_a_reward_model_is_told_by_its_own_measurements() -> None:
    gate = {"metric": "eval/accuracy", "at_least": 0.9, "max_regression": None}
    curves = Curves()
    stage = StageFiles(Path(), "judge", {"kind": "reward", "gate": gate}, curves, None, None, None)
    text = "eval/accuracy at least 0.9"
    assert overview._gate(stage, None) == (f"{text}: not judged yet", "open")
    for step, value in ((10, 0.95), (20, 0.85)):
        curves.add(step, "eval/accuracy", value)
    assert overview._gate(stage, None) == (f"{text}: 0.850 so far", "open")
    stage.done = {"result": {"steps": 20, "checkpoint": "step_000010"}}  # the best one
    assert overview._gate(stage, None) == (f"{text}: 0.950", "passed")
    stage.done = {"result": {"checkpoint": ["gone"]}}
    assert overview._gate(stage, None) == (text, "passed")
