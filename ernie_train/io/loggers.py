"""Send metrics to viewers: VisualDL, TensorBoard, and a class of the user's own.

`metrics.jsonl` is written whatever a recipe names here (`metrics_log`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ernie_train.core.config import StrictConfig
from ernie_train.core.errors import storage_errors
from ernie_train.io.python_files import find_definition, load_definition

Row = tuple[int, Mapping[str, float], Mapping[str, float]]  # step, metrics, timings


class PythonLogger(StrictConfig):
    """A class in a user's file, `my_logger.py:Logger`, that is given every line of metrics."""

    python: str
    """A class in a file of your own, `my_logger.py:Logger`, made at the start of a stage and given
    each line of metrics (docs/report.md#a-logger-of-your-own).
    """

    def find(self, base_dir: Path) -> tuple[str, str]:
        """Return file and class; `UserError` if the file does not define it."""
        example = "file.py:Class, like my_logger.py:Logger"
        return find_definition(self.python, base_dir, "metrics", example)


LoggerChoice = Literal["visualdl", "tensorboard"] | PythonLogger


class MetricsLogger(Protocol):
    """Receives every line of a stage's metrics on rank 0, in the order of steps."""

    def log(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Record one step; `timings` has `unix_s`, the seconds since 1970."""

    def close(self) -> None:
        """Write what is outstanding."""


@dataclass(frozen=True)
class LoggerSettings:
    """Name what metrics are sent to, with what a user's class is told of the run."""

    choices: Sequence[LoggerChoice] = ("visualdl",)
    base_dir: Path = Path()
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UserError` for a class that its file does not define; nothing is run."""
        for choice in self.choices:
            if isinstance(choice, PythonLogger):
                choice.find(self.base_dir)

    def open(
        self,
        stage_dir: Path,
        kept: Sequence[Row],
        resume_step: int | None,
        say: Callable[[str], None],
    ) -> list[MetricsLogger]:
        """Open the loggers of a stage.

        Args:
            stage_dir: directory of the stage, in the run directory.
            kept: the lines up to the checkpoint that training continues from. Files are written
                anew from them; a user's class, which may write to a server, is told the step.
            resume_step: the step of that checkpoint; None at the start.
            say: prints the one warning about a user's class that fails.
        """
        opened: list[MetricsLogger] = []
        for choice in self.choices:
            if isinstance(choice, PythonLogger):
                told = {"run_dir": stage_dir.parent, "stage": stage_dir.name}
                more = {"recipe": dict(self.recipe), "resume_step": resume_step}
                opened.append(_UserLogger(choice, self.base_dir, {**told, **more}, say))
                continue
            logger = _FILES[choice](stage_dir / choice)
            for row in kept:
                logger.log(*row)
            opened.append(logger)
        return opened


class _VisualDL:
    """Write VisualDL's scalars to a single file, since its viewer shows one file per directory."""

    def __init__(self, directory: Path) -> None:
        # Imported here because it takes half a second, which reading metrics does not need.
        from visualdl import LogWriter

        _clear(directory, "vdlrecords.*")
        with storage_errors("cannot write", directory):
            self._writer = LogWriter(logdir=str(directory), file_name="vdlrecords.metrics.log")

    def log(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        at = round(timings["unix_s"] * 1000) if "unix_s" in timings else None  # milliseconds
        for tag, value in _scalars(metrics, timings):
            self._writer.add_scalar(tag=tag, value=value, step=step, walltime=at)

    def close(self) -> None:
        self._writer.close()


class _TensorBoard:
    """Write a TensorBoard event file: one event a step, at once, without a thread of its own."""

    def __init__(self, directory: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        _clear(directory, "events.out.tfevents.*")
        with storage_errors("cannot write", directory):
            self._writer = EventsWriter(str(directory / "events"))

    def log(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=t, simple_value=v) for t, v in _scalars(metrics, timings)]
        at = timings.get("unix_s", time.time())
        self._writer.write_event(Event(step=step, wall_time=at, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


_FILES: dict[str, Callable[[Path], MetricsLogger]] = {
    "visualdl": _VisualDL,
    "tensorboard": _TensorBoard,
}


class _UserLogger:
    """Call a user's class; what it raises is told once, and never ends training."""

    def __init__(
        self,
        choice: PythonLogger,
        base_dir: Path,
        told: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._name, self._say, self._warned = choice.python, say, False
        self._logger: Any = None
        file, name = choice.find(base_dir)
        self._try("no metrics go to it", lambda: self._open(load_definition(file, name), told))

    def _open(self, make: Callable[..., Any], told: dict[str, Any]) -> None:
        self._logger = make(**told)

    def log(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        if self._logger is not None:  # copies: the class may change what it is given
            values, times = dict(metrics), dict(timings)
            self._try(f"step {step} is lost to it", lambda: self._logger.log(step, values, times))

    def close(self) -> None:
        if self._logger is not None:
            self._try("its end may be lost", self._logger.close)

    def _try(self, loss: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            if not self._warned:
                self._warned = True
                self._say(
                    f"warning: metrics {self._name}: {type(error).__name__}: {str(error)[:500]}; "
                    f"{loss}, training goes on. Said once"
                )


def _clear(directory: Path, pattern: str) -> None:
    with storage_errors("cannot write", directory):
        directory.mkdir(exist_ok=True)
        for old in directory.glob(pattern):
            old.unlink()


def _scalars(
    metrics: Mapping[str, float], timings: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    for group, values in (("", metrics), ("time/", timings)):
        yield from ((group + n, float(v)) for n, v in values.items() if n != "unix_s")
