"""Start Paddle's launcher as a subprocess, and read failed ranks from its log.

Its own handling of signals and exit statuses does not fit. On SIGTERM it kills its ranks after 30
seconds and exits with the signal's number; when one rank exits with a status other than 0, it kills
the others after 3 seconds, even while they save. Therefore signals are blocked in the launcher, a
rank that has written its exit report exits with 0, and rank_group.py decides when ranks end.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ernie_train.core import processes
from ernie_train.core.signals import StopFlag
from ernie_train.launch import rank_files
from ernie_train.launch.addresses import own_address

HANG_TIMEOUT_S = 25.0  # below gloo's own time-out for collectives, 30 s
# The launcher would read these in place of its options.
_LAUNCHER_VARIABLES = (
    "PADDLE_MASTER", "PADDLE_NNODES", "PADDLE_NPROC_PER_NODE", "PADDLE_RANK", "PADDLE_LOG_DIR",
    "PADDLE_RUN_MODE", "PADDLE_LOG_LEVEL", "PADDLE_JOB_ID", "PADDLE_MAX_RESTART", "PADDLE_DEVICES",
    "PADDLE_ELASTIC_LEVEL", "PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "PADDLE_LOCAL_SIZE",
    "PADDLE_TRAINER_ENDPOINTS", "PADDLE_CURRENT_ENDPOINT", "PADDLE_START_PORT", "PADDLE_IPS",
    "PADDLE_SORT_IP", "DISTRIBUTED_TRAINER_ENDPOINTS",
)  # fmt: skip
_BACKEND = "PADDLE_DISTRI_BACKEND"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEALS_GPUS = "selected_dev_list[i]"  # the line of Paddle's launcher that gives a rank its GPU
_FAILED_RANK = re.compile(r"^Container rank (\d+) status failed .* code (-?\d+) log", re.MULTILINE)


@dataclass(frozen=True)
class LaunchSettings:
    """Hold the ranks to start, and the settings for their failures."""

    nproc: int  # ranks on this machine
    nnodes: int = 1
    master: str | None = None  # name or address, and port, that all machines reach
    node_rank: int = -1  # this machine's number; -1: the launcher assigns one
    max_restarts: int = 0
    hang_timeout_s: float = HANG_TIMEOUT_S
    hide_gpus: bool = False  # from the ranks, which then communicate over gloo


class Launcher:
    """Run `paddle.distributed.launch` as a subprocess, with `command` as each rank."""

    def __init__(self, command: Sequence[str], settings: LaunchSettings, directory: Path) -> None:
        self._directory = directory
        self.log = directory / "launcher.log"
        python = [sys.executable, "-P", "-W", "ignore", "-m", "paddle.distributed.launch"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*python, *_options(settings, directory), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(settings, directory),
                start_new_session=True,  # signals of the terminal go to the supervisor alone
                preexec_fn=partial(_prepare_process, os.getpid()),
            )

    def rank_log(self, local_rank: int) -> Path:
        """Return the file with the output of a rank of this machine."""
        return self._directory / f"workerlog.{local_rank}"


def failed_ranks(log: Path) -> dict[int, int]:
    """Return local rank -> exit status other than 0, as the launcher's log reports them."""
    text = log.read_text("utf-8", "replace")
    return {int(local_rank): int(status) for local_rank, status in _FAILED_RANK.findall(text)}


def lacks_gpus(log: Path) -> bool:
    """Return whether the launcher ended because there are fewer GPUs than ranks."""
    return _DEALS_GPUS in log.read_text("utf-8", "replace")


def last_line(path: Path) -> str:
    """Return the last non-empty line of a text file, "" if there is none."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _options(settings: LaunchSettings, directory: Path) -> list[str]:
    options = [f"--nproc_per_node={settings.nproc}", f"--nnodes={settings.nnodes}"]
    options += [f"--log_dir={directory}", "--log_level=INFO"]
    if settings.nnodes == 1:
        # A host name may resolve to an address that the machine no longer has.
        return [*options, "--host=127.0.0.1"]
    host = own_address(str(settings.master))  # POD_IP, if it is set, takes its place
    return [
        *options,
        f"--host={host}",
        f"--master={settings.master}",
        f"--rank={settings.node_rank}",
    ]


def _environment(settings: LaunchSettings, directory: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
    if settings.hide_gpus or hides_gpus(environment) or not has_gpu_build():
        # The launcher picks the backend by the GPUs that it counts, not by what ranks will use. It
        # counts "" as one GPU, and fails with fewer GPUs than ranks; -1 is never a GPU's number.
        environment |= {_VISIBLE: ",".join(["-1"] * settings.nproc), _BACKEND: "gloo"}
    environment |= {
        "PYTHONPATH": processes.import_path(environment),
        rank_files.DIRECTORY: str(directory),
        rank_files.SUPERVISOR: str(os.getpid()),
    }
    environment.setdefault("GLOG_minloglevel", "1")  # hides how ranks connect
    if sys.stdout is not None and sys.stdout.isatty():
        size = os.get_terminal_size(sys.stdout.fileno())
        environment[rank_files.TERMINAL] = "1"
        environment |= {"COLUMNS": str(size.columns), "LINES": str(size.lines)}
    return environment


def hides_gpus(environment: Mapping[str, str]) -> bool:
    """Return True if CUDA_VISIBLE_DEVICES hides every GPU: CUDA ignores all after a wrong one.

    `NoDevFiles` is Slurm's, for a job without GPUs.
    """
    visible = environment.get(_VISIBLE)
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def has_gpu_build() -> bool:
    """Return whether Paddle's GPU build is installed; loads no Paddle."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("paddlepaddle-gpu"))
    return False


def _prepare_process(parent: int) -> None:
    """Prepare the new process, before it becomes the launcher."""
    processes.die_with_parent(parent)
    # Ranks inherit the mask: a signal stays pending until they enter a StopFlag.
    signal.pthread_sigmask(signal.SIG_BLOCK, StopFlag.SIGNALS)
