"""Fixtures shared by all tests.

`referee` runs a script in a second virtual environment that holds torch and transformers, which
cannot live beside paddlenlp's pins. Tests exchange files with it, never Python objects.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest

# One thread, before Paddle is imported: runs are compared bit by bit with runs in other processes,
# and small matrices gain nothing from a second one.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

# Encoded rows of tests are kept nowhere, but for those of tests on it.
os.environ["ERNIE_TRAIN_CACHE"] = "off"

# What is on the disk after a power cut is not tested, and a run syncs 50 times, 5 ms each; tests of
# what is synced, and in which order, put functions of their own here.
os.fsync = lambda descriptor: None

# A busy machine makes no example wrong.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# Sets the processor up; it must come before any test module imports Paddle.
import ernie_train  # noqa: E402, F401
from ernie_train.core import blas, devices  # noqa: E402
from tests import waiting  # noqa: E402

# Every run measures the processor, which is the same for all of them.
blas.product_error = cache(blas.product_error)
devices.slow_products = cache(devices.slow_products)

REPOSITORY = Path(__file__).resolve().parent.parent
REFEREE_SCRIPTS = Path(__file__).resolve().parent / "referee"

HOW_TO_MAKE_IT = (
    "./run-tests makes it, or in the repository root:\n"
    "  python3.11 -m venv .venv-referee\n"
    "  .venv-referee/bin/pip install -r requirements-referee.txt\n"
    "  .venv-referee/bin/pip install --no-deps --target .venv-referee/transformers-4.57 "
    "-r requirements-referee-457.txt\n"
    "or point ERNIE_TRAIN_REFEREE at an environment like that"
)

SLOW_LIMIT_S = 3600.0

# The files that take longest: workers begin with them, since one that came last would leave the
# others idle.
LONGEST = (
    "parallel/test_runs.py",
    "model/test_parity.py",
    "run/test_recipe_keys_act.py",
    "tools/evidence/test_main_job.py",
    "repository/test_embedded_data.py",
    "weights/test_adapters.py",
    "launch/test_launch.py",
    "parallel/test_fewer_ranks.py",
    "repository/test_recipes_21b.py",
)

# One worker runs all files of a group, since what is started once serves them all: ranks, or torch.
TOGETHER = tuple(
    tuple(f"tests/{name}.py" for name in names)
    for names in (
        ("parallel/test_runs", "parallel/test_equal_results", "parallel/test_faults",
         "parallel/test_gradients", "parallel/test_expert", "parallel/test_lora",
         "parallel/test_sampling", "parallel/test_lockstep", "parallel/test_global_balance",
         "rl/test_engine_stage", "core/test_process_group"),
        ("model/test_parity", "weights/test_adapters", "weights/test_hf_transformers",
         "weights/test_quantize", "run/test_export", "run/test_import", "rl/test_reward_model",
         "data/test_chat", "data/test_chat_families", "data/test_tokenizer",
         "data/test_tokenizer_kinds", "io/test_safetensors"),
    )
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT_S))
    if hasattr(config, "workerinput"):
        begin = {REPOSITORY / "tests" / name: at for at, name in enumerate(LONGEST)}
        items.sort(key=lambda item: begin.get(item.path, len(begin)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Leaves a file to one worker, with what it makes once for all of its tests, also by `-n 2`."""
    if config.getvalue("dist") not in ("load", "loadfile"):
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((group[0] for group in TOGETHER if file in group), file)

    config.option.loadscopereorder = False  # by the number of tests: long files have few
    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def scoring_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Services take over one another's processes, but where these are what is tested."""
    own = request.path.name.startswith(("test_service", "test_sandbox"))
    if own or request.path.parent.name == "attacks":
        yield
    else:
        from tests.kept_workers import kept_workers

        with kept_workers():
            yield


Referee = Callable[..., "subprocess.CompletedProcess[str]"]


def referee_directory() -> Path:
    """The referee's virtual environment: ERNIE_TRAIN_REFEREE or .venv-referee in the repository."""
    return Path(os.environ.get("ERNIE_TRAIN_REFEREE") or REPOSITORY / ".venv-referee")


def _referee_environment(home: Path, transformers: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if transformers == "4.57":
        older = home / "transformers-4.57"
        if not (older / "transformers").is_dir():
            pytest.fail(f"no transformers 4.57 in {older}; {HOW_TO_MAKE_IT}", pytrace=False)
        environment["PYTHONPATH"] = str(older)
    elif transformers != "newest":
        raise ValueError(f'transformers must be "newest" or "4.57", not {transformers!r}')
    return environment


class WaitingReferee:
    """A process that has imported torch and transformers, which takes seconds."""

    def __init__(self, home: Path, transformers: str, directory: Path) -> None:
        self.directory = directory
        self.scripts = 0
        program = REFEREE_SCRIPTS / "waiting_referee.py"
        with (
            Listener(str(directory / "socket")) as listener,
            (directory / "said").open("w") as said,
        ):
            self.process = subprocess.Popen(
                [home / "bin" / "python", program, str(directory / "socket")],
                env=_referee_environment(home, transformers),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            (self.connection,) = waiting.connected(listener, 1)

    def run(
        self, script: Path, arguments: tuple[object, ...], told: str, timeout_s: float
    ) -> "subprocess.CompletedProcess[str]":
        self.scripts += 1
        streams = [self.directory / f"{self.scripts}.{name}" for name in ("in", "out", "err")]
        streams[0].write_text(told)
        waiting.send(self.connection, script, arguments, {}, *streams)
        status = waiting.ended([self.connection], timeout_s).get(0, "no end in time")
        out, err = (path.read_text() if path.exists() else "" for path in streams[1:])
        if not isinstance(status, int):
            raise AssertionError(f"referee {script}: {status}\n{err[-4000:]}")
        return subprocess.CompletedProcess([str(script)], status, out, err)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def referee(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Referee]:
    """run(script, *args, transformers="newest"|"4.57", told="", timeout_s=300, check=True).

    `script` is a file name in tests/referee or a path; it runs in a fork of a process that has
    imported torch, with `told` as its input. With `check` a script that fails makes the test fail
    and shows what it wrote.
    """
    home = referee_directory()
    if not (home / "bin" / "python").exists():
        pytest.fail(f"no referee environment in {home}; {HOW_TO_MAKE_IT}", pytrace=False)
    started: dict[str, WaitingReferee] = {}

    def run(
        script: str | Path,
        *args: object,
        transformers: str = "newest",
        told: str = "",
        timeout_s: float = 300,
        check: bool = True,
    ) -> "subprocess.CompletedProcess[str]":
        if transformers not in started:
            directory = tmp_path_factory.mktemp("referee")
            started[transformers] = WaitingReferee(home, transformers, directory)
        done = started[transformers].run(REFEREE_SCRIPTS / script, args, told, timeout_s)
        if check and done.returncode != 0:
            pytest.fail(
                f"referee {script} (transformers {transformers}) ended with "
                f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}",
                pytrace=False,
            )
        return done

    yield run
    for process in started.values():
        process.end()


@pytest.fixture
def reader(referee: Referee, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter for the proof of an export, which runs in a fork of one that waits."""
    from ernie_train.run import proof

    def run(command: list[str], *, input: str, **_: object) -> "subprocess.CompletedProcess[str]":
        return referee(command[1], told=input, check=False)

    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=run))
    return str(referee_directory() / "bin" / "python")
