"""What a run records of the machine and of the code."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

import ernie_train
from ernie_train.core import cpu, environment
from ernie_train.core.environment import code_version

REPOSITORY = Path(__file__).resolve().parents[2]
UNKNOWN = {"commit": None, "dirty": None}


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit."""
    top = tmp_path / "top"
    (top / "ernie_train").mkdir(parents=True)
    (top / "ernie_train" / "__init__.py").write_text("one = 1\n")
    git(top, "init", "-q")
    git(top, "add", ".")
    git(top, "commit", "-qm", "first")
    return top


def test_the_environment_is_described_in_plain_values() -> None:
    described = json.loads(json.dumps(environment.describe_environment()))
    assert described["ernie_train"] == ernie_train.__version__
    assert described["code"] == code_version()
    assert described["versions"]["numpy"] == np.__version__
    assert described["cpu"]["cores"] == cpu.available_cores()
    assert described["memory_bytes"]["total"] >= described["memory_bytes"]["available"] > 0


@pytest.mark.parametrize(
    ("name", "limit", "expected"),
    [
        ("memory.max", "3000000", 3_000_000),
        ("memory.max", "max", None),
        ("memory.limit_in_bytes", "3000000", 3_000_000),
        ("memory.limit_in_bytes", "9223372036854771712", None),
    ],
)
def test_the_memory_is_what_the_control_group_allows(
    name: str, limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(limit + "\n")
    monkeypatch.setattr(environment, "control_groups", lambda controller: [tmp_path])
    total = psutil.virtual_memory().total
    found = environment.memory_bytes()
    assert found["total"] == (expected or total) and 0 < found["available"] <= found["total"]


def test_the_version_is_the_same_everywhere() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.*)"$', project, re.M) == [ernie_train.__version__]


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a checkout")
def test_this_checkout_is_the_one_that_is_described() -> None:
    assert code_version()["commit"] == git(REPOSITORY, "rev-parse", "HEAD")


def test_commit_and_changes_of_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "-am", "a tag is not a commit", "v1")
    # As inside a hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(REPOSITORY / ".git"))
    assert code_version(checkout) == {"commit": commit, "dirty": False}
    (checkout / "ernie_train" / "__init__.py").write_text("one = 2\n")
    assert code_version(checkout) == {"commit": commit, "dirty": True}


def test_a_worktree_is_a_checkout_too(checkout: Path) -> None:
    git(checkout, "worktree", "add", "-q", str(checkout.parent / "other"))
    commit = git(checkout, "rev-parse", "HEAD")
    assert code_version(checkout.parent / "other") == {"commit": commit, "dirty": False}


def test_a_repository_further_up_is_not_ours(checkout: Path) -> None:
    assert code_version(checkout / "ernie_train") == UNKNOWN


def test_git_may_be_missing_fail_or_hang(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent))
    assert code_version(checkout) == UNKNOWN
    monkeypatch.setattr(environment, "GIT_TIMEOUT_S", 0.2)
    for script in ("exit 128", "exec /bin/sleep 60"):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert code_version(checkout) == UNKNOWN
