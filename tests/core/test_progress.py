"""The display of long work; tests/io/test_metrics_log.py covers that of a stage."""

import io
import logging
import sys

import pytest
import rich.console

from ernie_train.cli.main import main
from ernie_train.core import terminal as terminals
from ernie_train.core.terminal import ProgressDisplay, Terminal, format_duration, progress_bar


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
    monkeypatch.setattr(terminals, "LINE_EVERY_S", 1000.0)
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


def test_a_narrow_terminal_shows_count_time_left_and_every_value() -> None:
    console = Terminal(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    clock = iter(range(0, 10_000, 10))
    bar = ProgressDisplay(
        console, bar=True, label="rl-math-code", total=3000, clock=lambda: float(next(clock))
    )
    values = ["loss 0.1234", "reward 0.613", "kl 0.0181", "lr 3.00e-04", "3,289 tokens/s"]
    bar.update(1500, [*values, "\x1b]52;c;AAAA\x07"])
    bar.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    last = " ".join(shown.rpartition("rl-math-code")[2].split())
    for part in ("1500/3000", "left", *values, "\\x1b]52"):
        assert part in last
    assert "\x1b]" not in last


def test_warnings_stand_above_the_bar_and_do_not_scroll_it_away(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["report", "/nowhere"])  # any verb sets logging up
    capsys.readouterr()
    console = Terminal(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    bar = ProgressDisplay(console, bar=True, label="sft", total=4)
    bar.update(1, ["loss 1.0"])
    print("warning: by another library", file=sys.stderr)
    logging.getLogger("ernie_train").warning("warning: by this one")
    bar.update(2, ["loss 0.5"])
    bar.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert capsys.readouterr().err == ""
    for told in ("warning: by another library", "warning: by this one"):
        assert told in shown
        assert "2/4" in shown.rpartition(told)[2]  # the bar is drawn again below
