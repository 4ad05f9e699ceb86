"""The report of a self-test, to read and to attach to a bug report: no paths, no secrets."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle

from ernie_train.core import environment
from ernie_train.core.errors import UserError
from ernie_train.io.files import write_json, write_text
from ernie_train.selftest.check import FAIL, PASS, SKIPPED, Outcome

TITLE = "# ernie-train doctor --selftest"
_FACTS = ("ernie_train", "code", "python", "platform", "versions", "device", "gpus", "cpu")


def facts() -> dict[str, Any]:
    """Return versions, device and processor; no path, name of a machine or variable's content."""
    known = environment.describe_environment()
    found = {name: known[name] for name in _FACTS}
    found["memory_gb"] = round(known["memory_bytes"]["total"] / 1e9, 1)
    if known["gpus"]:
        found["compute_capability"] = list(paddle.device.cuda.get_device_capability())
        found["cuda"] = paddle.version.cuda()
        found["cudnn"] = paddle.version.cudnn()
    return found


def without_paths(text: str) -> str:
    """Return a text without the directories of this user and of this Python."""
    places = {os.getcwd(): ".", sys.prefix: "<python>", str(Path.home()): "~"}
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, places[place])
    return text


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return how many checks passed, failed and were skipped."""
    counts = {status: sum(o.status == status for o in outcomes) for status in (PASS, FAIL, SKIPPED)}
    return f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIPPED]} skipped"


def as_markdown(outcomes: Sequence[Outcome], known: dict[str, Any]) -> str:
    """Return the report: a table of checks, then what they ran on."""
    lines = [TITLE, "", summary(outcomes) + ".", "", "| check | result | figures | s |"]
    lines.append("|---|---|---|---:|")
    for outcome in outcomes:
        told = [*map(str, outcome.figures), *([outcome.note] if outcome.note else [])]
        cell = without_paths("; ".join(told)).replace("|", "\\|")
        lines.append(f"| {outcome.name} | {outcome.status} | {cell} | {outcome.seconds:.1f} |")
    text = json.dumps(known, indent=2, ensure_ascii=False)
    return "\n".join([*lines, "", "```json", without_paths(text), "```", ""])


def write_report(path: Path, outcomes: Sequence[Outcome], known: dict[str, Any]) -> None:
    """Write the report as Markdown, or as JSON to a file named `.json`."""
    if path.suffix == ".json":
        rows = [o.as_dict() for o in outcomes]
        write_json(
            path,
            json.loads(without_paths(json.dumps({**known, "checks": rows}, ensure_ascii=False))),
        )
    else:
        write_text(path, as_markdown(outcomes, known))


def check_report_path(path: Path) -> None:
    """Raise `UserError` where the report cannot be written, or would replace another file."""
    if path.suffix not in (".md", ".json"):
        raise UserError(f"--out {path}: the report is Markdown or JSON: name it .md or .json")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--out {path}: no permission to write")
    if path.exists() and not _is_report(path):
        raise UserError(f"--out {path}: exists and is no report of a self-test")


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            start = stream.read(4096)
    except (OSError, ValueError):
        return False
    return not start or start.startswith((TITLE, '{\n  "ernie_train"'))
