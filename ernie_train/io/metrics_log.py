"""Write a stage's metrics to metrics.jsonl, to loggers and to the terminal.

`metrics.jsonl` is the source of truth: one JSON object per step, flushed at once. Numbers are
written so that reading returns the same bits; JSON has no NaN or infinity, so those are written as
the texts "nan", "inf" and "-inf". `time` holds the values that differ from run to run. On resume
the lines after the checkpoint's step are removed, and the files of VisualDL and TensorBoard are
written anew from the lines that are kept.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console

from ernie_train.core import consensus, process_group
from ernie_train.core.errors import CheckpointError, storage_errors
from ernie_train.core.foreign_files import open_regular, parse_json
from ernie_train.core.terminal import ProgressDisplay, Terminal
from ernie_train.io.files import write_text
from ernie_train.io.loggers import LoggerSettings

FILE_NAME = "metrics.jsonl"
RESERVED = ("step", "time")
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DAMAGED = "{}: not a line of metrics; restore or delete the file"


def encode_line(step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> str:
    """Return one line of metrics.jsonl, without its newline.

    Raises:
        ValueError: a metric is called `step` or `time`, or is not a number.
    """
    clash = [name for name in RESERVED if name in metrics]
    if clash:
        raise ValueError(f"a metric cannot be called {clash[0]!r}")
    values = {name: _plain(name, value) for name, value in metrics.items()}
    times = {name: _plain(name, value) for name, value in timings.items()}
    return json.dumps({"step": step, **values, "time": times}, allow_nan=False)


def _plain(name: str, value: Any) -> int | float | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, bool | str):
        raise ValueError(f"the metric {name!r} must be a number, not {value!r}")
    number = float(value)  # numpy's numbers too; float32 widens exactly
    return number if math.isfinite(number) else repr(number)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a metrics.jsonl, with NaN and infinities as numbers.

    A last line without a newline, which a killed process leaves, is skipped. A missing file has
    no lines.

    Raises:
        CheckpointError: another line is damaged; the message names file and line.
    """
    for line, place in _whole_lines(path):
        yield _decode_line(line, place)


def _whole_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line with "path:number", except a last one without a newline."""
    if not path.exists():
        return
    with open_regular(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            yield line.decode("utf-8", "replace"), f"{path}:{number}"


def _decode_line(line: str, place: str) -> dict[str, Any]:
    row = _decode_row(line, place)
    try:
        times = row.pop("time", {})
        return {**_numbers(row), "time": _numbers(times)}
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(_DAMAGED.format(place)) from None


def _decode_row(line: str, place: str) -> dict[str, Any]:
    """Return any object with a step: metrics, or samples, which hold text too."""
    try:
        row = parse_json(line)
        if isinstance(row["step"], int):
            return dict(row)
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(_DAMAGED.format(place))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with "nan", "inf" and "-inf" as numbers; `KeyError` for what is none."""
    return {
        name: value if isinstance(value, int | float) else _SPECIAL[value]
        for name, value in values.items()
    }


def cut_after(path: Path, step: int | None) -> None:
    """Remove the lines after `step` (None: all) and an incomplete last one from a file of steps.

    The lines may hold anything beside their step. The file is replaced atomically, so that a kill
    leaves either the old lines or the new ones.

    Raises:
        CheckpointError: a line is damaged.
        StorageError: the file cannot be written.
    """
    lines = _whole_lines(path) if step is not None else ()
    steps = ((line, _decode_row(line, place)["step"]) for line, place in lines)
    kept = [line for line, at in steps if step is not None and at <= step]
    write_text(path, "".join(kept))


@dataclass(frozen=True)
class PendingLine:
    """Hold the metrics of a step that a stop cut off before they were complete and logged.

    A checkpoint keeps them, so that a resumed run completes and logs them first.
    """

    step: int
    metrics: dict[str, float]
    timings: dict[str, float]

    def to_state(self) -> dict[str, list[tuple[str, int | float | str]]]:
        """Return plain values; lists, because names such as eval/mean are no keys of a state."""
        parts = {"metrics": self.metrics, "timings": self.timings}
        return {
            part: [(name, _plain(name, value)) for name, value in values.items()]
            for part, values in parts.items()
        }

    @classmethod
    def from_state(cls, step: int, state: Mapping[str, Any] | None) -> "PendingLine | None":
        """Return the line that `to_state` gave; None where the step was logged."""
        if state is None:
            return None
        return cls(step, _numbers(dict(state["metrics"])), _numbers(dict(state["timings"])))


