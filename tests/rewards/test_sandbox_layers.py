"""Which layer is in force, and why others are not."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ernie_train.rewards.sandbox import api, backends, seccomp
from ernie_train.rewards.sandbox.api import run_calls
from ernie_train.rewards.sandbox.pool import Sandbox, SandboxLost
from tests.rewards.sandboxes import LAYERS, RIGHT, which_without


def test_the_best_layer_is_in_force(fresh_layer):
    assert api.layer_in_force() == next(iter(LAYERS))


def test_without_bubblewrap_landlock_is_next_and_without_both_nothing_runs(
    fresh_layer, monkeypatch
):
    monkeypatch.setattr(backends.shutil, "which", which_without("bwrap"))
    if "Landlock" in LAYERS:
        assert api.layer_in_force() == "Landlock"
    api.current_layer.cache_clear()
    working = api.trial
    monkeypatch.setattr(
        api, "trial", lambda layer: "no" if layer.name == "Landlock" else working(layer)
    )
    with pytest.raises(api.SandboxUnavailable) as refused:
        api.layer_in_force()
    for word in ("apt-get install bubblewrap", "Landlock does not work", "allow them"):
        assert word in str(refused.value)
    with pytest.raises(api.SandboxUnavailable):
        run_calls(RIGHT, "f", [[1]])


@pytest.mark.skipif(os.geteuid() != 0, reason="for root")
def test_an_interpreter_that_finds_the_library_of_another_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = shutil.copy("/usr/bin/python3", Path(folder) / "python3")
        layer = dataclasses.replace(LAYERS["Landlock"], interpreter=str(copy))
        with pytest.raises(SandboxLost, match="its own library cannot be read"):
            Sandbox(layer)


def test_root_without_a_way_to_become_another_user_is_refused(fresh_layer, monkeypatch):
    monkeypatch.setattr(backends.shutil, "which", which_without("setpriv"))
    with pytest.raises(api.SandboxUnavailable, match="util-linux"):
        api.layer_in_force()


def test_another_processor_is_refused(fresh_layer, monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "aarch64")
    with pytest.raises(api.SandboxUnavailable, match="supports x86_64 only"):
        api.layer_in_force()


def test_a_bubblewrap_that_does_not_work_says_why(monkeypatch):
    # Not below pytest's own directory, which another user may not enter.
    with tempfile.TemporaryDirectory() as directory:
        fake = Path(directory, "bwrap")
        fake.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1")
        fake.chmod(0o755)
        Path(directory).chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        layers, _ = backends.possible_layers()
        assert "No permissions to create a new namespace" in api.trial(layers[0])


def test_a_sandbox_that_cannot_be_started_is_no_wrong_answer(monkeypatch):
    broken = backends.Layer("bubblewrap", ("/bin/false",), "/usr/bin/python3", None, None)
    monkeypatch.setattr(api, "current_layer", lambda: broken)
    assert run_calls(RIGHT, "f", [[1]]).kind == "infrastructure"
    with pytest.raises(SandboxLost):
        Sandbox(backends.Layer("bubblewrap", ("/nowhere",), "x", None, None))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user")
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_plain_user_needs_no_more(plain_user, name):
    script = (
        "import os\nfrom ernie_train.rewards.sandbox import api as sandbox\n"
        "layers = sandbox.possible_layers()[0]\n"
        f"sandbox.current_layer = lambda: [l for l in layers if l.name == {name!r}][-1]\n"
        "assert os.getuid() == 12345\n"
        "hard = 'import os\\ndef f(x):\\n    os.kill(-1, 9)\\n'\n"
        "print(sandbox.run_calls(hard, 'f', [[-5]]).values[0][0])\n"
        "print(sandbox.run_calls('f = abs', 'f', [[-5]]).values)\n"
    )
    assert plain_user.run(script).split("\n")[:2] == ["error", "[['value', 5]]"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a plain user")
def test_what_a_plain_users_programs_leave_is_removed(plain_user):
    """Directories that nobody may read, and deeper than a path can name or a stack can go."""
    script = '''
import os, tempfile
from ernie_train.rewards.sandbox import api, pool
layers = [l for l in api.possible_layers()[0] if l.name == "Landlock"]
api.current_layer = lambda: layers[-1]
tempfile.tempdir = os.environ["PYTHONPATH"]
deep = """
import os
for i in range(3000):
    os.mkdir('d', 0o700 if i < 2999 else 0)
    i < 2999 and os.chdir('d')
f = abs
"""
for _ in range(2):
    print(api.run_calls(deep, "f", [[-5]]).values)
pool.POOL.close()
print([name for name in os.listdir(tempfile.tempdir) if name.startswith("ernie-sandbox")])
left = tempfile.mkdtemp(prefix="ernie-sandbox-")  # of an owner that was killed
os.chdir(left)
for i in range(3000):
    os.mkdir("d")
    os.chdir("d")
os.chdir("/")
os.chmod(left, 0)
print(api.run_calls("f = abs", "f", [[-5]]).values, os.path.exists(left))
'''
    said = plain_user.run(script).split("\n")
    assert said[:4] == ["[['value', 5]]"] * 2 + ["[]", "[['value', 5]] False"]
