"""Servers as processes: started, dying, and ended with their owner."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_train.core.errors import EngineError, UserError
from ernie_train.core.processes import is_running, process_state
from ernie_train.generate.engines import servers as servers_module
from ernie_train.generate.engines.process import ServerProcess
from ernie_train.model import Ernie4_5_MoeForCausalLM
from tests.generate import engine_stand_in
from tests.generate.engine_stand_in import StandIn
from tests.generate.served import PROMPTS, SETTINGS, engine_of, recomputed, refuses
from tests.small_models import fill

# ---- processes -----------------------------------------------------------------------------------


def script(tmp_path: Path, text: str) -> Path:
    """A program that stands in for an interpreter with an engine: it ignores `-m module`."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_fastdeploy_is_started_with_the_weights_under_their_name(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    """A stand-in with FastDeploy's command line and field names, as its source has them."""
    root = Path(engine_stand_in.__file__).parents[2]
    python = script(
        tmp_path,
        f"import sys\nsys.path.insert(0, {str(root)!r})\nsys.argv[1:3] = []\n"
        "import ernie_train\nfrom tests.generate import engine_stand_in\nengine_stand_in.main()\n",
    )
    engine = engine_of(
        tmp_path / "engine", kind="fastdeploy", python=str(python), start_timeout_s=120.0
    )
    try:
        fill(model, 5)
        engine.load_weights(model, 5)
        found = engine.sample(PROMPTS, SETTINGS)
        for prompt, completion in zip(PROMPTS, found, strict=True):
            expected = recomputed(model, prompt, completion.ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
    finally:
        engine.close()


def test_a_server_that_dies_at_once_says_why(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path
) -> None:
    python = script(tmp_path, "import sys\nprint('no such device')\nsys.exit(3)\n")
    engine = engine_of(tmp_path / "engine", kind="vllm", python=str(python))
    refuses(
        lambda: engine.load_weights(model, 1),
        r"process ended with status 3; the end of .*engine\.log: no such device",
    )
    engine.close()


@pytest.mark.parametrize("gpus", [None, [4, 5]])
def test_a_server_gets_gpus_of_its_own_and_is_no_rank_of_the_job(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Any
) -> None:
    """Paddle's launcher tells a rank by its environment, which FastDeploy would read too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("FLAGS_selected_gpus", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "2")
    text = "import os\nprint(sorted(k + '=' + v for k, v in os.environ.items()"
    text += " if 'CUDA_V' in k or 'PADDLE_' in k or 'FLAGS_sel' in k))\nraise SystemExit(3)\n"
    python = script(tmp_path, text)
    engine = engine_of(tmp_path / "engine", kind="vllm", python=str(python), gpus=gpus)
    visible = "4,5" if gpus else "0,1,2,3"
    refuses(lambda: engine.load_weights(model, 1), rf"\['CUDA_VISIBLE_DEVICES={visible}'\]")
    engine.close()


def test_a_long_log_is_read_at_its_end_alone(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with log.open("wb") as stream:
        stream.truncate(2**26)  # no block of it is on the disk
    program = "print('\\nno', 'such', 'device'); raise SystemExit(3)"
    server = ServerProcess([sys.executable, "-c", program], {}, log)
    server._guard.wait(30)
    tracemalloc.start()
    refuses(server.require_alive, r"status 3; .*no such device$")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    server.close()


@pytest.mark.parametrize("kind", ["vllm", "fastdeploy"])
def test_another_server_at_the_port_is_left_alone(
    server: StandIn, model: Ernie4_5_MoeForCausalLM, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:  # fmt: skip
    """It took the port that was free a moment ago, before ours came up."""
    port = int(server.url.rpartition(":")[2])
    monkeypatch.setattr(servers_module, "free_ports", lambda count: [port] * count)
    python = script(tmp_path, "import time\ntime.sleep(600)\n")
    engine = engine_of(tmp_path / "engine", kind=kind, python=str(python))
    refuses(lambda: engine.load_weights(model, 1), r"serves \['policy'\], not '")
    engine.close()
    assert {path for path, _ in server.requests} <= {"/health", "/v1/models"}


def test_an_interpreter_that_is_not_there_is_a_mistake(
    model: Ernie4_5_MoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ERNIE_TRAIN_VLLM", raising=False)
    with pytest.raises(UserError, match=r"tools/vllm\.sh and name it in ERNIE_TRAIN_VLLM"):
        engine_of(tmp_path / "engine", kind="vllm").load_weights(model, 1)
    missing = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"cannot be started: no program {re.escape(missing)}"):
        engine_of(tmp_path / "engine", kind="vllm", python=missing).load_weights(model, 1)


# A server, its child, and a grandchild that left their process group and lost its parent.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep)
middle = f"import subprocess as s; print(s.Popen({sleep}, start_new_session=True, stdout=-3).pid)"
orphan = subprocess.run([sys.executable, "-c", middle], stdout=-1, text=True).stdout.strip()
with open(sys.argv[1] + ".tmp", "w") as stream:
    stream.write(f"{os.getpid()} {child.pid} {orphan}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(600)
"""
OWNER = """
import sys, time
from pathlib import Path
from ernie_train.generate.engines.process import ServerProcess
server = ServerProcess([sys.executable, "-c", sys.argv[1], sys.argv[2]], {}, Path(sys.argv[3]))
time.sleep(600)
"""


def wait_for(condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def family(path: Path) -> list[tuple[int, int]]:
    """Ids and starts of the server and those below it."""
    wait_for(path.exists)
    states = [(int(word), process_state(int(word))) for word in path.read_text().split()]
    return [(pid, state.started) for pid, state in states if state is not None]


def test_closing_ends_the_server_and_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    server = ServerProcess([sys.executable, "-c", FAMILY, str(pids)], {}, tmp_path / "log")
    members = family(pids)
    assert len(members) == 3
    server.require_alive()
    server.close()
    assert not any(is_running(*member) for member in members)


@pytest.mark.timeout(120)
def test_nothing_outlives_an_owner_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    arguments = [sys.executable, "-c", OWNER, FAMILY, str(pids), str(tmp_path / "log")]
    owner = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": os.getcwd()})
    members = family(pids)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for(lambda: not any(is_running(*member) for member in members))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_does_not_outlive_its_guard(tmp_path: Path, number: int) -> None:
    """After SIGTERM nothing is left of it; SIGKILL leaves the guard no time to look for more."""
    pids = tmp_path / "pids"
    server = ServerProcess([sys.executable, "-c", FAMILY, str(pids)], {}, tmp_path / "log")
    members = family(pids)
    try:
        os.kill(server._guard.pid, number)
        ended = members if number == signal.SIGTERM else members[:1]
        wait_for(lambda: not any(is_running(*member) for member in ended))
        with pytest.raises(EngineError, match="process ended with status"):
            wait_for(server.require_alive, 10.0)
    finally:
        server.close()
        for pid, started in members:
            if is_running(pid, started):
                os.kill(pid, signal.SIGKILL)
