"""Foreign text on a terminal: no control character gets through, and nothing is endless."""

import io
import logging
import re
import unicodedata

import pytest
from rich.logging import RichHandler
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ernie_train.core.terminal import Terminal, message_text, one_line, printable, shorten

HOSTILE = "\x1b]52;c;aGk=\x07\x1b[31m\x9b31m\u202e\u2066\u200f\x00\b\r\x7f\u2028\ud800\U000e0041"


DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def controls(text: str) -> list[str]:
    """Return the control characters of a text, without newlines and tabs."""
    return [
        c
        for c in text.replace("\n", "").replace("\t", "")
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c) in DIRECTIONS
        or c in "\u200e\u200f\u061c"
    ]


def test_every_control_character_is_written_out() -> None:
    assert controls(printable("".join(map(chr, range(0x110000))))) == []
    assert controls(HOSTILE)
    assert printable("\x1b[31m") == r"\x1b[31m"
    assert printable("\u202e\ud83d") == r"\u202e\ud83d"


TEXTS = ["", "a\tb\nc", "æøå 最终答案 😀", "e\u0301", "👩\u200d🔬", "\\x1b"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_only_text_stays(text: str) -> None:
    assert printable(text) == text
    assert printable("a\r\nb") == "a\nb"


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("kind", ["text", "str", "table", "syntax", "rule", "log"])
def test_nothing_hostile_reaches_a_console(kind: str, color: bool) -> None:
    stream = io.StringIO()
    console = Terminal(file=stream, width=300, force_terminal=color)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    if kind == "rule":
        console.rule(HOSTILE)
    elif kind == "log":
        handler = RichHandler(console=console)
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "%s", (HOSTILE,), None))
    else:
        shown = {"text": Text(HOSTILE), "str": HOSTILE, "table": table}
        console.print(shown.get(kind, Syntax(HOSTILE, "yaml")))
    printed = stream.getvalue()
    own = re.compile(r"\x1b\[[0-9;]*m") if color else re.compile("$")  # rich's colours
    assert controls(own.sub("", printed)) == []
    assert r"\x1b]52;c;aGk=" in own.sub("", printed)


def test_brackets_and_colons_are_text() -> None:
    stream = io.StringIO()
    Terminal(file=stream, width=80).print("[bold]x[/nope] :smile:")
    assert stream.getvalue() == "[bold]x[/nope] :smile:\n"


def test_long_values_lose_their_middle() -> None:
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 10 + "b" * 90, 20) == "a" * 10 + "[... 80 characters ...]" + "b" * 10
    assert one_line("a\nb\x1b") == r"a\nb\x1b"
    assert len(one_line("x" * 10**5)) < 300
    long = message_text("path.yaml: " + "x" * 10**5 + " must be short")
    assert len(long) < 2100
    assert long.startswith("path.yaml: x")
    assert long.endswith("x must be short")
    assert message_text("\n".join(["line"] * 1000)).splitlines()[-1] == "... and 900 more lines"
    assert message_text("") == ""
