"""Tell by a file's first bytes that it is not what its name says, and what to do about it."""

from pathlib import Path

from ernie_train.core.errors import DataError
from ernie_train.core.foreign_files import open_regular
from ernie_train.data.files.find import TEXTS

HEAD_BYTES = 64
NUL = b"\0"
# First bytes, the ending of the names that may have them (None: no name may), and what is said
# of others.
_MAGIC = (
    (b"\x1f\x8b", ".gz", "is compressed by gzip: its name must end in .gz"),
    (b"\x28\xb5\x2f\xfd", ".zst", "is compressed by zstd: its name must end in .zst"),
    (b"PAR1", ".parquet", "is a Parquet file: its name must end in .parquet"),
    (b"ARROW1", ".arrow", "is an Arrow file: its name must end in .arrow"),
    (
        b"PK\x03\x04",
        None,
        "is a spreadsheet (.xlsx) or a zip archive: save it as CSV, or unpack it",
    ),
    (b"\xd0\xcf\x11\xe0", None, "is a spreadsheet (.xls): save it as CSV in UTF-8"),
    (b"version https://git-lfs", None, "is a pointer of Git LFS: `git lfs pull` fetches the file"),
)
_WEB_PAGES = (b"<!doctype html", b"<html")


def check_head(file: Path, kind: str, compression: str) -> None:
    """Check that a file may be of the kind and the compression that its name says.

    Raises:
        DataError: it is another kind of file.
        OSError: it cannot be read.
    """
    with open_regular(file) as stream:
        head = stream.read(HEAD_BYTES)
    for magic, ending, what in _MAGIC:
        if head.startswith(magic) and ending not in (kind, compression):
            raise DataError(f"{file} {what}")
    if kind != ".txt" and head.lstrip().lower().startswith(_WEB_PAGES):
        raise DataError(f"{file} is a web page (HTML), not data: download the file itself")
    if kind in TEXTS and not compression and NUL in head[:2]:
        raise DataError(f"{file} is not UTF-8: it begins as UTF-16 does; save it as UTF-8")
