"""Start and watch the ranks of this machine in one launch, and report how they ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ernie_train.core import processes
from ernie_train.launch import rank_files
from ernie_train.launch.launcher import (
    Launcher,
    LaunchSettings,
    failed_ranks,
    lacks_gpus,
    last_line,
)
from ernie_train.launch.logs import RankLogs
from ernie_train.launch.rank_files import RankExit, RankProcess

POLL_S = 0.1
SETTLE_S = 2.0  # after a failure: a rank may have failed first and report it last
START_LIMIT_S = 300.0  # from the start of a rank by the launcher to its first heartbeat
LEAVE_LIMIT_S = 20.0  # from a rank's exit report to that of the failure that caused it, or its end

SCRATCH = "ernie_train_launch_"


def delete_abandoned_directories() -> None:
    """Delete the directories of supervisors that were killed: they hold output of ranks."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*_*"):
        pid = path.name.removeprefix(SCRATCH).partition("_")[0]
        if pid.isdigit() and processes.process_state(int(pid)) is None:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class ExitReport:
    """Report how the ranks of a launch ended."""

    status: int
    message: str = ""
    rank: int | None = None  # the rank that the message is about
    restartable: bool = False  # a restart may help


class RankGroup:
    """Manage the ranks of this machine from their start to their end; a context manager."""

    def __init__(self, command: Sequence[str], settings: LaunchSettings, logs: RankLogs) -> None:
        self.settings = settings
        self.logs = logs
        self.ranks: dict[int, RankProcess] = {}
        self.exits: dict[int, RankExit] = {}
        self._died: dict[int, float] = {}  # without an exit report; when that was seen
        self._last_signs: dict[int, tuple[object, float]] = {}  # last sign of life and its time
        self._signalled: set[int] = set()
        self._polled_at = self._waiting_since = time.monotonic()
        delete_abandoned_directories()
        self._other_processes = processes.descendants([os.getpid()])
        self._scratch = tempfile.TemporaryDirectory(
            prefix=f"{SCRATCH}{os.getpid()}_", ignore_cleanup_errors=True
        )
        self.directory = Path(self._scratch.name)
        self._launcher = Launcher(command, settings, self.directory)

    def poll(self) -> None:
        """Read what ranks have reported since the last poll, and forward their output."""
        now = time.monotonic()
        if now - self._polled_at > 20 * POLL_S:
            self._last_signs.clear()  # this process was stopped and has missed heartbeats
        self._polled_at = now
        for process in rank_files.read_processes(self.directory):
            self.ranks.setdefault(process.rank, process)
            self.logs.follow(process.rank, self._launcher.rank_log(process.local_rank))
        dead = [r for r, p in self.ranks.items() if not processes.is_running(p.pid, p.started)]
        # Exits are read after `dead`, so a rank that reports and ends in between is not missed.
        for report in rank_files.read_exits(self.directory):
            self.exits.setdefault(report.rank, report)
        for rank in dead:
            if rank not in self.exits:
                self._died.setdefault(rank, now)
        for rank in self._silent_s():
            self._record_sign_of_life(rank, now)
        self.logs.forward()

    @property
    def is_waiting_for_machines(self) -> bool:
        """Return whether the launcher has started no rank because other machines are not there."""
        ranks = range(self.settings.nproc)
        return self.settings.nnodes > 1 and not any(map(self._has_begun, ranks))

    def _has_begun(self, local_rank: int) -> bool:
        return self._launcher.rank_log(local_rank).exists()

    def terminate(self) -> None:
        """Send SIGTERM once to every rank that has started; call again for those that had not."""
        for rank, process in self.ranks.items():
            if rank not in self._signalled and processes.is_running(process.pid, process.started):
                self._signalled.add(rank)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    # ---- how they ended --------------------------------------------------------------------------

    def exit_report(self) -> ExitReport | None:
        """Return the report once all ranks have ended or a failure is known, None before."""
        now = time.monotonic()
        if len(self.exits) == self.settings.nproc:
            return self._report_of_exits()
        failed = [e for e in self.exits.values() if e.status not in (0, 3)]
        if failed or self._died:
            # A rank that fails because another one did has no message; wait for the other's.
            known = self._died or any(report.message for report in failed)
            first = min([*(report.monotonic_s for report in failed), *self._died.values()])
            if now - first <= (SETTLE_S if known else LEAVE_LIMIT_S):
                return None
            # Statuses 2, 4 and 5 have a cause of their own: no death of another rank leads to them.
            own_cause = any(report.status in (2, 4, 5) for report in failed)
            died = self._report_of_death() if self._died and not own_cause else None
            return died or self._report_of_exits()
        if self._launcher.process.poll() is not None:
            return self._report_of_launcher()
        return self._report_of_hang() or self._report_of_missing(now)

    def _report_of_exits(self) -> ExitReport:
        order = sorted(self.exits.values(), key=lambda report: report.monotonic_s)
        failed = [report for report in order if report.status not in (0, 3)]
        stopped = [report for report in order if report.status == 3]
        # The first with a message: one without failed because of another rank.
        first = min(failed or stopped or order, key=lambda report: not report.message)
        return ExitReport(first.status, first.message, first.rank, restartable=first.status == 1)

    def _report_of_death(self) -> ExitReport:
        if self._launcher.process.poll() == -signal.SIGKILL:
            return ExitReport(1, "Paddle's launcher was killed", restartable=True)
        rank = min(self._died, key=lambda r: (self._died[r], r))
        cause = self._cause_of_death(self.ranks[rank].local_rank)
        return ExitReport(1, cause, rank, restartable=True)

    def _cause_of_death(self, local_rank: int) -> str:
        # Only the launcher, the parent of the rank, knows its exit status.
        status = failed_ranks(self._launcher.log).get(local_rank)
        if status == -signal.SIGKILL:
            return "was killed (SIGKILL), by someone or for want of memory"
        if status is not None and status < 0:
            return f"was ended by {processes.signal_name(-status)}"
        if status is not None:
            return f"exited with status {status} and said nothing"
        return "ended and said nothing; it may have been killed for want of memory"

    def _report_of_launcher(self) -> ExitReport:
        """Report that the launcher ended before its ranks had started."""
        for local_rank in failed_ranks(self._launcher.log):
            message = f"rank {local_rank} of this machine {self._cause_of_death(local_rank)}"
            output = last_line(self._launcher.rank_log(local_rank))
            return ExitReport(1, f"{message}: {output}" if output else message, restartable=True)
        if lacks_gpus(self._launcher.log):
            few = "there are fewer GPUs here (nvidia-smi and CUDA_VISIBLE_DEVICES show them)"
            return ExitReport(2, f"--nproc {self.settings.nproc}: {few}; each rank takes one")
        output = last_line(self._launcher.log) or "without a word"
        return ExitReport(1, f"Paddle's launcher ended: {output}", restartable=True)

    def _report_of_hang(self) -> ExitReport | None:
        """Report a rank that for too long sent no heartbeat and did not use the processor."""
        silent_s = self._silent_s()
        rank = max(silent_s, key=lambda r: silent_s[r], default=None)
        if rank is None or silent_s[rank] <= self.settings.hang_timeout_s:
            return None
        seconds = f"{silent_s[rank]:.0f} s"
        message = f"gave no sign of life for {seconds} and was ended (--hang-timeout-s)"
        return ExitReport(1, message, rank, restartable=True)

    def _silent_s(self) -> dict[int, float]:
        """Return rank -> seconds since its last sign of life, for ranks that should be alive."""
        alive = [r for r in self.ranks if r not in self.exits and r not in self._died]
        last = {rank: self._last_signs.get(rank, (None, self._polled_at))[1] for rank in alive}
        return {rank: self._polled_at - at for rank, at in last.items()}

    def _record_sign_of_life(self, rank: int, now: float) -> None:
        # The heartbeat thread may starve in a busy process, so processor time counts too.
        state = processes.process_state(self.ranks[rank].pid)
        heartbeat = rank_files.last_heartbeat(self.directory, rank)
        sign = (heartbeat, state.cpu_ticks if state else 0)
        if rank not in self._last_signs or self._last_signs[rank][0] != sign:
            self._last_signs[rank] = (sign, now)

    def _report_of_missing(self, now: float) -> ExitReport | None:
        """Report a rank that the launcher started long ago and that has not reported itself."""
        known = {process.local_rank for process in self.ranks.values()}
        missing = [i for i in range(self.settings.nproc) if i not in known]
        launched = [i for i in missing if self._has_begun(i)]
        if not launched:
            self._waiting_since = now  # machines wait for each other before ranks are launched
        if now - self._waiting_since <= START_LIMIT_S:
            return None
        message = f"rank {launched[0]} of this machine did not come up in {START_LIMIT_S:.0f} s"
        return ExitReport(1, message, restartable=True)

    # ---- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """End every process that still runs, and forward the rest of the output."""
        if len(self.exits) == self.settings.nproc:
            with suppress(subprocess.TimeoutExpired):  # all have reported; let them exit
                self._launcher.process.wait(LEAVE_LIMIT_S)
        self._launcher.process.kill()
        self._launcher.process.wait()
        processes.kill_descendants(self._other_processes)
        self.logs.close()
        self._scratch.cleanup()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
