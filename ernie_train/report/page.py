"""Write the report: everything in one file, under a policy that lets nothing else run or load.

Texts reach the page through Jinja2's escaping, or as JSON that the page's script puts in as text.
The script and the styles are allowed by their hashes alone.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ernie_train.core.errors import UserError, storage_errors
from ernie_train.core.foreign_files import open_regular
from ernie_train.core.terminal import printable, shorten
from ernie_train.io.files import write_text
from ernie_train.io.run_dir import differences
from ernie_train.report import curves, overview
from ernie_train.report.reading import reading_lists
from ernie_train.report.run_files import RunFiles, StageFiles, read_run

FILE_NAME = "report.html"
MARK = b'<meta name="generator" content="ernie-train report">'
_LONGEST_RECIPE = 200_000
_MOST_REMARKS = 40
# Plotly puts a style sheet of its map library, which is not used, into the page, and an empty one
# that it fills by rules; a test in a browser sees no violation of the policy.
_STYLES_OF_PLOTLY = (
    "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='",
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
)


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> tuple[Path, list[RunFiles]]:
    """Write the page of one or several runs; return its path and what was read.

    out: the file; by default `report.html` in the first run's directory.

    Raises:
        UserError: a directory is no run's, or `out` is something else than an earlier report.
        StorageError: the file cannot be written.
    """
    runs = [read_run(path) for path in run_dirs]
    path = out if out is not None else run_dirs[0] / FILE_NAME
    _check_replaceable(path)
    html = render(runs)
    with storage_errors("cannot write", path):
        write_text(path, html)
    return path, runs


def _check_replaceable(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file, such as {path / FILE_NAME}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}")
    if not path.exists() or not path.stat().st_size:
        return
    with storage_errors("cannot read", path), open_regular(path) as stream:
        if MARK not in stream.read(1000):
            raise UserError(f"{path} exists and is no earlier report: give another --out")


def render(runs: Sequence[RunFiles]) -> str:
    """Return the page as HTML."""
    plotly, script, style = _plotly(), _asset("page.js"), _asset("page.css")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_digest(plotly)} {_digest(script)}",
            f"style-src {_digest(style)} {' '.join(_STYLES_OF_PLOTLY)}",
            "style-src-attr 'unsafe-inline'",  # colours and sizes that Plotly sets on elements
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    columns, rows = overview.evaluation_table(runs)
    views = [_run_view(run) for run in runs]
    # Read last: what it finds damaged is among the remarks.
    data = {"charts": _charts(runs), "readings": _readings(runs), "tasks": _bars(columns, rows)}
    for view, run in zip(views, runs, strict=True):
        remarks = [overview.shown(text, 500) for text in dict.fromkeys(run.remarks)]
        view["remarks"] = remarks[:_MOST_REMARKS]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html.jinja")).render(
        mark=Markup(MARK.decode()),
        policy=policy,
        title=" and ".join(view["name"] for view in views)[:200],
        runs=views,
        columns=columns,
        tasks=rows,
        changes=_changes(runs),
        running=any(run.is_running for run in runs),
        made=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        data=Markup(_json(data)),
        plotly=Markup(plotly),
        script=Markup(script),
        style=Markup(style),
    )


def _run_view(run: RunFiles) -> dict[str, Any]:
    return {
        "name": overview.shown(run.name, 100),
        "path": overview.shown(str(run.path), 300),
        "state": "running" if run.is_running else "complete" if run.is_complete else "not complete",
        "stages": overview.stage_rows(run),
        "health": overview.health_of(run),
        "data": [
            (overview.shown(stage.name, 80), overview.facts(stage.data_report))
            for stage in run.stages
            if stage.data_report is not None
        ],
        "environment": overview.environment_facts(run.environment) if run.environment else None,
        "receipt": overview.facts(run.receipt) if run.receipt else None,
        "recipe": printable(shorten(run.recipe_text, _LONGEST_RECIPE)),
    }


def _charts(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return for each name of a stage its curves over the runs, and each run's heat map."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    found = []
    for name in names:
        own = [(run, s) for run in runs for s in run.stages if s.name == name and s.curves.lines]
        if not own:
            continue
        first, others = curves.chart_names([stage.curves for _, stage in own])
        kept = others[: max(0, curves.MOST_CURVES - len(first))]
        heats = [(run, curves.heat_map(stage.curves)) for run, stage in own]
        found.append(
            {
                "stage": overview.shown(name, 80),
                "first": [_chart(own, metric) for metric in first],
                "more": [_chart(own, metric) for metric in kept],
                "left_out": len(others) - len(kept),
                "heat": [
                    {"run": overview.shown(run.name, 60), **heat} for run, heat in heats if heat
                ],
            }
        )
    return found


def _chart(own: Sequence[tuple[RunFiles, StageFiles]], metric: str) -> dict[str, Any]:
    lines = [
        {"run": overview.shown(run.name, 60), **line}
        for run, stage in own
        if (line := curves.curve(stage.curves, metric)) is not None
    ]
    return {"name": curves.shown_name(metric), "lines": lines}


def _readings(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    several = len(runs) > 1
    return [
        {**reading, "name": f"{overview.shown(run.name, 60)}: {reading['name']}"}
        if several
        else reading
        for run in runs
        for reading in reading_lists(run)
    ]


def _bars(columns: Sequence[str], rows: Sequence[overview.TaskRow]) -> list[dict[str, Any]]:
    """Return for each column of the evaluation its tasks and values with their intervals."""
    bars = []
    for at, column in enumerate(columns):
        cells = [(row.task, cell) for row in rows if (cell := row.cells[at]) is not None]
        bars.append(
            {
                "name": column,
                "tasks": [task for task, _ in cells],
                "values": [value for _, (value, _, _) in cells],
                "below": [v - low if low is not None else 0 for _, (v, low, _) in cells],
                "above": [high - v if high is not None else 0 for _, (v, _, high) in cells],
            }
        )
    return bars


def _changes(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return how the recipe of each later run differs from the first's."""
    return [
        (
            overview.shown(run.name, 60),
            [overview.shown(line, 300) for line in differences(_by_name(runs[0]), _by_name(run))],
        )
        for run in runs[1:]
    ]


def _by_name(run: RunFiles) -> dict[str, Any]:
    """Return the recipe with its stages by their names, so that each meets its own."""
    return {**run.recipe, "stages": {stage.name: stage.settings for stage in run.stages}}


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _asset(name: str) -> str:
    return (importlib.resources.files("ernie_train.report") / "assets" / name).read_text("utf-8")


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element: it has no `<`, so it cannot end it."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
