"""`eval` and `generate` with `--engine`: a server that has the model samples in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ernie_train.weights import load_pretrained, save_pretrained
from tests.generate.engine_stand_in import StandIn, serving
from tests.small_models import fill


@pytest.fixture
def server(place: Path) -> Iterator[StandIn]:
    with serving(StandIn("mine")) as state:
        state.load(place / "model")
        yield state


def test_eval_counts_what_the_server_completes(
    cli: Any, place: Path, server: StandIn, tmp_path: Path
) -> None:
    """Greedy, as our own sampler does; the server's weights stay as they are."""
    results = {}
    for name, given in {"own": (), "served": ("--engine", server.url)}.items():
        arguments = (
            "--data",
            place / "test.jsonl",
            "--max-new-tokens",
            6,
            "--out",
            tmp_path / name,
        )
        assert cli("eval", place / "model", *arguments, *given)[0] == 0
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
        rows = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        results[name]["completions"] = [json.loads(row)["completion"] for row in rows]
    assert results["served"]["completions"] == results["own"]["completions"]
    assert results["served"]["trained"] == results["own"]["trained"]
    assert results["served"]["settings"]["engine"] == server.url
    assert server.counts["/v1/completions"] == 16 + len(results["own"]["completions"])
    assert server.counts.keys() <= {"/health", "/v1/models", "/v1/completions"}


def test_generate_writes_what_the_server_completes(
    cli: Any, place: Path, server: StandIn, tmp_path: Path
) -> None:
    files = {}
    for name, given in {"own": (), "served": ("--engine", server.url)}.items():
        out = tmp_path / f"{name}.jsonl"
        arguments = ("--prompts", place / "test.jsonl", "--max-new-tokens", 6, "--out", out)
        assert cli("generate", place / "model", *arguments, *given)[0] == 0
        files[name] = out.read_text()
    assert files["served"] == files["own"]


def test_a_server_of_another_model_is_refused(
    cli: Any, place: Path, server: StandIn, tmp_path: Path
) -> None:
    other = load_pretrained(place / "model")
    fill(other, 9)
    save_pretrained(other, tmp_path / "other")
    server.load(tmp_path / "other")
    status, said = cli("eval", place / "model", "--data", place / "test.jsonl", "--max-examples", 1,
                       "--max-new-tokens", 6, "--engine", server.url)  # fmt: skip
    assert status == 1 and "serves another model" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--engine", "localhost"), "--engine"),
        (("eval", "--engine", "http://x:1", "--batch-size", 4), "leave it out beside --engine"),
        (("generate", "--engine", "http://x:1", "--prompt", "1?"), "--engine answers --prompts"),
    ],
)
def test_what_cannot_work_is_refused(
    cli: Any, place: Path, arguments: tuple[object, ...], message: str
) -> None:
    verb, *given = arguments
    data = ("--data", place / "test.jsonl") if verb == "eval" else ()
    status, said = cli(verb, place / "model", *data, *given)
    assert status in (1, 2) and message in " ".join(said.split()) and "Traceback" not in said
