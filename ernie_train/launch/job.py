"""One start of the ranks of this machine, watched until it is known how it ended."""

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
from ernie_train.launch.launcher import Launcher, LaunchSettings, last_line
from ernie_train.launch.logs import RankLogs
from ernie_train.launch.rank_files import RankExit, RankProcess

POLL_S = 0.1
SETTLE_S = 2.0  # a rank fails within moments of its peer: it must not be blamed for that
START_LIMIT_S = 300.0  # from a rank's start by the launcher to its first sign of life
LEAVE_LIMIT_S = 20.0  # from the last word of all ranks to the end of their processes
SUSPECT_S = 5.0  # whose silence may be why another rank gave up waiting


SCRATCH = "ernie_train_launch_"


def sweep_up() -> None:
    """Deletes what supervisors that were killed left; it holds the environment of their ranks."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*_*"):
        pid = path.name.removeprefix(SCRATCH).partition("_")[0]
        if pid.isdigit() and processes.process_state(int(pid)) is None:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Verdict:
    """How a start of ranks ended. `rank` is whom it is about; `again`: a restart may help."""

    status: int
    message: str = ""
    rank: int | None = None
    again: bool = False


class Job:
    """The ranks of this machine, from their start to their end; a context manager."""

    def __init__(self, command: Sequence[str], settings: LaunchSettings, logs: RankLogs) -> None:
        self.settings = settings
        self.logs = logs
        self.ranks: dict[int, RankProcess] = {}
        self.endings: dict[int, RankExit] = {}
        self._dead: dict[int, float] = {}  # without a last word, and when that was seen
        self._signs: dict[int, tuple[object, float]] = {}  # the last sign of life, and when
        self._signalled: set[int] = set()
        self._looked_at = self._began = time.monotonic()
        sweep_up()
        self._spared = processes.descendants([os.getpid()])
        self._scratch = tempfile.TemporaryDirectory(
            prefix=f"{SCRATCH}{os.getpid()}_", ignore_cleanup_errors=True
        )
        self.directory = Path(self._scratch.name)
        self._launcher = Launcher(command, settings, self.directory)

    def look(self) -> None:
        """Takes in what has happened since the last look, and passes output on."""
        now = time.monotonic()
        if now - self._looked_at > 20 * POLL_S:
            self._signs.clear()  # this process itself was stopped: what it missed says nothing
        self._looked_at = now
        for process in rank_files.read_processes(self.directory):
            self.ranks.setdefault(process.rank, process)
            self.logs.add(process.rank, self._launcher.rank_log(process.local_rank))
        dead = [r for r, p in self.ranks.items() if not processes.is_running(p.pid, p.started)]
        for ending in rank_files.read_endings(self.directory):  # last words come before death
            self.endings.setdefault(ending.rank, ending)
        for rank in dead:
            if rank not in self.endings:
                self._dead.setdefault(rank, now)
        for rank in self._silent():
            self._note_sign(rank, now)
        self.logs.pass_on()

    def stop(self) -> None:
        """Asks every rank once to save and end; one that is not up yet is asked by a later call."""
        for rank, process in self.ranks.items():
            if rank not in self._signalled and processes.is_running(process.pid, process.started):
                self._signalled.add(rank)
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    # ---- what became of them ---------------------------------------------------------------------

    def verdict(self) -> Verdict | None:
        """What is to be said of the ranks, once that is known; None while they run."""
        now = time.monotonic()
        if len(self.endings) == self.settings.nproc:
            return self._of_endings()
        failed = [e for e in self.endings.values() if e.status not in (0, 3)]
        if failed or self._dead:
            # Who fails with a peer says nothing; the peer may be tidying up before its last word.
            heard = self._dead or any(ending.message for ending in failed)
            first = min([*(ending.at for ending in failed), *self._dead.values()])
            if now - first <= (SETTLE_S if heard else LEAVE_LIMIT_S):
                return None
            # No death of a peer causes a mistake, a non-finite step or a missed gate.
            blamed = None if any(e.status in (2, 4, 5) for e in failed) else self._of_the_dead()
            return blamed or self._of_endings()
        if self._launcher.process.poll() is not None:
            return self._of_the_launcher()
        return self._of_the_silent(self.settings.hang_timeout_s) or self._of_the_absent(now)

    def _of_endings(self) -> Verdict:
        order = sorted(self.endings.values(), key=lambda ending: ending.at)
        failed = [ending for ending in order if ending.status not in (0, 3)]
        stopped = [ending for ending in order if ending.status == 3]
        # A rank may end because another one failed, and says nothing itself.
        first = min(failed or stopped or order, key=lambda ending: not ending.message)
        if first.status != 1:
            return Verdict(first.status, first.message, first.rank)
        # It may be that it gave up waiting for one that does not answer.
        told = Verdict(1, first.message, first.rank, again=True)
        return self._of_the_silent(SUSPECT_S) or told

    def _of_the_dead(self) -> Verdict | None:
        if not self._dead:
            return None
        if self._launcher.process.poll() == -signal.SIGKILL:
            return Verdict(1, "Paddle's launcher was killed", again=True)
        rank = min(self._dead, key=lambda r: (self._dead[r], r))
        return Verdict(1, self._cause(self.ranks[rank].local_rank), rank, again=True)

    def _cause(self, local_rank: int) -> str:
        """How a process ended that said nothing; the launcher, its parent, knows its status."""
        status = self._launcher.deaths().get(local_rank)
        if status == -signal.SIGKILL:
            return "was killed (SIGKILL), by someone or for want of memory"
        if status is not None and status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        if status is not None:
            return f"exited with status {status} and said nothing"
        return "ended and said nothing; it may have been killed for want of memory"

    def _of_the_launcher(self) -> Verdict:
        """It ended before its ranks came up."""
        for local_rank in self._launcher.deaths():
            message = f"rank {local_rank} of this machine {self._cause(local_rank)}"
            said = last_line(self._launcher.rank_log(local_rank))
            return Verdict(1, f"{message}: {said}" if said else message, again=True)
        said = self._launcher.last_line() or "without a word"
        return Verdict(1, f"Paddle's launcher ended: {said}", again=True)

    def _of_the_silent(self, limit_s: float) -> Verdict | None:
        """A rank that for `limit_s` neither gave signs of life nor used the processor."""
        silent = self._silent()
        rank = max(silent, key=lambda r: silent[r], default=None)
        if rank is None or silent[rank] <= limit_s:
            return None
        message = f"gave no sign of life for {silent[rank]:.0f} s and was ended (--hang-timeout-s)"
        return Verdict(1, message, rank, again=True)

    def _silent(self) -> dict[int, float]:
        """For how many seconds each rank that should live has not been heard of."""
        living = [r for r in self.ranks if r not in self.endings and r not in self._dead]
        known = {rank: self._signs.get(rank, (None, self._looked_at))[1] for rank in living}
        return {rank: self._looked_at - at for rank, at in known.items()}

    def _note_sign(self, rank: int, now: float) -> None:
        # A thread that touches a file may starve in a process that is busy, hence the processor.
        state = processes.process_state(self.ranks[rank].pid)
        sign = (rank_files.last_beat(self.directory, rank), state.cpu_ticks if state else 0)
        if rank not in self._signs or self._signs[rank][0] != sign:
            self._signs[rank] = (sign, now)

    def _of_the_absent(self, now: float) -> Verdict | None:
        """A rank that the launcher started long ago and that has not come up."""
        up = {process.local_rank for process in self.ranks.values()}
        absent = [i for i in range(self.settings.nproc) if i not in up]
        begun = [i for i in absent if self._launcher.rank_log(i).exists()]
        if not begun:
            self._began = now  # machines wait for one another before the launcher starts ranks
        if now - self._began <= START_LIMIT_S:
            return None
        message = f"rank {begun[0]} of this machine did not come up in {START_LIMIT_S:.0f} s"
        return Verdict(1, message, again=True)

    # ---- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends what still runs, to the last process, and passes the rest of the output on."""
        if len(self.endings) == self.settings.nproc:
            with suppress(subprocess.TimeoutExpired):  # all is said; only their exits are left
                self._launcher.process.wait(LEAVE_LIMIT_S)
        self._launcher.process.kill()
        self._launcher.process.wait()
        processes.kill_descendants(self._spared)
        self.logs.close()
        self._scratch.cleanup()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
