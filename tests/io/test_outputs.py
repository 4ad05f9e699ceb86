"""Outputs: an earlier one of the same kind is replaced, nothing else is."""

import json
import shutil

import pytest

from ernie_train.core.errors import UserError
from ernie_train.io.files import write_directory
from ernie_train.io.outputs import (
    check_output_directory,
    check_output_file,
    check_run_directory,
)

MARK, KEYS = "receipt.json", ("value", "status")


def written(path, *names):
    def write(directory):
        for name in names:
            (directory / name).write_text("{}")
        return {}

    write_directory(path, write)
    return path


def test_a_directory_of_the_same_kind_is_replaced(tmp_path):
    check_output_directory(tmp_path / "new/deep", MARK)
    (tmp_path / "empty").mkdir()
    check_output_directory(tmp_path / "empty", MARK)
    check_output_directory(written(tmp_path / "same", MARK, "config.json"), MARK)


@pytest.mark.parametrize("place", ["checkpoint", "model", "model/..", "link"])
def test_a_directory_of_another_kind_or_an_input_needs_force(tmp_path, place):
    checkpoint = written(tmp_path / "all" / "checkpoint", "state.json", "config.json")
    model = written(tmp_path / "all" / "model", MARK, "config.json")
    (tmp_path / "all" / "link").symlink_to(model)
    if place == "model/..":  # holds the model, and was written by this program
        shutil.copy(checkpoint / "MANIFEST.json", tmp_path / "all")
    out = tmp_path / "all" / place
    with pytest.raises(UserError, match="--force"):
        check_output_directory(out, MARK, inputs=[model])
    check_output_directory(out, MARK, inputs=[model], force=True)


def test_force_does_not_delete_what_others_wrote(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not written by this program"):
        check_output_directory(tmp_path, MARK, force=True)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (None, True), ("", True), ('{"value": 1, "status": "ok", "more": 2}\n', True),
        ('{"value": 1}\n', False), ("notes\n", False), ("[1]\n", False), ("\xff\x00", False),
        ("[" * 10**5, False),
    ],
)  # fmt: skip
def test_a_file_is_replaced_by_the_keys_of_its_rows(tmp_path, text, allowed):
    out = tmp_path / "out.jsonl"
    if text is not None:
        out.write_text(text, encoding="latin-1")
    if allowed:
        check_output_file(out, KEYS)
    else:
        with pytest.raises(UserError, match="--force"):
            check_output_file(out, KEYS)
    check_output_file(out, KEYS, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_read_is_never_replaced(tmp_path, force):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"value": 1, "status": "ok"}))
    with pytest.raises(UserError, match="is read by this command"):
        check_output_file(data, KEYS, inputs=[tmp_path / "x" / ".." / "data.jsonl"], force=force)
    model = written(tmp_path / "model", "config.json")
    with pytest.raises(UserError, match="is read by this command"):
        check_output_file(model / "config.json", KEYS, inputs=[model], force=force)
    (model / "scores.jsonl").write_text(data.read_text())
    check_output_file(model / "scores.jsonl", KEYS, inputs=[model], force=force)


def test_places_where_no_file_can_be_are_told_before_the_work(tmp_path):
    for path, message in ((tmp_path, "directory"), (tmp_path / "no" / "x", "no directory")):
        with pytest.raises(UserError, match=message):
            check_output_file(path, KEYS, force=True)


def test_a_run_does_not_replace_a_recipe_that_no_run_wrote(tmp_path):
    check_run_directory(tmp_path / "new", "environment.json", ["recipe.yaml"])
    (tmp_path / "notes.txt").write_text("x")
    check_run_directory(tmp_path, "environment.json", ["recipe.yaml"])
    (tmp_path / "recipe.yaml").write_text("name: mine")
    with pytest.raises(UserError, match=r"replace its recipe\.yaml: give another --run-dir"):
        check_run_directory(tmp_path, "environment.json", ["recipe.yaml"])
    (tmp_path / "environment.json").write_text("{}")
    check_run_directory(tmp_path, "environment.json", ["recipe.yaml"])
