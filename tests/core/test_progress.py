"""The display of long work; tests/io/test_metrics_log.py covers that of a stage."""

import io

import pytest
import rich.console

from ernie_train.core import progress
from ernie_train.core.progress import format_duration, progress_bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_in_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 1000.0)
    text = io.StringIO()
    console = rich.console.Console(file=text, width=100, force_terminal=terminal)
    with progress_bar(console, "[problems]", 30) as advance_to:
        for done in (10, 20, 30):
            advance_to(done)
    shown = text.getvalue()
    assert ("\x1b[" in shown) == terminal
    if terminal:
        assert "[problems]" in shown and "30/30" in shown and "0 s left" in shown
    else:
        assert shown.splitlines() == ["[problems]  10/30  0 s left", "[problems]  30/30  0 s left"]
