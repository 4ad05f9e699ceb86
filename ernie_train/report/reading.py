"""Completions to read side by side: of RL's iterations, and of held-out problems over stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie_train.report.overview import LONGEST_TEXT, is_number, shown, shown_text
from ernie_train.report.run_files import SAMPLES, SOLVED, Remark, RunFiles, iter_rows

MOST_ITERATIONS = 40  # of a stage, evenly chosen, the first and the last among them
MOST_COMPLETIONS = 16  # of an iteration
MOST_PROBLEMS = 24
_MOST_PARTS = 12
_MOST_TURNS = 24
_MOST_CHARACTERS = 1_500_000  # of a list's texts


def reading_lists(run: RunFiles) -> list[dict[str, Any]]:
    """Return lists of columns to put side by side.

    Each is {name, columns: [{label, rows}]}; rows of two columns with the same place are of the
    same problem where `aligned` is true.
    """
    found = []
    for stage in run.stages:
        columns = _iterations(stage.directory / SAMPLES, run.remarks.append)
        if columns:
            name = f"{stage.name}: completions of RL"
            found.append({"name": shown(name), "aligned": False, "columns": columns})
    if solved := _solved(run):
        found.append({"name": "held-out problems", "aligned": True, "columns": solved})
    return found


def _iterations(path: Path, remark: Remark) -> list[dict[str, Any]]:
    every = sorted({s for row in iter_rows(path, remark) if type(s := row.get("step")) is int})
    last = len(every) - 1
    picked = {round(at * last / (MOST_ITERATIONS - 1)) for at in range(MOST_ITERATIONS)}
    by_step: dict[int, list[dict[str, Any]]] = {every[at]: [] for at in sorted(picked) if every}
    for row in iter_rows(path, remark):
        step = row.get("step")
        if type(step) is int and len(by_step.get(step, ())) < MOST_COMPLETIONS and step in by_step:
            by_step[step].append(row)
    return _columns({f"iteration {step}": rows for step, rows in by_step.items()})


def _solved(run: RunFiles) -> list[dict[str, Any]]:
    """Return the same problems after each stage that solved them, and at the end."""
    places = [(f"after {stage.name}", stage.directory / SOLVED) for stage in run.stages]
    places.append(("end", run.path / SOLVED))
    found: dict[str, list[dict[str, Any]]] = {}
    chosen: list[str] = []
    for label, path in places:
        if not chosen:  # rows are read twice, since all of them may not fit into memory
            every = list(dict.fromkeys(map(_problem, iter_rows(path, run.remarks.append))))
            chosen = every[:: max(1, len(every) // MOST_PROBLEMS)][:MOST_PROBLEMS]
        read = iter_rows(path, run.remarks.append)
        rows = {name: row for row in read if (name := _problem(row)) in chosen}
        if rows:
            found[label] = [rows[problem] for problem in chosen if problem in rows]
    return _columns(found)


def _columns(found: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what to show of rows, by the label of their column; many make each text shorter."""
    shown_rows = [row for rows in found.values() for row in rows]
    texts = sum(1 + len(_said(row)) for row in shown_rows)
    longest = max(300, min(LONGEST_TEXT, _MOST_CHARACTERS // max(1, texts)))
    return [
        {"label": shown(label), "rows": [_shown_row(row, longest) for row in rows]}
        for label, rows in found.items()
    ]


def _problem(row: Mapping[str, Any]) -> str:
    return f"{row.get('source')}:{row.get('sample', 0)}"[:500]


def _shown_row(row: Mapping[str, Any], longest: int) -> dict[str, Any]:
    facts = {name: shown(row[name]) for name in ("task", "status", "tokens") if name in row}
    numbers = {
        name: _number(row[name])
        for name in ("reward", "value", "advantage")
        if isinstance(row.get(name), int | float)
    }
    parts = row.get("parts")
    return {
        **facts,
        "numbers": numbers,
        "parts": list(_parts(parts)) if isinstance(parts, dict) else [],
        "cut": row.get("finished") is False,
        "detail": shown(row.get("detail") or "", 500),
        "prompt": shown_text(row.get("prompt", ""), longest),
        "turns": [_turn(turn, longest) for turn in _said(row)],
    }


def _parts(parts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in list(parts.items())[:_MOST_PARTS]:
        yield shown(name, 60), _number(value)


def _number(value: Any) -> str:
    return f"{value:.3g}" if is_number(value) or isinstance(value, float) else shown(value, 40)


def _said(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the policy and its tools said; without tools the completion is the one turn."""
    turns = row.get("turns")
    given = [t for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
    return given[:_MOST_TURNS] or [{"role": "assistant", "content": row.get("completion")}]


def _turn(turn: Mapping[str, Any], longest: int) -> dict[str, Any]:
    name = f"{turn.get('role')} {turn.get('name') or ''}".strip()
    text = turn.get("content")
    return {
        "role": shown(name, 60),
        "tool": turn.get("role") == "tool",
        "failed": turn.get("failed") is True,
        "text": shown_text("" if text is None else text, longest),
    }
