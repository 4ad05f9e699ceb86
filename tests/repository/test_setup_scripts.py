"""`./run-tiny` and `./run-tests`: what they install, when, and what they run.

The scripts run for real in a copy of their part of the repository; Python, apt-get and sudo are
stand-ins that write down what they are asked to do.
"""

import os
import pty
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.terminal import read_terminal

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "run-tiny",
    "run-tests",
    "tools/setup.sh",
    "tools/vllm.sh",
    "tools/pythons.sh",
    ".ci/run",
)
FILES = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-referee.txt",
    "requirements-referee-457.txt",
    "requirements-vllm.txt",
    "pyproject.toml",
)
# All that the scripts may lean on beside bash.
TOOLS = ("bash", "cat", "chmod", "cp", "cut", "dirname", "env", "flock", "mkdir", "mv", "rm")
TOOLS += ("sha256sum", "sh")

FAKE_PYTHON = r"""#!/bin/sh
case "$*" in
  -c*) exit 0 ;;
  --version) echo "Python 3.11.99" ; exit 0 ;;
  "-m pip --version") exit 0 ;;
  "-m venv --clear "*)
    echo "venv $4" >>"$LOG"
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
    exit 0 ;;
esac
echo "$*" >>"$LOG"
case "$*" in
  "-m pip install"*) [ ! -e "$FAIL_PIP" ] ;;
  *) exit "${JOB_STATUS:-0}" ;;
esac
"""

PYTEST = "-m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile"


