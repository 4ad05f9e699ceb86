"""metrics.jsonl, VisualDL and the terminal."""

import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.core.errors import CheckpointError, StorageError
from ernie_train.io.loggers import LoggerSettings
from ernie_train.io.metrics_log import (
    MetricsWriter,
    cut_after,
    encode_line,
    read_metrics,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def writer(directory: Path, resume_step: int | None = None, **options: Any) -> MetricsWriter:
    options = {"terminal": False, "loggers": LoggerSettings(()), "console": screen()[0]} | options
    return MetricsWriter(directory, resume_step=resume_step, **options)


def screen(terminal: bool = False) -> tuple[rich.console.Console, io.StringIO]:
    text = io.StringIO()
    return rich.console.Console(file=text, width=100, force_terminal=terminal), text


def rows(directory: Path) -> list[dict[str, Any]]:
    found = list(read_metrics(directory / "metrics.jsonl"))
    for row in found:
        del row["time"]
    return found


@given(st.dictionaries(st.text().filter(lambda name: name not in ("step", "time")), st.floats()))
def test_numbers_read_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, float]
) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_text(encode_line(3, metrics, {}) + "\n", encoding="utf-8")
    (row,) = read_metrics(path)
    assert row.pop("step") == 3
    assert row.pop("time") == {}
    assert {k: repr(v) for k, v in row.items()} == {k: repr(v) for k, v in metrics.items()}


def test_a_line_is_plain_json() -> None:
    values = {"loss": 0.1, "nan": math.nan, "up": math.inf, "down": -math.inf, "count": 3}
    line = encode_line(1, values, {"seconds": 0.5})
    assert line == (
        '{"step": 1, "loss": 0.1, "nan": "nan", "up": "inf", "down": "-inf", "count": 3, '
        '"time": {"seconds": 0.5}}'
    )


