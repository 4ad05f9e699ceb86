"""Read files that others made: bounded, and never a pipe or a device that does not end.

Everything raises `OSError` with the path, or `ValueError` with the reason alone.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 2**28  # of a text that is read at once; a tokenizer.json of 200,000 tokens has 2^24
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading as bytes; refuse pipes, devices and sockets without waiting.

    Raises:
        OSError: it cannot be opened, or is none of the files that have an end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        for is_kind, name in _KINDS:
            if is_kind(mode):
                raise OSError(errno.ENOTSUP, f"it is {name}, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a file of at most `most_bytes`."""
    with open_regular(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most_bytes:
            raise ValueError(f"it has {size} bytes, more than the {most_bytes} that make sense")
        return stream.read()


def read_text(path: str | Path, most_bytes: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file of at most `most_bytes`, without a byte order mark."""
    try:
        return read_bytes(path, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; `ValueError` if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise ValueError("not readable JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"not readable JSON: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    value = parse_json(read_text(path))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a JSON object")
    return value