class Sandbox:
    """A copy of the scripts with stand-ins for everything that they call."""

    def __init__(self, directory: Path) -> None:
        self.repository = directory / "a repository"
        self.bin = directory / "bin"
        self.log = directory / "log"
        self.fail_pip = directory / "fail_pip"
        for name in (*SCRIPTS, *FILES):
            (self.repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, self.repository / name)
        self.bin.mkdir()
        for name in TOOLS:
            found = shutil.which(name)
            assert found, f"this test needs the command {name}"
            (self.bin / name).symlink_to(found)
        self.command("python3.11", FAKE_PYTHON)
        self.command("bwrap", "#!/bin/sh\n")
        self.command("id", "#!/bin/sh\necho 1000\n")

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(
        self, *command: str, cwd: Path | None = None, stderr: int = PIPE, **environ: str
    ) -> "subprocess.CompletedProcess[str]":
        self.log.write_text("")
        variables = {"PATH": str(self.bin), "LOG": str(self.log), "FAIL_PIP": str(self.fail_pip)}
        return subprocess.run(
            [str(self.repository / command[0]), *command[1:]],
            cwd=cwd or self.repository,
            env=variables | environ,
            stdout=PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def installs(self) -> list[str]:
        prefix = "-m pip install --quiet "
        return [c.removeprefix(prefix) for c in self.calls() if c.startswith(prefix)]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_syntax_is_right(script: str) -> None:
    subprocess.run(["bash", "-n", REPOSITORY / script], check=True)
    assert os.access(REPOSITORY / script, os.X_OK) == (script != "tools/setup.sh")


def test_the_first_run_installs_and_the_second_only_runs(sandbox: Sandbox) -> None:
    first = sandbox.run("run-tiny", "--run-dir", "some where")
    assert first.returncode == 0, first.stderr
    venv = sandbox.repository / ".venv"
    assert sandbox.calls() == [
        f"venv {venv}",
        "-m pip install --quiet -r requirements.txt",
        "-m pip install --quiet --no-deps -e .",
        "-m ernie_train run recipes/tiny.yaml --run-dir some where",
    ]
    assert "Installing requirements.txt" in first.stderr and first.stdout == ""
    second = sandbox.run("run-tiny")
    assert sandbox.calls() == ["-m ernie_train run recipes/tiny.yaml"]
    assert "Installing" not in second.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_shows_the_package_that_is_installed(sandbox: Sandbox, fails: bool) -> None:
    collecting = '"-m pip install"*) echo "Collecting a-package" ;'
    sandbox.command("python3.11", FAKE_PYTHON.replace('"-m pip install"*)', collecting))
    if fails:
        sandbox.fail_pip.touch()
    ours, theirs = pty.openpty()
    status = sandbox.run("run-tiny", stderr=theirs).returncode
    os.close(theirs)
    shown = read_terminal(ours).decode()
    assert "Collecting a-package" in shown and "--quiet" not in sandbox.log.read_text()
    assert status == int(fails)
    assert (sandbox.repository / ".venv/.complete-run").exists() != fails


def test_an_interrupted_installation_is_taken_up_again(sandbox: Sandbox) -> None:
    sandbox.fail_pip.touch()
    broken = sandbox.run("run-tiny")
    assert broken.returncode != 0
    assert not any("ernie_train run" in call for call in sandbox.calls())
    sandbox.fail_pip.unlink()
    assert sandbox.run("run-tiny").returncode == 0
    assert sandbox.installs() == ["-r requirements.txt", "--no-deps -e ."]
    assert not any(call.startswith("venv") for call in sandbox.calls())


@pytest.mark.parametrize("file", ["requirements.txt", "pyproject.toml"])
def test_a_changed_file_is_installed(sandbox: Sandbox, file: str) -> None:
    sandbox.run("run-tiny")
    with (sandbox.repository / file).open("a") as stream:
        stream.write("# changed\n")
    sandbox.run("run-tiny")
    assert sandbox.installs() == ["-r requirements.txt", "--no-deps -e ."]


def test_the_tests_get_both_environments(sandbox: Sandbox) -> None:
    done = sandbox.run("run-tests", "-m", "slow", "-k", "a or b")
    assert done.returncode == 0, done.stderr
    referee = sandbox.repository / ".venv-referee"
    assert sandbox.installs() == [
        "-r requirements-dev.txt",
        "--no-deps -e .",
        "-r requirements-referee.txt",
        f"--no-deps --target {referee}/transformers-4.57 -r requirements-referee-457.txt",
    ]
    assert sandbox.calls()[-1] == f"{PYTEST} -m slow -k a or b"
    sandbox.run("run-tests")
    assert sandbox.calls() == [PYTEST]
    # What the tests need includes what a run needs, but not the other way round.
    sandbox.run("run-tiny")
    assert sandbox.installs() == []


def test_vllm_is_installed_once_and_on_request_alone(sandbox: Sandbox) -> None:
    done = sandbox.run("tools/vllm.sh")
    assert done.returncode == 0, done.stderr
    assert sandbox.installs() == ["--no-deps -r requirements-vllm.txt"]
    assert done.stdout.startswith("export ERNIE_TRAIN_VLLM=") and ".venv-vllm" in done.stdout
    sandbox.run("tools/vllm.sh")
    assert sandbox.installs() == []
    missing = sandbox.run("tools/vllm.sh", ERNIE_TRAIN_VLLM="/nowhere")
    assert missing.returncode != 0 and "has no bin/python" in missing.stderr


def test_after_a_run_the_tests_install_what_they_need(sandbox: Sandbox) -> None:
    sandbox.run("run-tiny")
    sandbox.run("run-tests")
    assert sandbox.installs()[0] == "-r requirements-dev.txt"


def test_a_half_copied_referee_is_made_anew(sandbox: Sandbox) -> None:
    leftover = sandbox.repository / ".venv-referee" / "transformers-4.57" / "torn"
    leftover.mkdir(parents=True)
    assert sandbox.run("run-tests").returncode == 0
    assert not leftover.exists()


@pytest.mark.parametrize("script", ["run-tiny", "run-tests"])
def test_the_exit_status_is_that_of_the_job(sandbox: Sandbox, script: str) -> None:
    assert sandbox.run(script, JOB_STATUS="5").returncode == 5


def test_it_works_from_another_directory(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.run("run-tiny", cwd=tmp_path).returncode == 0
    assert (sandbox.repository / ".venv").is_dir() and not (tmp_path / ".venv").exists()


def test_environments_of_the_user_are_used_as_they_are(sandbox: Sandbox, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "bin").mkdir(parents=True)
    shutil.copy(sandbox.bin / "python3.11", own / "bin" / "python")
    done = sandbox.run("run-tests", ERNIE_TRAIN_VENV=str(own), ERNIE_TRAIN_REFEREE=str(own))
    assert done.returncode == 0, done.stderr
    assert sandbox.calls() == [PYTEST]
    assert not (sandbox.repository / ".venv").exists()


@pytest.mark.parametrize("variable", ["ERNIE_TRAIN_VENV", "ERNIE_TRAIN_REFEREE", "PYTHON"])
def test_a_wrong_variable_is_one_message(sandbox: Sandbox, variable: str) -> None:
    done = sandbox.run("run-tests", **{variable: "/nowhere"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {variable}=/nowhere")
    assert not any(call.startswith("-m pytest") for call in sandbox.calls())


def test_bubblewrap_that_is_missing_is_not_fatal_without_rights(sandbox: Sandbox) -> None:
    (sandbox.bin / "bwrap").unlink()
    sandbox.command("apt-get", '#!/bin/sh\necho "apt-get $*" >>"$LOG"\n')
    done = sandbox.run("run-tiny")  # no sudo at all
    assert done.returncode == 0
    assert "apt-get install bubblewrap" in done.stderr
    assert not any(call.startswith("apt-get") for call in sandbox.calls())
    sandbox.command("sudo", "#!/bin/sh\nexit 1\n")  # asks for a password
    sandbox.run("run-tiny")
    assert not any(call.startswith("apt-get") for call in sandbox.calls())


@pytest.mark.parametrize("rights", ["root", "sudo"])
def test_bubblewrap_is_installed_where_the_user_may(sandbox: Sandbox, rights: str) -> None:
    (sandbox.bin / "bwrap").unlink()
    sandbox.command(
        "apt-get",
        '#!/bin/sh\necho "apt-get $*" >>"$LOG"\n'
        f'case "$*" in *bubblewrap) cp "$0" "{sandbox.bin}/bwrap" ;; esac\n',
    )
    if rights == "root":
        sandbox.command("id", "#!/bin/sh\necho 0\n")
    else:
        sandbox.command("sudo", '#!/bin/sh\nshift\n[ "$1" = true ] || exec "$@"\n')
    done = sandbox.run("run-tiny")
    assert done.returncode == 0, done.stderr
    asked = [call for call in sandbox.calls() if call.startswith("apt-get")]
    assert asked[-1] == "apt-get -qq install -y --no-install-recommends bubblewrap"
    assert "bubblewrap is missing" not in done.stderr


@pytest.fixture
def recorded_ci(sandbox: Sandbox) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs .ci/run with a mktemp that stays inside the test's directory."""
    scratch = sandbox.bin.parent / "scratch"
    sandbox.command("mktemp", f'#!/bin/sh\nmkdir -p "{scratch}" && echo "{scratch}"\n')
    return lambda **environ: sandbox.run(".ci/run", **environ)


def test_ci_checks_tests_style_types_and_the_main_job(
    sandbox: Sandbox, recorded_ci: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = recorded_ci()
    assert done.returncode == 0, done.stderr
    scratch = sandbox.bin.parent / "scratch"
    jobs = [call for call in sandbox.calls() if not call.startswith(("venv", "-m pip"))]
    assert jobs == [
        f"{PYTEST} --junitxml={scratch}/tests.xml",
        f"-m tools.support_matrix --junit {scratch}/tests.xml",
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "-m mkdocs build --strict",
        "-m ernie_train doctor --selftest",
        f"-m ernie_train run recipes/tiny.yaml --run-dir {scratch}/run",
        f"- {scratch}/run",  # the program on standard input that reads what the run reached
    ]
    assert not scratch.exists()


def test_ci_stops_at_the_first_failure(
    sandbox: Sandbox, recorded_ci: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    assert recorded_ci(JOB_STATUS="1").returncode == 1
    assert sandbox.calls()[-1].startswith(PYTEST)
