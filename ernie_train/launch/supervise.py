"""The command that started the ranks: it watches, restarts, and speaks for them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ernie_train.core import processes
from ernie_train.core.errors import ConfigError
from ernie_train.core.signals import StopFlag
from ernie_train.launch import rank_files
from ernie_train.launch.console import SafeConsole
from ernie_train.launch.job import POLL_S, Job, Verdict
from ernie_train.launch.launcher import LaunchSettings
from ernie_train.launch.logs import LOGS, RankLogs

RECORD = "launches.jsonl"
_ADDRESS = re.compile(r"[^:/\s]+:\d+")
Command = Callable[[bool], Sequence[str]]  # given whether stages that were asked for anew are begun


def supervise(
    command: Command, settings: LaunchSettings, run_dir: Path | None, console: Console
) -> int:
    """Runs `command` as each rank of this machine until it is over; returns the exit status.

    SIGTERM and SIGINT are passed on to every rank once. When a rank dies or hangs all are ended,
    and started again as often as the settings allow. No process is left behind, not even if this
    one is killed. Where something that it writes or says itself is lost, the job goes on.

    Raises:
        ConfigError: the settings contradict one another.
    """
    check(settings)
    processes.adopt_orphans()
    restarts, anew_begun, voice = 0, False, SafeConsole(console)
    with StopFlag() as stop:
        while True:
            title = f"{settings.nproc} ranks" + (f", restart {restarts}" if restarts else "")
            logs = RankLogs(run_dir, title, voice)
            with Job(command(anew_begun), settings, logs) as job:
                verdict = _watch(job, stop)
                anew_begun = anew_begun or rank_files.was_noted(job.directory, "anew")
                if verdict.status not in (0, 3):
                    _tell(job, verdict, voice)
            try:
                _record(run_dir, settings, restarts, verdict)
            except OSError as error:
                voice.complain(f"{LOGS}/{RECORD}", error)
            if not verdict.again or restarts == settings.max_restarts or stop.requested:
                break
            restarts += 1
            voice.say(f"starting the ranks again ({restarts} of {settings.max_restarts})")
    if verdict.status == 3:
        voice.error(verdict.message)
    return verdict.status


def check(settings: LaunchSettings) -> None:
    """Raises `ConfigError` where the settings contradict one another."""
    problems = []
    if settings.nnodes > 1 and settings.master is None:
        problems.append("--nnodes: several machines need --master ADDRESS:PORT to find one another")
    elif settings.master is not None and not _ADDRESS.fullmatch(settings.master):
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


def _watch(job: Job, stop: StopFlag) -> Verdict:
    while True:
        job.look()
        if stop.requested:
            job.stop()
        verdict = job.verdict()
        if verdict is not None:
            return verdict
        time.sleep(POLL_S)


def _tell(job: Job, verdict: Verdict, voice: SafeConsole) -> None:
    """The message first, then what the rank had printed, if that was not shown already."""
    job.logs.interrupt()
    lines = job.logs.last_lines(verdict.rank) if verdict.rank else []
    named = verdict.status == 1 and verdict.rank is not None
    if verdict.message:
        name = f"rank {verdict.rank}: " if named else ""
        voice.error(name + verdict.message)
    if named and lines:
        voice.say(f"rank {verdict.rank} printed last ({job.logs.path(verdict.rank or 0)}):")
        for line in lines:
            voice.say(f"  {line}")


def print_error(console: Console, message: str) -> None:
    """Prints why a command ends, if somebody can still read it."""
    SafeConsole(console).error(message)


def _record(
    run_dir: Path | None, settings: LaunchSettings, restarts: int, verdict: Verdict
) -> None:
    """A line for `status`, where there is a run directory."""
    if run_dir is None or not run_dir.is_dir():
        return
    who = f"rank {verdict.rank}: " if verdict.status == 1 and verdict.rank is not None else ""
    line = {
        "unix_s": time.time(),
        "ranks": settings.nproc * settings.nnodes,
        "restart": restarts,
        "status": verdict.status,
        "message": who + verdict.message,
    }
    (run_dir / LOGS).mkdir(exist_ok=True)
    with (run_dir / LOGS / RECORD).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def last_launch(run_dir: Path) -> str | None:
    """How the last launch in a run directory ended, in words; None if there was none."""
    try:
        line = (run_dir / LOGS / RECORD).read_text("utf-8").splitlines()[-1]
        found = json.loads(line)
        ranks = f"{found['ranks']} rank{'s' if found['ranks'] > 1 else ''}"
        words = f"{ranks}, ended with status {found['status']}"
        return f"{words}: {found['message']}" if found["message"] else words
    except (OSError, ValueError, KeyError, IndexError):
        return None
