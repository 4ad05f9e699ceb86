"""TensorBoard's event files and a user's logger, through the writer of metrics."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import crc32c
import pytest
import rich.console

from ernie_train.core.errors import ConfigError, UserError
from ernie_train.io.loggers import LoggerChoice, LoggerSettings, PythonLogger
from ernie_train.io.metrics_log import MetricsWriter
from ernie_train.run.recipe import load_recipe
from tests.workspace import write_recipe


def write(
    directory: Path, choice: LoggerChoice, steps: range, resume_step: int | None = None
) -> str:
    """Log a loss of the steps; return what was printed beside progress."""
    console = rich.console.Console(file=io.StringIO(), width=400)
    settings = LoggerSettings([choice], directory, {"name": "r"})
    options = {"terminal": False, "console": console, "loggers": settings}
    with MetricsWriter(directory / "01-sft", resume_step=resume_step, **options) as out:
        for step in steps:
            out.log(step, {"loss": step / 2, "bad": math.nan, "big": math.inf}, {"seconds": 0.5})
    return "\n".join(line for line in console.file.getvalue().splitlines() if "warning" in line)


def masked(data: bytes) -> int:
    value = crc32c.crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(directory: Path) -> list[tuple[int, float, dict[str, float]]]:
    """Read event files by TFRecord's definition: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    (file,) = directory.iterdir()  # the viewer would join several into one zigzag curve
    data = file.read_bytes()
    while data:
        (length,), (check,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        body, end = data[12 : 12 + length], data[12 + length : 16 + length]
        assert check == masked(data[:8]) and struct.unpack("<I", end)[0] == masked(body)
        event = Event.FromString(body)
        values = {value.tag: value.simple_value for value in event.summary.value}
        found.append((event.step, event.wall_time, values))
        data = data[16 + length :]
    return found[1:]  # the first says the version


def test_tensorboard_shows_one_continuous_curve_after_a_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "tensorboard", range(1, 8))
    write(tmp_path, "tensorboard", range(6, 9), resume_step=5)
    events = read_events(tmp_path / "01-sft" / "tensorboard")
    assert [step for step, _, _ in events] == list(range(1, 9))
    for step, wall_time, values in events:
        assert values["loss"] == step / 2 and values["time/seconds"] == 0.5
        assert math.isnan(values["bad"]) and math.isinf(values["big"])
        assert wall_time > 1.7e9 and "time/unix_s" not in values
    assert capfd.readouterr() == ("", "")


LOGGER = """
seen = []
class Logger:
    def __init__(self, run_dir, stage, recipe, resume_step):
        seen.append(("open", run_dir.name, stage, recipe["name"], resume_step))
    def log(self, step, metrics, timings):
        seen.append((step, metrics.pop("loss"), sorted(timings)))
    def close(self):
        seen.append("close")
"""


def user_logger(directory: Path, source: str) -> PythonLogger:
    file = directory / "my_logger.py"
    file.write_text(source)
    return PythonLogger(python="my_logger.py:Logger")


def test_a_logger_of_the_users_gets_every_line_and_the_step_of_a_resume(tmp_path: Path) -> None:
    choice = user_logger(tmp_path, LOGGER)
    assert write(tmp_path, choice, range(1, 3)) == ""
    write(tmp_path, choice, range(3, 4), resume_step=2)
    from ernie_train.io.python_files import load_definition

    seen = load_definition(str(tmp_path / "my_logger.py"), "seen")
    opened = ("open", tmp_path.name, "01-sft", "r")
    lines = [(step, step / 2, ["seconds", "unix_s"]) for step in (1, 2, 3)]
    assert seen == [(*opened, None), *lines[:2], "close", (*opened, 2), lines[2], "close"]
    # What the class takes out of its copy stays in the file.
    assert (tmp_path / "01-sft/metrics.jsonl").read_text().count('"loss"') == 3


FAILING = """
class Logger:
    def __init__(self, **told): {init}
    def log(self, step, metrics, timings): {log}
    def close(self): {close}
"""


@pytest.mark.parametrize("where", ["init", "log", "close", "module", "arguments"])
@pytest.mark.parametrize("fault", ["raise OSError('\\x1b]8;;x\\x07no net')", "exit(1)"])
def test_a_logger_that_raises_is_told_once_and_stops_nothing(
    tmp_path: Path, where: str, fault: str
) -> None:
    bodies = {"init": "pass", "log": "pass", "close": "pass"}
    source = FAILING.format(**(bodies | ({where: fault} if where in bodies else {})))
    source = f"{source}\n{fault}" if where == "module" else source
    source = source.replace("**told", "nothing") if where == "arguments" else source
    told = write(tmp_path, user_logger(tmp_path, source), range(1, 5))
    assert told.count("warning: metrics my_logger.py:Logger: ") == 1
    assert "training goes on" in told
    assert (tmp_path / "01-sft/metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("my_logger.py", "expected file.py:Class"),
        ("gone.py:Logger", "cannot read"),
        ("my_logger.py:Other", "defines no Other; it defines Logger"),
        ("broken.py:Logger", "broken.py:1"),
    ],
)
def test_a_logger_that_is_not_there_is_a_mistake_before_training(
    tmp_path: Path, text: str, told: str
) -> None:
    user_logger(tmp_path, LOGGER.replace("seen = []", ""))
    (tmp_path / "broken.py").write_text("class Logger(:")
    with pytest.raises(UserError, match=told):
        LoggerSettings([PythonLogger(python=text)], tmp_path).check()


@pytest.mark.parametrize(
    "source",
    [
        "Logger: type = object",
        "if True:\n    class Logger: ...",
        "try:\n    from a import Logger\nexcept ImportError:\n    Logger = None",
        "import logging as Logger",
        "a = (Logger := object)",
    ],
)
def test_a_class_may_be_named_in_any_way_of_python(tmp_path: Path, source: str) -> None:
    (tmp_path / "my_logger.py").write_text(f"{source}\nclass Outer:\n    class Inner: ...\n")
    LoggerSettings([PythonLogger(python="my_logger.py:Logger")], tmp_path).check()
    with pytest.raises(UserError, match="defines no Inner"):
        LoggerSettings([PythonLogger(python="my_logger.py:Inner")], tmp_path).check()


@pytest.mark.parametrize("twice", ["tensorboard", {"python": "a.py:Logger"}])
def test_a_viewer_that_is_named_twice_is_refused(tmp_path, twice):
    recipe = write_recipe(tmp_path, metrics=["visualdl", twice, twice])
    with pytest.raises(ConfigError, match=r"metrics: (tensorboard|a\.py:Logger) is named twice"):
        load_recipe(recipe)