def test_numpy_numbers_keep_their_value() -> None:
    line = json.loads(encode_line(1, {"a": np.float32(0.1), "b": np.float64(0.1)}, {}))
    assert line["a"] == float(np.float32(0.1)) and line["b"] == 0.1


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"step": 1.0}, "cannot be called 'step'"),
        ({"time": 1.0}, "cannot be called 'time'"),
        ({"ok": True}, "'ok' must be a number"),
        ({"ok": "1"}, "'ok' must be a number"),
    ],
)
def test_what_cannot_be_logged(metrics: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_line(1, metrics, {})


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with writer(tmp_path / "new" / "stage") as out:
        for step in (1, 2):
            out.log(step, {"loss": 1.0 / step}, {"tokens_per_second": 10.0})
            out.sync()
            assert len(rows(tmp_path / "new" / "stage")) == step
    (first, _) = read_metrics(tmp_path / "new" / "stage" / "metrics.jsonl")
    assert first["time"]["tokens_per_second"] == 10.0
    assert first["time"]["unix_s"] > 1.7e9


def test_steps_never_go_back(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.log(3, {}, {})
        out.log(3, {"validation": 1.0}, {})  # a second look at the same step is fine
        with pytest.raises(ValueError, match="step 2 was logged after step 3"):
            out.log(2, {}, {})


def test_a_continued_run_has_the_lines_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(directory: Path, resume: int | None, steps: range) -> None:
        with writer(directory, resume) as out:
            for step in steps:
                out.log(step, {"loss": 1 / step}, {"seconds": float(step)})

    train(tmp_path / "whole", None, range(1, 11))
    train(tmp_path / "cut", None, range(1, 8))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "los')  # killed while writing
    train(tmp_path / "cut", 5, range(6, 11))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_beginning_anew_drops_old_lines(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.log(1, {"loss": 1.0}, {})
    with writer(tmp_path) as out:
        out.log(1, {"loss": 2.0}, {})
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_resuming_at_step_zero_keeps_what_was_measured_before_training(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        out.log(0, {"validation": 9.0}, {})
        out.log(1, {"loss": 1.0}, {})
    writer(tmp_path, 0).close()
    assert rows(tmp_path) == [{"step": 0, "validation": 9.0}]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"loss": 1}', '{"step": "1"}', "\x00\x00"])
def test_a_damaged_line_is_named_and_nothing_is_lost(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1, "time": {{}}}}\n{bad}\n{{"step": 3, "time": {{}}}}\n'
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: not a line of metrics"):
        list(read_metrics(path))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2"):
        writer(tmp_path, 3)
    assert path.read_text() == text


def test_cutting_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with writer(tmp_path) as out:
        for step in (1, 2, 3):
            out.log(step, {}, {})
    before = path.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        cut_after(path, 1)
    assert path.read_text() == before


def test_lines_of_samples_which_hold_text_are_cut_too(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [f'{{"step": {step}, "task": "sum", "parts": {{"a": 1.0}}}}\n' for step in (1, 2)]
    path.write_text("".join(lines))
    cut_after(path, 1)
    assert path.read_text() == lines[0]


def test_an_unwritable_directory_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        writer(tmp_path / "file" / "stage")


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out._stream.close()
    out._stream = open("/dev/full", "w")  # noqa: SIM115 - the writer closes it
    with pytest.raises(StorageError, match="disk is full"):
        out.log(1, {"loss": 1.0}, {})
    with pytest.raises(StorageError, match="disk is full"):
        out.close()  # the line is still not written


def test_a_missing_file_has_no_metrics(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []


# ---- VisualDL


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """What VisualDL's own reader finds."""
    from visualdl import LogReader

    (file,) = (directory / "visualdl").iterdir()
    reader = LogReader(file_path=str(file))
    return [(item.id, item.value) for item in reader.get_data("scalar", tag)]


def test_visualdl_shows_one_continuous_curve_after_a_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with writer(tmp_path, loggers=None) as out:
        for step in range(1, 8):
            out.log(step, {"loss": float(step), "n/a": math.nan}, {"seconds": 0.5})
    with writer(tmp_path, 5, loggers=None) as out:
        for step in range(6, 9):
            out.log(step, {"loss": step + 0.5}, {"seconds": 0.5})
    expected = [(step, float(step)) for step in range(1, 6)] + [(6, 6.5), (7, 7.5), (8, 8.5)]
    assert scalars(tmp_path, "loss") == expected
    assert [step for step, _ in scalars(tmp_path, "time/seconds")] == list(range(1, 9))
    assert all(math.isnan(value) for _, value in scalars(tmp_path, "n/a"))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


# ---- Terminal


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def test_plain_lines_come_now_and_then_with_the_first_and_the_last(
    tmp_path: Path, clock: Clock
) -> None:
    console, text = screen()
    with writer(tmp_path, console=console, clock=clock, total_steps=20, label="sft") as out:
        for step in range(1, 21):
            clock.now += 2.0
            out.log(step, {"loss": 1 / step, "lr": 0.001}, {"tokens_per_second": 12345.6})
    lines = text.getvalue().splitlines()
    # Every 5 s at 2 s a step is every third step; the last is always shown.
    assert [line.split()[2] for line in lines] == [f"{s}/20" for s in (1, 4, 7, 10, 13, 16, 19, 20)]
    assert lines[0] == ("sft  step 1/20  loss 1.0000  lr 1.00e-03  12,346 tokens/s  38 s left")
    assert lines[-1].endswith("0 s left")


def test_plain_lines_show_the_last_step_of_an_interrupted_stage(
    tmp_path: Path, clock: Clock
) -> None:
    console, text = screen()
    with writer(tmp_path, console=console, clock=clock) as out:
        for step in (1, 2, 3):
            out.log(step, {}, {})
    assert text.getvalue().splitlines() == ["step 1", "step 3"]


def test_time_left_counts_only_the_steps_of_this_process(tmp_path: Path, clock: Clock) -> None:
    writer(tmp_path).close()
    console, text = screen()
    with writer(tmp_path, 90, console=console, clock=clock, total_steps=100) as out:
        clock.now += 10.0
        out.log(91, {}, {})
    assert text.getvalue() == "step 91/100  1 min 30 s left\n"


def test_notes_are_printed_as_they_are(tmp_path: Path) -> None:
    console, text = screen()
    with writer(tmp_path, console=console) as out:
        out.note("[bold] is no markup " + "x" * 200)
    assert text.getvalue() == "[bold] is no markup " + "x" * 200 + "\n"


def test_a_terminal_gets_a_bar(tmp_path: Path, clock: Clock) -> None:
    console, text = screen(terminal=True)
    out = writer(
        tmp_path, console=console, clock=clock, terminal=True, total_steps=4, label="[sft]"
    )
    clock.now += 6.0
    out.log(1, {"loss": 0.5}, {"tokens_per_second": 2000.0})
    out.note("saved step 1")
    out.close()
    out.close()
    shown = text.getvalue()
    for part in ("[sft]", "1/4", "loss 0.5000", "2,000 tokens/s", "18 s left", "saved step 1"):
        assert part in shown


def test_the_terminal_shows_the_base_the_experts_and_the_reward(tmp_path):
    console = rich.console.Console(file=io.StringIO(), width=400)
    with MetricsWriter(tmp_path, resume_step=None, terminal=False, console=console) as writer:
        values = {"reward": 0.25, "accuracy": 0.5, "kl": 0.0125, "rope_theta": 160000.0,
                  "seq_len": 32768, "moe/load_max": 2.5, "moe/dead_experts": 3.0}  # fmt: skip
        writer.log(1, values, {})
    shown = console.file.getvalue()
    for text in ("reward 0.250  accuracy 0.500", "kl 0.0125", "RoPE base 160,000 at 32768 tokens",
                 "busiest expert 2.5x", "3 experts idle"):  # fmt: skip
        assert text in shown


def test_the_last_validation_stays_in_the_line_and_survives_a_resume(tmp_path: Path) -> None:
    console, text = screen()
    rates = {"tokens_per_second": 2000.0, "tokens_per_second_overall": 1500.0}
    with writer(tmp_path, console=console, total_steps=3) as out:
        out.log(1, {"loss": 3.0}, rates)
        out.log(2, {"loss": 2.0, "validation_loss": 2.5}, rates)
        out.log(3, {"loss": 1.0}, rates)
    first, last = text.getvalue().splitlines()
    assert "validation" not in first
    assert "loss 1.0000  validation loss 2.5000  2,000 tokens/s (1,500 overall)" in last
    console, text = screen()
    with writer(tmp_path, 3, console=console, total_steps=4) as out:
        out.log(4, {"loss": 0.5}, rates)
    assert "loss 0.5000  validation loss 2.5000" in text.getvalue()
    assert "validation_loss" not in rows(tmp_path)[-1]
