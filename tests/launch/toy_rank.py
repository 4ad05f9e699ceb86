"""A rank for tests of the supervisor: `ernie-train run` with something small in place of training.

    python toy_rank.py BEHAVIOUR OUT [STEPS]

OUT is a directory: each rank leaves its process number there, and counts signals in it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from ernie_train.cli.main import main
from ernie_train.cli.run import RunCommand
from ernie_train.core import process_group, processes
from ernie_train.core.errors import (
    FailedElsewhere,
    Interrupted,
    NonFiniteError,
    UserError,
)
from ernie_train.core.signals import StopFlag

BEHAVIOUR, OUT = sys.argv[1], Path(sys.argv[2])
STEPS = int(sys.argv[3]) if len(sys.argv) > 3 else 3
STEP_S = 0.1
RANK = int(os.environ["PADDLE_TRAINER_ID"])  # also where there is only one


def work(self: RunCommand, console: object) -> None:
    begin()
    if BEHAVIOUR == "together":
        together()
    else:
        BEHAVIOURS[BEHAVIOUR]()


def begin() -> None:
    handle = StopFlag._handle

    def counted(self: StopFlag, number: int, frame: object) -> None:
        with (OUT / f"signals_{RANK}").open("a") as stream:
            stream.write(f"{signal.Signals(number).name}\n")
        handle(self, number, None)

    StopFlag._handle = counted  # type: ignore[method-assign]
    own = processes.process_state(os.getpid())
    print(f"rank {RANK} has begun", flush=True)
    (OUT / f"pid_{RANK}.tmp").write_text(f"{os.getpid()} {own.started if own else 0}")
    (OUT / f"pid_{RANK}.tmp").replace(OUT / f"pid_{RANK}")


def together() -> None:
    """Steps in which the ranks wait for one another, as in training."""
    import paddle  # noqa: F401  # its import takes SIGTERM over, so it comes before the flag

    with StopFlag() as stop:
        for step in range(1, STEPS + 1):
            time.sleep(STEP_S)
            if process_group.all_reduce_sum([float(stop.requested)])[0] > 0:
                raise Interrupted(f"stopped on a signal after step {step}")
            (OUT / f"step_{RANK}").write_text(str(step))
            print(f"step {step} of rank {RANK}", flush=True)


def alone() -> None:
    """Steps without the others, and without Paddle, which takes each rank seconds to import."""
    for step in range(1, STEPS + 1):
        time.sleep(STEP_S)
        (OUT / f"step_{RANK}").write_text(str(step))
        print(f"step {step} of rank {RANK}", flush=True)


def mistake() -> None:
    raise UserError("the recipe is wrong, in every rank")


def not_finite() -> None:
    if RANK == 1:
        raise NonFiniteError("step 7 would not be finite")
    time.sleep(60)


def elsewhere() -> None:
    """Rank 0 ends first, only because rank 1 fails."""
    if RANK == 0:
        raise FailedElsewhere(1, 2)
    time.sleep(0.5)
    raise UserError("rank 1 sees no data")


def defect() -> None:
    if RANK == 1:
        print("what rank 1 was doing", flush=True)
        raise ValueError("boom")
    time.sleep(60)


def dies_once() -> None:
    mark = OUT / "died"
    if RANK == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    alone()


def grandchildren() -> None:
    """Each rank starts a process in a session of its own, which nobody waits for."""
    if os.fork() == 0:
        os.setsid()
        (OUT / f"grandchild_{RANK}").write_text(str(os.getpid()))
        time.sleep(120)
        os._exit(0)
    time.sleep(120)


def terminal() -> None:
    from rich.console import Console

    console = Console()
    print(f"rank {RANK} terminal {console.is_terminal} width {console.width}", flush=True)


BEHAVIOURS = {
    "alone": alone, "mistake": mistake, "not_finite": not_finite,
    "elsewhere": elsewhere, "defect": defect, "dies_once": dies_once,
    "grandchildren": grandchildren, "terminal": terminal,
}  # fmt: skip


if __name__ == "__main__":
    RunCommand.run_here = work  # type: ignore[method-assign]
    main(["run", "recipe.yaml"])
