"""Run a scoring process: take (reward, row, completion) from a pipe and send a score back.

It is started by `worker_process.py` and may be killed at any moment. Replies are JSON, so that
nothing is unpickled that came from a process which read completions.
"""

import json
import os
import sys
from multiprocessing.connection import Connection
from subprocess import SubprocessError
from typing import Any

from ernie_train.core.processes import die_with_parent
from ernie_train.rewards.registry import reward_named
from ernie_train.rewards.sandbox import api


def main(descriptor: int, parent: int) -> None:
    """Answer requests until the other end of the pipe is closed, or its owner `parent` ends."""
    # A verifier in an endless loop would not notice that the pipe closed.
    die_with_parent(parent)
    # Programs that a reward starts must not inherit the pipe; prints must not reach the output.
    os.set_inheritable(descriptor, False)
    os.dup2(2, 1)
    pipe: Connection[Any, Any] = Connection(descriptor)
    try:
        pipe.send_bytes(b'["ready"]')
        while True:
            reward, row, completion = pipe.recv()
            pipe.send_bytes(json.dumps(_graded(reward, row, completion)).encode())
    except (EOFError, ConnectionError):
        return


def _graded(reward: Any, row: dict[str, Any], completion: str) -> list[Any]:
    try:
        grade = reward_named(reward) if isinstance(reward, str) else reward
        score = grade(row, completion)
    except api.SandboxUnavailable as error:
        return ["unavailable", str(error)]
    except Exception as error:  # the service finds the cause
        # Files, processes and modules that fail are the machine's, whatever the completion says.
        machine = isinstance(error, OSError | ImportError | SubprocessError)
        return ["raised", f"{type(error).__name__}: {str(error)[:300]}", machine]
    return ["score", score.value, score.status, score.detail]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
