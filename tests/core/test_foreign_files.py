"""Files of others: whatever lies at a path, reading ends at once and says why."""

import os
import socket

import pytest

from ernie_train.core.foreign_files import open_regular, parse_json, read_json, read_text

WITHOUT_END = {
    "pipe": "a pipe",
    "zero": "a device",
    "socket": "No such device",
    "": "directory",
    "x" * 300: "too long",
    "absent": "No such",
}


def test_what_has_no_end_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, reason in WITHOUT_END.items():
            with pytest.raises(OSError, match=reason) as failed:
                open_regular(tmp_path / name)
            assert str(tmp_path) in str(failed.value.filename)


def test_text_of_a_bounded_size(tmp_path):
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf\xc3\xa6")
    assert read_text(tmp_path / "x") == "æ"
    with pytest.raises(ValueError, match="5 bytes, more than the 4"):
        read_text(tmp_path / "x", most_bytes=4)
    (tmp_path / "x").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 1\)"):
        read_text(tmp_path / "x")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**40)  # holds no disk
    with pytest.raises(ValueError, match="more than"):
        read_text(tmp_path / "huge")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"), ("{", "line 1, column 2"), ("[" * 10**5, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"), ("1" * 5000, "digits"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"'])
def test_a_file_that_holds_no_object(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="not a JSON object"):
        read_json(tmp_path / "x.json")
