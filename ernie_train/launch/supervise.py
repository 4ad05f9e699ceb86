"""Supervise ranks: wait for their end, restart them, print and record how they ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ernie_train.core import processes
from ernie_train.core.errors import ConfigError
from ernie_train.core.signals import NOTICE, StopFlag
from ernie_train.launch.addresses import is_master, resolve_master
from ernie_train.launch.console import SafeConsole
from ernie_train.launch.launcher import LaunchSettings
from ernie_train.launch.logs import LOGS, RankLogs
from ernie_train.launch.rank_files import STAGES_SET_ASIDE, has_marker
from ernie_train.launch.rank_group import POLL_S, ExitReport, RankGroup

RECORD = "launches.jsonl"
NOTICE_AFTER_S = 30.0  # of waiting for other machines
# Called with True once the stages that --from repeats have been set aside.
Command = Callable[[bool], Sequence[str]]


def supervise(
    command: Command, settings: LaunchSettings, run_dir: Path | None, console: Console
) -> int:
    """Run `command` as each rank of this machine until all have ended; return the exit status.

    SIGTERM and SIGINT are sent on to every rank once. When a rank dies or hangs, all are ended and
    started again, as often as the settings allow. No process is left behind, not even if this one
    is killed. If output or logs cannot be written, the ranks go on.

    Raises:
        ConfigError: the settings contradict each other, or no other machine reaches the master.
        ErnieTrainError: the master's name is not known, for ten minutes.
    """
    check_settings(settings)
    restarts, stages_set_aside, safe_console = 0, False, SafeConsole(console)
    if settings.master is not None:
        master = resolve_master(settings.master, safe_console.print)
        settings = replace(settings, master=master)
    processes.adopt_orphans()
    with StopFlag(NOTICE) as stop:
        while True:
            title = f"{settings.nproc} ranks" + (f", restart {restarts}" if restarts else "")
            logs = RankLogs(run_dir, title, safe_console)
            with RankGroup(command(stages_set_aside), settings, logs) as ranks:
                report = _wait(ranks, stop, safe_console)
                stages_set_aside |= has_marker(ranks.directory, STAGES_SET_ASIDE)
                if report.status not in (0, 3):
                    _print_failure(ranks, report, safe_console)
            try:
                _record(run_dir, settings, restarts, report)
            except OSError as error:
                safe_console.warn_once(f"{LOGS}/{RECORD}", error)
            if not report.restartable or restarts == settings.max_restarts or stop.requested:
                break
            restarts += 1
            safe_console.print(f"starting the ranks again ({restarts} of {settings.max_restarts})")
    if report.status == 3:
        safe_console.error(report.message, report.status)
    return report.status


def check_settings(settings: LaunchSettings) -> None:
    """Raise `ConfigError` if the settings contradict each other."""
    problems = []
    if settings.nnodes > 1 and settings.master is None:
        problems.append("--nnodes: several machines need --master ADDRESS:PORT to connect")
    elif settings.master is not None and not is_master(settings.master):
        problems.append(f"--master: expected ADDRESS:PORT, got {settings.master!r}")
    if settings.nnodes > 1 and settings.max_restarts > 0:
        problems.append(
            "--max-restarts: one machine alone cannot restart a job of several; let the scheduler "
            "do it (docs/launch.md)"
        )
    if settings.nnodes == 1 and settings.master is not None:
        problems.append("--master: is for several machines; give --nnodes too")
    if settings.node_rank >= settings.nnodes:
        problems.append(f"--node-rank: {settings.node_rank} is not below --nnodes")
    if problems:
        raise ConfigError(problems)


def _wait(ranks: RankGroup, stop: StopFlag, console: SafeConsole) -> ExitReport:
    notice_at: float | None = time.monotonic() + NOTICE_AFTER_S
    while True:
        ranks.poll()
        if notice_at is not None and time.monotonic() >= notice_at:
            notice_at = None
            if ranks.is_waiting_for_machines:
                console.print(
                    f"waiting for {ranks.settings.nnodes - 1} other machines at "
                    f"{ranks.settings.master}: the same command must run on each, and one of them "
                    "must have that address"
                )
        if stop.requested:
            ranks.terminate()
        report = ranks.exit_report()
        if report is not None:
            return report
        time.sleep(POLL_S)


def _message(report: ExitReport) -> str:
    """Return the message; status 1 names the rank, other statuses concern the whole run."""
    named = report.status == 1 and report.rank is not None
    return f"rank {report.rank}: {report.message}" if named else report.message


def _print_failure(ranks: RankGroup, report: ExitReport, console: SafeConsole) -> None:
    """Print the message, then the last output of the rank, unless the terminal has shown it."""
    ranks.logs.end_progress_bar()
    if report.message:
        console.error(_message(report), report.status)
    if report.status == 1 and report.rank and (lines := ranks.logs.last_lines(report.rank)):
        console.print(f"rank {report.rank} printed last ({ranks.logs.path(report.rank)}):")
        for line in lines:
            console.print(f"  {line}")


def print_error(console: Console, message: str, exit_status: int = 1) -> None:
    """Print why a command ends, if the console can still be written to."""
    SafeConsole(console).error(message, exit_status)


def _record(
    run_dir: Path | None, settings: LaunchSettings, restarts: int, report: ExitReport
) -> None:
    """Append a line for `last_launch`, if there is a run directory."""
    if run_dir is None or not run_dir.is_dir():
        return
    line = {
        "unix_s": time.time(),
        "ranks": settings.nproc * settings.nnodes,
        "restart": restarts,
        "status": report.status,
        "message": _message(report),
    }
    (run_dir / LOGS).mkdir(exist_ok=True)
    with (run_dir / LOGS / RECORD).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def last_launch(run_dir: Path) -> str | None:
    """Return a text on the end of the last launch in a run directory, None if there was none."""
    try:
        line = (run_dir / LOGS / RECORD).read_text("utf-8").splitlines()[-1]
        found = json.loads(line)
        ranks = f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
        words = f"{ranks}, ended with status {found['status']}"
        return f"{words}: {found['message']}" if found["message"] else words
    except (OSError, ValueError, LookupError, TypeError):
        return None
