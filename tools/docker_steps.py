"""Run the steps of a Dockerfile without Docker: in a scratch directory, as this user.

    python -m tools.docker_steps docker/Dockerfile.cpu

It copies what .dockerignore lets through, makes an environment of this Python in place of the base
image, and runs each RUN in it; `apt-get`, `useradd` and `chown` are only said, since they would
change the machine. At last the image's command is asked for its help. It takes 2 GB and minutes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = ("apt-get", "useradd", "chown")


class Step(NamedTuple):
    """Hold an instruction of a Dockerfile, such as `RUN`, and what follows it."""

    instruction: str
    text: str


def read_steps(dockerfile: Path) -> list[Step]:
    """Return the instructions of a Dockerfile, lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text("utf-8").splitlines() if line[:1] != "#"]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [Step(instruction, text.strip()) for instruction, text in found]


def context_files(root: Path = ROOT) -> Iterator[Path]:
    """Yield the files of the build context: those of the repository that .dockerignore leaves.

    Its lines are read as ours are written: `*`, then `!NAME` of the root, then patterns `**/NAME`.
    """
    lines = (root / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and line[0] != "#"]
    kept = {line[1:] for line in rules if line.startswith("!")}
    dropped = [line.removeprefix("**/") for line in rules if line.startswith("**/")]
    if unread := [r for r in rules if r != "*" and not r.startswith(("!", "**/"))]:
        raise SystemExit(f".dockerignore: cannot read {', '.join(unread)}")
    for name in sorted(kept):
        place = root / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            parts = file.relative_to(root).parts
            if file.is_file() and not any(fnmatch.fnmatch(p, d) for p in parts for d in dropped):
                yield file.relative_to(root)


def run_steps(dockerfile: Path, scratch: Path, environment: Mapping[str, str]) -> list[str]:
    """Run the steps below `scratch`; return the image's command.

    Absolute directories of the file lie below `scratch`. Raises `CalledProcessError` for a RUN that
    fails.
    """
    variables, place, command = dict(environment), scratch, []
    for instruction, text in read_steps(dockerfile):
        if instruction == "ENV":
            variables |= dict(pair.split("=", 1) for pair in text.split())
        elif instruction == "WORKDIR":
            place = scratch / text.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            _copy(text.split()[0], place)
        elif instruction == "RUN":
            text = re.sub(r"(?<![\w.])/(work|var/lib)\b", rf"{scratch}/\1", text)
            print(f"==> {text}", flush=True)
            subprocess.run(["bash", "-euc", text], cwd=place, env=variables, check=True)
        elif instruction == "ENTRYPOINT":
            command = json.loads(text)
    return command


def _copy(source: str, place: Path) -> None:
    wanted = [f for f in context_files() if source == "." or str(f) == source]
    if not wanted:
        raise SystemExit(f"COPY {source}: .dockerignore keeps it out of the build")
    for file in wanted:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, place / file)


def stand_ins(directory: Path) -> None:
    """Make commands that say what they would do to the machine."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in SYSTEM:
        file = directory / name
        file.write_text(f'#!/bin/sh\necho "left out: {name} $*"\n', "utf-8")
        file.chmod(0o755)


def main() -> None:
    """Run the steps of the file that is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    dockerfile = parser.parse_args().dockerfile.resolve()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        subprocess.run([sys.executable, "-m", "venv", scratch / "venv"], check=True)
        stand_ins(scratch / "system")
        path = f"{scratch / 'system'}:{scratch / 'venv/bin'}:{os.environ['PATH']}"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": path}
        command = run_steps(dockerfile, scratch, environment)
        subprocess.run([*command, "--help"], cwd=scratch, env=environment, check=True)
    print("all steps passed; apt-get, useradd and chown were left out")


if __name__ == "__main__":
    main()
