"""One writer for all files: what does not write through io/files.py is named, with a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "ernie_train"

ALLOWED = {
    "io/files.py": "the writer itself",
    "io/safetensors.py": "tensors stream into a directory that is renamed when it is whole",
    "io/metrics_log.py": "appends lines; an incomplete last one is cut on resume",
    "rl/report.py": "appends lines; an incomplete last one is cut on resume",
    "launch/supervise.py": "appends a line for each launch; an incomplete last one is not read",
    "launch/logs.py": "appends what ranks print",
    "launch/launcher.py": "scratch of a launch",
    "core/blas.py": "a word, renamed when it is whole",
    "core/worker_pool.py": "a pipe",
    "generate/engines/process.py": "appends what a server prints",
    "data/cache.py": "a lock, and arrays whose sizes are committed behind them",
    "run/export.py": "a copy into a directory that is renamed when it is whole",
    "run/referee_script.py": "scratch of a comparison, without this package",
    "selftest/ranks.py": "scratch of a check",
    "rewards/sandbox/guest/candidate.py": "standard output in the sandbox",
}
# Methods and functions that write the file that they are given.
WRITERS = {
    "write_text", "write_bytes", "copyfile", "copy", "copy2", "copytree", "move", "dump", "save",
    "savez", "save_file", "tofile",
}  # fmt: skip
# Owners whose functions of such names write no file or write it through io/files.py; plain calls.
NO_FILES = {"self", "store", "copy", ""}


def writes(path: Path) -> Iterator[str]:
    """Yield the calls in a module that may write a file in place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        modes += [k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)]
        opens = name == "open" and any(isinstance(m, str) and set(m) & set("wax") for m in modes)
        takes_a_file = len(node.args) > (1 if name == "dump" else 0)
        if opens or (name in WRITERS and takes_a_file and owner.partition(".")[0] not in NO_FILES):
            yield f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno} {called}"


def test_every_other_writer_is_named() -> None:
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in writes(path)]
    assert [line for line in found if line.partition(":")[0] not in ALLOWED] == []
    assert {line.partition(":")[0] for line in found} | {"io/files.py"} == set(ALLOWED)
