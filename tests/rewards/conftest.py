"""Fixtures of the sandbox's tests."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import ernie_train
from ernie_train.rewards.sandbox import api
from ernie_train.rewards.sandbox.pool import POOL
from tests.rewards.sandboxes import LAYERS


@pytest.fixture(params=list(LAYERS))
def layer(request, monkeypatch):
    monkeypatch.setattr(api, "current_layer", lambda: LAYERS[request.param])
    yield request.param
    POOL.close()


@pytest.fixture
def fresh_layer():
    """The layer in force is found out again within the test and after it."""
    api.current_layer.cache_clear()
    yield
    api.current_layer.cache_clear()


@pytest.fixture
def own_temporary(monkeypatch):
    """A temporary directory of this test and its processes alone: others have sandboxes in /tmp."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)  # programs run as another user
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@dataclass
class PlainUser:
    """Another user, with a copy of the sandbox in a directory: it may not read root's checkout."""

    uid: int
    directory: Path

    def run(self, script, *arguments):
        done = subprocess.run(
            ["/usr/bin/python3", "-c", script, *arguments], capture_output=True, text=True,
            timeout=60, user=self.uid, group=self.uid, extra_groups=[], cwd="/",
            env={"PYTHONPATH": str(self.directory)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def plain_user():
    # Not below pytest's own directory, which another user may not enter.
    place = Path("/var/tmp") / f"ernie-copy-{os.getpid()}"
    try:
        package = place / "ernie_train"
        source = Path(ernie_train.__file__).parent
        for inner in ("", "core", "rewards"):
            (package / inner).mkdir(parents=True)
            (package / inner / "__init__.py").touch()
        shutil.copy(source / "core" / "errors.py", package / "core")
        shutil.copytree(source / "rewards" / "sandbox", package / "rewards" / "sandbox")
        os.chown(place, 12345, 12345)
        yield PlainUser(12345, place)
    finally:
        shutil.rmtree(place)