class MetricsWriter:
    """Write a stage's metrics; use it as a context manager, or call `close`.

    Args:
        stage_dir: directory of the stage; created if it is missing.
        resume_step: step of the checkpoint that training continues from; later lines are removed.
            None starts with an empty file.
        terminal: True for a progress bar, False for plain lines, one every few seconds.
        total_steps: steps of the stage, for the time left; None if it is not known.
        label: name of the stage in the terminal.
        loggers: what the metrics are sent to beside the file.
        console: where to show progress; standard output by default.
        clock: a monotonic clock in seconds; another one in tests.

    Raises:
        StorageError: the directory cannot be written.
        CheckpointError: the existing metrics.jsonl is damaged.
    """

    def __init__(
        self,
        stage_dir: str | Path,
        *,
        resume_step: int | None,
        terminal: bool,
        total_steps: int | None = None,
        label: str = "",
        loggers: LoggerSettings | None = None,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        directory = Path(stage_dir)
        self.path = directory / FILE_NAME
        with storage_errors("cannot write", directory):
            directory.mkdir(parents=True, exist_ok=True)
        cut_after(self.path, resume_step)
        rows = list(read_metrics(self.path))
        self._last_step = resume_step if resume_step is not None else -1
        measured = [row["validation_loss"] for row in rows if "validation_loss" in row]
        self._last_validation: float | None = measured[-1] if measured else None
        self._display = ProgressDisplay(
            console or Terminal(),
            bar=terminal,
            label=label,
            unit="step",
            total=total_steps,
            first=resume_step or 0,
            clock=clock,
        )
        kept = [(row.pop("step"), row.pop("time"), row) for row in rows]
        self._loggers = (loggers or LoggerSettings()).open(
            directory, [(step, row, times) for step, times, row in kept], resume_step, self.note
        )
        with storage_errors("cannot write", self.path):
            self._stream = self.path.open("a", encoding="utf-8", newline="\n")

    def log(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Record one step.

        Args:
            step: the optimizer step; not lower than that of the previous call.
            metrics: values that are the same, bit for bit, in a repeated run.
            timings: values that differ from run to run, such as `tokens_per_second`.

        Raises:
            ValueError: the step is before the last one, a name is reserved, or a value is not a
                number.
            StorageError: the disk is full.
        """
        if step < self._last_step:
            raise ValueError(f"step {step} was logged after step {self._last_step}")
        self._last_step = step
        times = {**timings, "unix_s": time.time()}
        line = encode_line(step, metrics, times)
        with storage_errors("cannot write", self.path):
            self._stream.write(line + "\n")
            self._stream.flush()
            for logger in self._loggers:
                logger.log(step, metrics, times)
        self._last_validation = metrics.get("validation_loss", self._last_validation)
        shown = {**metrics, **timings}
        if self._last_validation is not None:
            shown["validation_loss"] = self._last_validation
        self._display.update(step, _summary(shown))

    def note(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._display.note(text)

    def sync(self) -> None:
        """Flush the file to the disk, so that a checkpoint is never ahead of it."""
        with storage_errors("cannot write", self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """End the progress bar and close the files; may be called more than once."""
        self._display.close()
        with storage_errors("cannot write", self.path):
            for logger in self._loggers:
                logger.close()
            self._stream.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class StageMetrics:
    """Write a stage's metrics on rank 0; a context manager for every rank.

    Takes the arguments of `MetricsWriter`. Every rank must call the constructor, `log` and `sync`:
    if rank 0 cannot write, all ranks raise.
    """

    def __init__(self, stage_dir: str | Path, **options: Any) -> None:
        self._writer: MetricsWriter | None = None
        with consensus.fail_together():
            if process_group.is_main():
                self._writer = MetricsWriter(stage_dir, **options)

    def log(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Record one step, as `MetricsWriter.log` does; every rank must call it."""
        with consensus.fail_together():
            if self._writer is not None:
                self._writer.log(step, metrics, timings)

    def note(self, text: str) -> None:
        """Print a line, on rank 0; any rank may call it alone."""
        if self._writer is not None:
            self._writer.note(text)

    def sync(self) -> None:
        """Flush the file to the disk, as `MetricsWriter.sync` does; every rank must call it."""
        with consensus.fail_together():
            if self._writer is not None:
                self._writer.sync()

    def __enter__(self) -> "StageMetrics":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:  # maybe on this rank alone
            self._close()
            return
        with consensus.fail_together():
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


# What a line of the terminal shows of a step that has all of these metrics.
_SHOWN: tuple[tuple[set[str], str], ...] = (
    ({"loss"}, "loss {loss:.4f}"),
    ({"validation_loss"}, "validation loss {validation_loss:.4f}"),
    ({"loss", "rewards/accuracies"}, "pairs right {rewards/accuracies:.3f}"),
    ({"reward"}, "reward {reward:.3f}  accuracy {accuracy:.3f}"),
    ({"kl"}, "kl {kl:.4f}"),
    ({"lr"}, "lr {lr:.2e}"),
    ({"rope_theta"}, "RoPE base {rope_theta:,.0f} at {seq_len:.0f} tokens"),
    ({"moe/load_max"}, "busiest expert {moe/load_max:.1f}x"),
)


def _summary(values: Mapping[str, float]) -> list[str]:
    """Return the few values that fit in a line of the terminal."""
    given = {"accuracy": 0.0, **values}
    parts = [shown.format_map(given) for names, shown in _SHOWN if names <= values.keys()]
    if (idle := values.get("moe/dead_experts", 0)) > 0:
        parts.append(f"{idle:.0f} expert{'s' if idle > 1 else ''} idle")
    if "tokens_per_second" in values:
        overall = values.get("tokens_per_second_overall")
        beside = "" if overall is None else f" ({overall:,.0f} overall)"
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s{beside}")
    return parts
