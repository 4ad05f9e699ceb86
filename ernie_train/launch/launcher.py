"""Paddle's launcher as a process: how it is started, and what its log says of its ranks.

What it does with signals and exit statuses is of no use here: it catches SIGTERM, kills its ranks
after 30 seconds and exits with the signal's number; when one rank exits with another status than 0,
it kills the others after 3 seconds, even if they are saving. Therefore signals are blocked in it, a
rank that could leave its last word exits with 0, and job.py decides who ends when.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ernie_train.core import processes
from ernie_train.core.signals import StopFlag
from ernie_train.launch import rank_files

HANG_TIMEOUT_S = 25.0  # collectives of gloo give up after 30 s by themselves
# The launcher would take these for its own options.
_ITS_VARIABLES = (
    "PADDLE_MASTER", "PADDLE_NNODES", "PADDLE_NPROC_PER_NODE", "PADDLE_RANK", "PADDLE_LOG_DIR",
    "PADDLE_RUN_MODE", "PADDLE_LOG_LEVEL", "PADDLE_JOB_ID", "PADDLE_MAX_RESTART", "PADDLE_DEVICES",
    "PADDLE_ELASTIC_LEVEL", "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "PADDLE_LOCAL_SIZE",
    "PADDLE_TRAINER_ENDPOINTS", "PADDLE_CURRENT_ENDPOINT", "PADDLE_START_PORT", "PADDLE_IPS",
)  # fmt: skip
_BACKEND = "PADDLE_DISTRI_BACKEND"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DIED = re.compile(r"^Container rank (\d+) status failed .* code (-?\d+) log", re.MULTILINE)


@dataclass(frozen=True)
class LaunchSettings:
    """Which ranks to start, and what to do about those that fail."""

    nproc: int  # ranks on this machine
    nnodes: int = 1
    master: str | None = None  # address:port of a machine that all reach, if there are several
    node_rank: int = -1  # this machine's number; -1: the launcher deals numbers out
    max_restarts: int = 0
    hang_timeout_s: float = HANG_TIMEOUT_S
    hide_gpus: bool = False  # from the ranks, which then talk over gloo


class Launcher:
    """`paddle.distributed.launch`, told to run `command` as each rank."""

    def __init__(self, command: Sequence[str], settings: LaunchSettings, directory: Path) -> None:
        self._directory = directory
        self._log = directory / "launcher.log"
        python = [sys.executable, "-P", "-W", "ignore", "-m", "paddle.distributed.launch"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*python, *_options(settings, directory), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(settings, directory),
                start_new_session=True,  # the terminal's signals are for the supervisor alone
                preexec_fn=partial(_bind, os.getpid()),
            )

    def rank_log(self, local_rank: int) -> Path:
        """What the rank of this number on this machine prints."""
        return self._directory / f"workerlog.{local_rank}"

    def deaths(self) -> dict[int, int]:
        """Statuses of ranks of this machine that it found ended with another one than 0."""
        text = self._log.read_text("utf-8", "replace")
        return {int(local_rank): int(status) for local_rank, status in _DIED.findall(text)}

    def last_line(self) -> str:
        """What it said at last, which is its reason if it could not start anything."""
        return last_line(self._log)


def last_line(path: Path) -> str:
    """The last line of a text file that is not empty; "" without one."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _options(settings: LaunchSettings, directory: Path) -> list[str]:
    options = [f"--nproc_per_node={settings.nproc}", f"--nnodes={settings.nnodes}"]
    options += [f"--log_dir={directory}", "--log_level=INFO"]
    if settings.nnodes == 1:
        # The name of a machine may lead to an address that is no longer its own.
        return [*options, "--host=127.0.0.1"]
    return [*options, f"--master={settings.master}", f"--rank={settings.node_rank}"]


def _environment(settings: LaunchSettings, directory: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in _ITS_VARIABLES}
    if settings.hide_gpus or _sees_no_gpu(environment.get(_VISIBLE)):
        # The launcher takes the backend from what GPUs it counts, not from what ranks will use;
        # "" counts as one GPU there, and with fewer than ranks it fails. No GPU has the number -1.
        environment |= {_VISIBLE: ",".join(["-1"] * settings.nproc), _BACKEND: "gloo"}
    root = str(Path(__file__).resolve().parents[2])
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH")))),
        rank_files.DIRECTORY: str(directory),
        rank_files.SUPERVISOR: str(os.getpid()),
    }
    environment.setdefault("GLOG_minloglevel", "1")  # how ranks find one another is no news
    if sys.stdout is not None and sys.stdout.isatty():
        size = os.get_terminal_size(sys.stdout.fileno())
        environment[rank_files.TERMINAL] = "1"
        environment |= {"COLUMNS": str(size.columns), "LINES": str(size.lines)}
    return environment


def _sees_no_gpu(visible: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES hides every GPU: CUDA reads up to a wrong one."""
    return visible is not None and visible.split(",")[0].strip() in ("", "-1")


def _bind(parent: int) -> None:
    """Runs in the new process before it becomes the launcher."""
    processes.die_with_parent(parent)
    # Its ranks inherit that: a signal waits until their work enters a StopFlag.
    signal.pthread_sigmask(signal.SIG_BLOCK, StopFlag.SIGNALS)
