"""The verb `report`, and `status --follow`: what a run is doing, while it does it.

Loads no Paddle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from ernie_train.cli.status import HEADLINE
from ernie_train.core.terminal import one_line
from ernie_train.report import RunFiles, read_run, write_report
from ernie_train.report.overview import StageRow, health_of, stage_rows
from ernie_train.report.run_files import StageFiles

_EVERY_S = 10.0
_FOLLOW_S = 2.0


def report_runs(
    run_dirs: Sequence[Path],
    out: Path | None,
    console: Console,
    *,
    watch: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write the report, once or until the runs are complete; `UserError` as `write_report`."""
    for runs, path in _written(run_dirs, out, sleep):
        remarks = sum(len(run.remarks) for run in runs)
        missing = f"; {remarks} remarks on what is missing or damaged" if remarks else ""
        console.print(f"report: {path}{missing}", soft_wrap=True, highlight=False)
        if not watch:
            return


def _written(
    run_dirs: Sequence[Path], out: Path | None, sleep: Callable[[float], None]
) -> Iterator[tuple[list[RunFiles], Path]]:
    while True:
        began = time.monotonic()
        path, runs = write_report(run_dirs, out)
        yield runs, path
        if all(run.is_complete and not run.is_running for run in runs):
            return
        sleep(max(_EVERY_S, 5 * (time.monotonic() - began)))


def follow_status(
    run_dir: Path, console: Console, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show stages, progress, metrics and warnings until no process runs it any more.

    Plain lines without a terminal: one for each change. `UserError` if it is no run directory.
    """
    if not console.is_terminal:
        before = ""
        for run in _read_while_running(run_dir, sleep):
            if (line := _line(run)) != before:
                console.print(line, soft_wrap=True, highlight=False)
                before = line
        return
    with Live(console=console, auto_refresh=False) as live:
        told: set[str] = set()
        for run in _read_while_running(run_dir, sleep):
            # Above the table, where they stay.
            for state, text in health_of(run).remedies:
                if state == "out" and (key := text.partition(":")[0]) not in told:
                    told.add(key)
                    live.console.print(f"warning: {text}", style="yellow", highlight=False)
            live.update(status_table(run), refresh=True)


def _read_while_running(run_dir: Path, sleep: Callable[[float], None]) -> Iterator[RunFiles]:
    while True:
        began = time.monotonic()
        run = read_run(run_dir)
        yield run
        if not run.is_running:
            return
        sleep(max(_FOLLOW_S, 5 * (time.monotonic() - began)))


def status_table(run: RunFiles) -> Table:
    """Return stages, progress and latest metrics of a run."""
    table = Table(title=one_line(run.name))
    for column in ("stage", "state", "progress", "steps", "time", "latest metrics"):
        table.add_column(column)
    for row, stage in zip(stage_rows(run), run.stages, strict=True):
        bar = ProgressBar(1.0, row.share or 0.0, width=20)
        latest = ", ".join(_latest(row, stage))
        table.add_row(row.name, row.state, bar, row.steps, row.duration, latest)
    return table


def _line(run: RunFiles) -> str:
    """Return what the latest stage that has begun does, as one line."""
    begun = [pair for pair in zip(stage_rows(run), run.stages, strict=True) if pair[1].has_begun]
    if not begun:
        return f"{one_line(run.name)}: no stage has begun"
    row, stage = begun[-1]
    return "  ".join([row.name, row.state, f"step {row.steps}", *_latest(row, stage)])


def _latest(row: StageRow, stage: StageFiles) -> list[str]:
    found = ((name, stage.curves.last(name)) for name in HEADLINE)
    shown = [f"{name} {value:.4g}" for name, value in found if value is not None]
    return shown + ([row.speed] if row.speed else [])
